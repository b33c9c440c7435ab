"""The cells of a row under our names, whatever its columns are called and whether texts are transcripts (docs/data.md)."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ctpd.core.errors import UserError, listed, nearest
from ctpd.text.config import Layout
from ctpd.text.json_messages import decoded, is_read_as_text
from ctpd.text.messages import (
    FORMS,
    conversation,
    holds_new_messages,
    is_other_transcript,
    is_transcript,
    transcript,
    whole_prompt,
)
from ctpd.text.values import BadRow, WrongColumns, WrongForm, as_list, is_filled, is_null, kind

READING = 3
"""The version of how rows are read that hold more than prompt, chosen and rejected; in the keys of pairs of such rows."""
FIRST_ROWS = 100
"""Rows that show what a source holds."""
PLAIN = Layout()
PROMPTS = ("question", "instruction", "query", "input", "conversations", "conversation", "messages")
"""Columns that hold the prompt in known data sets without a column `prompt`."""
UNRENDERED = ("tools", "chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio")
"""Columns that change what a model reads, and that this program does not render."""
_RESPONSES = ("chosen", "rejected")
_REQUIRED = ("prompt", "chosen", "rejected", "responses")
_NAMING = "Name them in the recipe, such as `columns: {prompt: question}`; `ctpd init --data FILE` does"


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of one row.

    Attributes:
        row: by our names; other columns are in it too.
        where: names the row in errors.
        names: our name -> the data's, where it is another.
    """

    row: Mapping[str, object]
    where: str
    names: Mapping[str, str] = field(default_factory=dict)

    def at(self, column: str) -> str:
        """The row and the column under the data's name, for errors."""
        return f"{self.where}, column '{self.names.get(column, column)}'"

    def get(self, column: str) -> object:
        """A cell, or None."""
        return self.row.get(column)


def cells(row: Mapping[str, object], layout: Layout, *, where: str) -> Cells:
    """The cells of a row as a layout names them; `conversations` is the prompt where nothing else is.

    Raises:
        WrongColumns: a column that the layout names is missing.
        BadRow: a part of the prompt that would be lost, responses that are not two, texts that are no transcripts, or
            begin like messages and are none.
    """
    found = Cells(row, where)
    if layout.columns is not None:
        found = _renamed(found, layout.columns.given)
    if layout.form != "text":
        found = _decoded(found)
    if is_null(found.get("prompt")) and is_filled(found.get("conversations")) and _are_single(found):
        named = {**found.names, "prompt": "conversations"}
        found = Cells({**found.row, "prompt": found.row["conversations"]}, where, named)
    return _with_turns(found) if layout.form == "transcript" else found


def missing(found: Cells, column: str) -> WrongColumns:
    """The error of a row without one of our columns."""
    names = [str(name) for name in found.row]
    if "completion" in names and not {"chosen", "rejected"} & set(names):
        return WrongColumns(
            "the data are not pairs: a row has one completion" + (" and a label" if "label" in names else ""),
            where=found.where,
            fix="Preference training needs two responses to one prompt in each row. Join a good and a bad completion of "
            "the same prompt as `chosen` and `rejected`; a prompt that has only one cannot be used",
        )
    if not names:
        return WrongColumns(f"the column '{column}' is missing; the row has no columns", where=found.where, fix=FORMS)
    what = f"the column '{column}' is missing; the row has {listed(names, to=column)}.{nearest(column, names)}"
    return WrongColumns(what, where=found.where, fix=f"{FORMS}. {_NAMING} for columns with other names")


def refuse_other_prompt(found: Cells, shared: str) -> None:
    """Refuse a row whose prompt is in a column that is not read.

    Args:
        found: the row, which has no prompt of its own.
        shared: the text that chosen and rejected begin with.

    Raises:
        WrongColumns: a column that is known to hold prompts is filled with another text.
    """
    other = other_spelling("prompt", [str(name) for name in found.row])
    for name in (*PROMPTS, *([] if other is None else [other])):
        value = found.get(name)
        text = value.strip() if isinstance(value, str) else ""
        if is_filled(value) and not (text and text in shared):
            raise WrongColumns(
                f"the row has no column 'prompt', and its column '{name}' is not read",
                where=found.where,
                fix=f"If it is the prompt, say `columns: {{prompt: {name if name.strip() == name else json.dumps(name)}}}` in the recipe's data source",
            )


def other_spelling(name: str, names: Sequence[str]) -> str | None:
    """The column that is ``name`` but for case and white space at its ends, such as `Prompt`; None if there is none."""
    return next((other for other in names if other != name and other.strip().lower() == name), None)


def refuse_transcripts(rows: Sequence[Mapping[str, object]], layout: Layout, *, source: str) -> None:
    """Refuse a source whose first rows are transcripts, of which the recipe says nothing: their turns would be lost.

    Raises:
        UserError: half of the rows or more are transcripts, and the layout has no `form`.
    """
    if layout.form is not None:
        return
    for is_one, fix in (
        (is_transcript, "Say `form: transcript` in the recipe's data source, and their turns become messages"),
        (
            is_other_transcript,
            "Write them as messages, or each turn behind an empty line with 'Human:' or 'Assistant:'",
        ),
    ):
        if looks_like_transcripts(rows, layout, is_one):
            raise UserError(
                "the texts are transcripts of conversations ('Human:', 'Assistant:'), which would be read as one text each",
                where=source,
                fix=f"{fix}; `form: text` if one text is meant",
            )


def looks_like_transcripts(
    rows: Sequence[Mapping[str, object]], layout: Layout, is_one: Callable[[str], bool] = is_transcript
) -> bool:
    """Whether half of the rows or more are transcripts; others among them do not hide these."""
    found = sum(_looks_like_transcript(row, layout, is_one) for row in rows)
    return bool(rows) and 2 * found >= len(rows)


def refuse_absent(rows: Sequence[Mapping[str, object]], layout: Layout, *, source: str) -> None:
    """Refuse a source of whose first rows none has a column that the layout names and a row may lack.

    Raises:
        UserError: there is such a column.
    """
    given = {} if layout.columns is None else layout.columns.given
    names = [str(name) for row in rows if isinstance(row, Mapping) for name in row]
    for ours, column in given.items():
        if rows and ours not in _REQUIRED and column not in names:
            raise UserError(
                f"none of the first {len(rows)} rows has the column '{column}', which `columns` names as `{ours}`."
                f"{nearest(column, dict.fromkeys(names))}",
                where=source,
                fix="Correct `columns` in the recipe's data source; where a row has none, its value is null",
            )


def has_prompts(rows: Sequence[Mapping[str, object]], layout: Layout) -> bool:
    """Whether the first rows of a source have a column of prompts: one of them is filled."""
    given = {} if layout.columns is None else layout.columns.given
    return any(is_filled(row.get(given.get("prompt", "prompt"))) for row in rows if isinstance(row, Mapping))


def reading(rows: Sequence[Mapping[str, object]], layout: Layout) -> int | None:
    """The version of the reading that is the first to read these rows as they are read now; None for the first version."""
    has = has_prompts(rows, layout)
    if any(_is_new(row, layout, has_prompts=has) for row in rows):
        return READING
    return 2 if any(holds_more(row) for row in rows) else None


def _is_new(row: Mapping[str, object], layout: Layout, *, has_prompts: bool) -> bool:
    """Whether `READING` 3 reads a row otherwise than 2 did."""
    given = {} if layout.columns is None else layout.columns.given
    cells = [row.get(given.get(name, name)) for name in ("prompt", *_RESPONSES)]
    if layout.form != "text" and not all(map(is_read_as_text, cells)):
        return True
    prompt, *responses = cells
    knows_prompts = has_prompts or given.get("prompt", "prompt") in row
    if all(isinstance(text, str) for text in responses):
        return prompt is None and knows_prompts
    try:
        one, other = (conversation(value, where="") for value in (prompt, responses[0]))
    except BadRow:
        return False
    if isinstance(one, str) or isinstance(other, str):
        return False
    before = other[:-1]
    return whole_prompt(one, before) != (before if one and before[: len(one)] == one else one + before)


def holds_more(row: Mapping[str, object]) -> bool:
    """Whether a row holds what a version before `READING` 2 ignored or refused."""
    if any(is_filled(row.get(name)) for name in ("system", *UNRENDERED)):
        return True
    if is_null(row.get("prompt")) and any(is_filled(row.get(name)) for name in PROMPTS):
        return True
    return any(holds_new_messages(row.get(name)) for name in ("prompt", *_RESPONSES))


def _decoded(found: Cells) -> Cells:
    """The row with the messages that its cells hold as JSON text."""
    read = {
        column: decoded(value, where=found.at(column))
        for column in ("prompt", "conversations", *_RESPONSES)
        if isinstance(value := found.get(column), str)
    }
    return Cells({**found.row, **read}, found.where, found.names) if read else found


def _renamed(found: Cells, given: Mapping[str, str]) -> Cells:
    row = {name: value for name, value in found.row.items() if name not in given}
    for ours, column in given.items():
        if column in found.row:
            row[ours] = found.row[column]
        elif ours in _REQUIRED:
            names = [str(name) for name in found.row]
            raise WrongColumns(
                f"the column '{column}', which `columns` names as `{ours}`, is missing; the row has "
                f"{listed(names, to=column) or 'no columns'}.{nearest(column, names)}",
                where=found.where,
                fix="Correct `columns` in the recipe's data source",
            )
    named = Cells(row, found.where, given)
    if "responses" in given:
        row.update(zip(_RESPONSES, _two(named), strict=True))
        named = Cells(row, found.where, {**given, **dict.fromkeys(_RESPONSES, given["responses"])})
    _refuse_lost(found, given)
    if is_filled(named.get("input")) and "input" in given:
        row["prompt"] = _joined(named)
    return named


def _two(found: Cells) -> list[object]:
    value = as_list(found.get("responses"))
    if isinstance(value, str):  # a list in a cell of a CSV file
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list | tuple) or len(value) != 2:
        error = WrongForm if isinstance(value, str) else BadRow
        raise error(
            f"expected a list of two responses, the better one first, found {kind(value)}",
            where=found.at("responses"),
            fix="Write the list with json.dumps" if isinstance(value, str) else "Such rows are dropped",
            reason="null_content" if is_null(value) else "malformed",
        )
    return list(value)


def _joined(found: Cells) -> str:
    prompt, more = found.get("prompt"), found.get("input")
    if not isinstance(prompt, str) or not isinstance(more, str):
        raise BadRow(
            f"expected texts, found {kind(prompt if isinstance(more, str) else more)}",
            where=found.at("prompt" if isinstance(more, str) else "input"),
            fix="`input` goes behind a prompt that is a text",
        )
    return f"{prompt}\n{more}"


def _refuse_lost(found: Cells, given: Mapping[str, str]) -> None:
    """Refuse a row in Alpaca's form of which a part of the prompt is not read."""
    if given.get("prompt") != "instruction":
        return
    for name, fix in (
        ("input", "Say `columns: {..., input: input}` in the recipe's data source, and it follows the instruction"),
        ("history", "Write the turns as messages, and name their column as the prompt"),
    ):
        if name not in given.values() and is_filled(found.get(name)):
            raise BadRow(
                f"the row has a filled `{name}` beside its instruction, which is not read",
                where=found.where,
                fix=fix,
                reason="unread_field",
            )


def _are_single(found: Cells) -> bool:
    """Whether both responses are texts or single messages, and hold no prompt."""
    values = [as_list(found.get(column)) for column in _RESPONSES]
    return all(isinstance(value, str | Mapping) or (isinstance(value, list) and len(value) == 1) for value in values)


def _with_turns(found: Cells) -> Cells:
    """The row with its transcripts as messages. A prompt may end with a turn that waits for the response."""
    read: dict[str, object] = {}
    for column in ("prompt", *_RESPONSES):
        value = found.get(column)
        turns = None
        if isinstance(value, str) and not is_other_transcript(value):
            turns = transcript(value, where=found.at(column))
        if turns is not None and column == "prompt" and turns[-1] == ("assistant", ""):
            turns = turns[:-1]
        if turns is not None:
            read[column] = [turn._asdict() for turn in turns]
    if not read and all(isinstance(found.get(column), str) for column in _RESPONSES):
        raise WrongForm(
            "the text is no transcript: it does not begin with 'Human:' or 'Assistant:'",
            where=found.at("chosen"),
            fix="`form: transcript` is for texts with a turn after each empty line, such as 'Human: Why?'",
        )
    return Cells({**found.row, **read}, found.where, found.names)


def _looks_like_transcript(row: object, layout: Layout, is_one: Callable[[str], bool]) -> bool:
    if not isinstance(row, Mapping):
        return False
    names = {} if layout.columns is None else layout.columns.given
    prompt, *texts = (row.get(names.get(name, name)) for name in ("prompt", *_RESPONSES))
    if "responses" in names:
        both = as_list(row.get(names["responses"]))
        texts = list(both) if isinstance(both, list | tuple) else []
    if isinstance(prompt, str) and is_one(prompt):
        return prompt.rstrip().lower().endswith("assistant:")
    return bool(texts) and all(isinstance(text, str) and is_one(text) for text in texts)


def begins_transcript(text: str) -> bool:
    """Whether a text begins as a transcript's first turn does."""
    return text.lstrip().startswith(("Human:", "System:", "Assistant:"))
