"""The first rows of files of pairs, looked at before anything is run."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpd.core.errors import UserError
from ctpd.pipeline.sources import file_states, read_rows
from ctpd.text.config import Columns, Layout
from ctpd.text.layouts import FIRST_ROWS, PLAIN, reading

if TYPE_CHECKING:
    from ctpd.text.recognise import Recognised


def first_rows(path: Path, *, encoding: str | None = None) -> tuple[Mapping[str, Any], ...]:
    """The first `FIRST_ROWS` rows of a source of one or several files, read once while these do not change.

    Raises:
        UserError: there is no such file, or they cannot be read.
    """
    return _first_rows(path, encoding, file_states(path, encoding=encoding))


def reading_of(path: Path, layout: Layout, *, encoding: str | None = None, ignored: Sequence[str] = ()) -> int | None:
    """The version of how a source is read, where its first rows hold what earlier versions read otherwise; else None.

    Raises:
        UserError: the rows cannot be read, are transcripts of which the layout says nothing, or none has the columns
            that are read; or a column that belongs to the conversation is neither read nor among those ``ignored``.
    """
    from ctpd.text.pairs import check_columns
    from ctpd.text.unread import refuse_unread

    rows = first_rows(path, encoding=encoding)
    check_columns(rows, source=str(path), layout=layout)
    refuse_unread(rows, source=str(path), layout=layout, ignored=ignored)
    return reading(rows, layout)


def recognised(path: Path, *, columns: Columns | None = None, encoding: str | None = None) -> "Recognised":
    """What a source of pairs holds, as its first rows show.

    Raises:
        UserError: the rows cannot be read, or are pairs in no form that is recognised.
    """
    from ctpd.text.recognise import recognise

    return recognise(first_rows(path, encoding=encoding), source=str(path), columns=columns)


def layout_of(path: Path) -> Layout:
    """The layout that is recognised; that of plain rows where none is, whose error then says what a row lacks."""
    try:
        return recognised(path).layout
    except UserError:
        return PLAIN


@cache
def _first_rows(path: Path, encoding: str | None, states: tuple[Any, ...]) -> tuple[Mapping[str, Any], ...]:
    """Remembered by the states of the files; ``path`` names them in errors."""
    return tuple(islice(read_rows(path, encoding=encoding), FIRST_ROWS))
