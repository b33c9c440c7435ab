"""The first rows of a file of pairs, looked at before anything is run."""

from collections.abc import Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpd.core.errors import UserError
from ctpd.core.userfiles import regular_file
from ctpd.pipeline.sources import read_rows
from ctpd.text.config import Columns, Layout
from ctpd.text.layouts import FIRST_ROWS, PLAIN, READING, holds_more

if TYPE_CHECKING:
    from ctpd.text.recognise import Recognised


def first_rows(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The first `FIRST_ROWS` rows of a local file, read once while it does not change.

    Raises:
        UserError: there is no such file, or they cannot be read.
    """
    found = regular_file(path, what="data file", fix="Correct the path of the data").stat()
    return _first_rows(path.resolve(), path, found.st_size, found.st_mtime_ns)


def reading_of(path: Path, layout: Layout) -> int | None:
    """The version of how a file is read, where its first rows hold what earlier versions read otherwise; else None.

    Raises:
        UserError: the rows cannot be read, are transcripts of which the layout says nothing, or none has the columns
            that are read.
    """
    from ctpd.text.pairs import check_columns

    rows = first_rows(path)
    check_columns(rows, source=str(path), layout=layout)
    return READING if any(holds_more(row) for row in rows) else None


def recognised(path: Path, *, columns: Columns | None = None) -> "Recognised":
    """What a file of pairs holds, as its first rows show.

    Raises:
        UserError: the rows cannot be read, or are pairs in no form that is recognised.
    """
    from ctpd.text.recognise import recognise

    return recognise(first_rows(path), source=str(path), columns=columns)


def layout_of(path: Path) -> Layout:
    """The layout that is recognised; that of plain rows where none is, whose error then says what a row lacks."""
    try:
        return recognised(path).layout
    except UserError:
        return PLAIN


@cache
def _first_rows(resolved: Path, path: Path, size: int, changed: int) -> tuple[Mapping[str, Any], ...]:
    return tuple(islice(read_rows(path), FIRST_ROWS))
