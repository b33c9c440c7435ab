"""What the columns of a file of pairs hold, told from its first rows: the layout that a recipe has to say (docs/data.md)."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ctpd.core.errors import UserError, listed
from ctpd.text.config import Columns, Form, Layout
from ctpd.text.json_messages import decoded_where_possible
from ctpd.text.layouts import PROMPTS, begins_transcript, cells, looks_like_transcripts, other_spelling
from ctpd.text.messages import conversation
from ctpd.text.pairs import Dropped, usable_rows
from ctpd.text.values import BadRow, WrongColumns, WrongForm, as_list, is_filled, is_null

_BOTH = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_answer", "rejected_answer"),
    ("chosen", "reject"),
    ("accepted", "rejected"),
    ("preferred", "dispreferred"),
)
_ORDERED = "output"  # Alpaca's column of responses, which older files fill with both, the better one first
_SYSTEMS = ("system_prompt", "system_message")
_OTHER_PROMPTS = ("problem", "context", "user_prompt", "user")

Rows = Sequence[Mapping[str, object]]


class Recognised(NamedTuple):
    """How a file holds pairs.

    Attributes:
        layout: what the recipe has to say; all None where nothing.
        form: what the responses are, in words.
        used: our name -> the file's column.
        ignored: the other columns.
        bad: the first rows that are no pairs.
        of: how many rows were looked at.
    """

    layout: Layout
    form: str
    used: dict[str, str]
    ignored: tuple[str, ...]
    bad: int
    of: int

    def sentence(self) -> str:
        """The same in words."""
        parts = [name if name == column else f"{column} as {name}" for name, column in self.used.items()]
        ignored = f"; not read: {listed(self.ignored)}" if self.ignored else ""
        bad = f"; {self.bad} of the first {self.of} rows are no pairs and will be dropped" if self.bad else ""
        return f"{self.form}; read: {', '.join(parts)}{ignored}{bad}"


def recognise(rows: Rows, *, source: str, columns: Columns | None = None) -> Recognised:
    """The layout of a file.

    Args:
        rows: its first rows, at least one.
        source: names the file in errors.
        columns: the columns where the user has said them.

    Raises:
        UserError: no row is a pair in any form that is known without being told; the columns are listed.
    """
    rows = [{name: decoded_where_possible(value) for name, value in row.items()} for row in rows]
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    given = _columns(rows, names, source) if columns is None else columns
    layout = Layout(columns=given, form=_form(rows, given))
    try:
        read = list(usable_rows(rows, source=source, layout=layout))
    except BadRow as error:
        if columns is not None or (isinstance(error, WrongForm) and not isinstance(error, WrongColumns)):
            raise
        raise _unknown(names, source, because=error.what) from error
    used = _used(rows, names, layout)
    return Recognised(
        layout=layout,
        form=_words(rows, layout),
        used=used,
        ignored=tuple(name for name in names if name not in used.values()),
        bad=sum(isinstance(row, Dropped) for row in read),
        of=len(rows),
    )


def _columns(rows: Rows, names: Sequence[str], source: str) -> Columns | None:
    """The columns that the recipe has to name; None if they all have our names."""
    named: dict[str, str] = {}
    both = next((pair for pair in _BOTH if set(pair) <= set(names)), None)
    if both is not None:
        named |= {ours: column for ours, column in zip(("chosen", "rejected"), both, strict=True) if ours != column}
    elif _ORDERED in names and all(_has_two(row[_ORDERED]) for row in rows if not is_null(row.get(_ORDERED))):
        named["responses"] = _ORDERED
    else:
        raise _unknown(names, source, because="no columns are known to hold the better and the worse response")
    named |= _prompt(rows, names, named, source)
    system = next((name for name in _SYSTEMS if name in names), None)
    if "system" not in names and system is not None:
        named["system"] = system
    return Columns(**named) if named else None


def _prompt(rows: Rows, names: Sequence[str], named: Mapping[str, str], source: str) -> dict[str, str]:
    """The columns of the prompt that have other names."""
    if any(is_filled(row.get("prompt")) for row in rows) or _holds_prompt(rows, named):
        return {}
    chosen = named.get("chosen", "chosen")
    found = [
        name
        for name in (*PROMPTS, *_OTHER_PROMPTS)
        if any(_is_prompt(row.get(name)) for row in rows) and not all(_repeats(row, chosen, name) for row in rows)
    ]
    if "instruction" in found and "input" in names:
        return {"prompt": "instruction", "input": "input"}
    if len(found) > 1:
        raise _unknown(names, source, because=f"the prompt may be in {listed(found)}", ours=("prompt",))
    return {"prompt": found[0]} if found else {}


def _holds_prompt(rows: Rows, named: Mapping[str, str]) -> bool:
    """Whether the better response is a whole conversation in all rows that have one."""
    values = [as_list(row.get(named.get("chosen", "chosen"))) for row in rows]
    filled = [value for value in values if not is_null(value)]
    return bool(filled) and all(
        (isinstance(value, list) and len(value) > 1) or (isinstance(value, str) and begins_transcript(value))
        for value in filled
    )


def _repeats(row: Mapping[str, object], chosen: str, name: str) -> bool:
    """Whether the better response begins with the text of a column: the prompt is part of it."""
    response, text = row.get(chosen), row.get(name)
    return isinstance(response, str) and isinstance(text, str) and response.lstrip().startswith(text.strip())


def _is_prompt(value: object) -> bool:
    return is_filled(value) and isinstance(as_list(value), str | list | Mapping)


def _has_two(value: object) -> bool:
    value = as_list(value)
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(value, list) and len(value) == 2


def _form(rows: Rows, columns: Columns | None) -> Form | None:
    return "transcript" if looks_like_transcripts(rows, Layout(columns=columns)) else None


def _used(rows: Rows, names: Sequence[str], layout: Layout) -> dict[str, str]:
    given = {} if layout.columns is None else layout.columns.given
    ours = (
        ("system", "prompt", "input", "responses")
        if "responses" in given
        else ("system", "prompt", "input", "chosen", "rejected")
    )
    plain = {name: name for name in ours if name in names and name != "input"}
    if "prompt" not in {**plain, **given} and (found := _read_prompt(rows, layout)) is not None:
        plain["prompt"] = found
    return {name: column for name in ours if (column := {**plain, **given}.get(name)) is not None}


def _read_prompt(rows: Rows, layout: Layout) -> str | None:
    """The column that is read as the prompt without being named."""
    for row in rows:
        try:
            return cells(row, layout, where="").names.get("prompt")
        except BadRow:
            continue
    return None


def _words(rows: Rows, layout: Layout) -> str:
    if layout.form == "transcript":
        return "transcripts, whose turns become messages (`form: transcript`)"
    for row in rows:
        try:
            found = conversation(cells(row, layout, where="").get("chosen"), where="")
        except BadRow:
            continue
        return "texts" if isinstance(found, str) else "messages"
    return "pairs"


def _unknown(
    names: Sequence[str], source: str, *, because: str, ours: Sequence[str] = ("prompt", "chosen", "rejected")
) -> UserError:
    has = f"the columns are {listed(names, most=20)}" if names else "the rows have no columns"
    spelled = {
        name: column for name in ours if name not in names and (column := other_spelling(name, names)) is not None
    }
    if spelled:
        because = f"{listed(list(spelled.values()))} {'differs' if len(spelled) == 1 else 'differ'} in case or spaces"
    named = spelled or dict.fromkeys(ours, "COLUMN")
    options = " ".join(f"--column {shlex.quote(f'{name}={column}')}" for name, column in named.items())
    columns = ", ".join(f"{name}: {json.dumps(column) if spelled else column}" for name, column in named.items())
    return UserError(
        f"{has}, in no form that is recognised: {because}",
        where=source,
        fix=f"Say which are which with `{options}`; in a recipe's data source that is `columns: {{{columns}}}`. Rows with two "
        "responses and a winner must be written with the better one as `chosen`",
    )
