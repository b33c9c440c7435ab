"""Columns that are known to hold a part of the conversation, and that a recipe does not read (docs/data.md#columns)."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ctpd.core.errors import UserError
from ctpd.text.config import Layout
from ctpd.text.layouts import PLAIN
from ctpd.text.pairs import Pair, usable_rows
from ctpd.text.values import BadRow, is_filled

_SYSTEMS = ("system_prompt", "system_message")
_PROMPTS = ("question", "instruction", "query", "context")
_REASONING = re.compile(r"(?:(?:chosen|rejected)_)?(?:reasoning_content|reasoning|thinking)(?:_(?:chosen|rejected))?")


def refuse_unread(
    rows: Sequence[Mapping[str, object]], *, source: str, layout: Layout = PLAIN, ignored: Sequence[str] = ()
) -> None:
    """Refuse a source whose first rows fill a column that belongs to the conversation and is not read.

    A column whose text stands in the pair all the same, as a prompt that the responses repeat, is none.

    Args:
        rows: the first rows.
        source: names the file in errors.
        layout: how the rows hold pairs.
        ignored: the columns that the recipe leaves out on purpose.

    Raises:
        UserError: there is such a column.
    """
    given = {} if layout.columns is None else layout.columns.given
    known = dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row)
    names = [name for name in known if name not in (*given.values(), *ignored) and _fix(name, given) is not None]
    if not names:
        return
    with suppress(BadRow):  # no row is a pair, which is said when they are read
        for number, (row, pair) in enumerate(zip(rows, usable_rows(rows, source=source, layout=layout), strict=False)):
            for name in names:
                if isinstance(pair, Pair) and is_filled(row.get(name)) and not _holds(pair, row[name]):
                    raise UserError(
                        f"the column '{name}' is filled in row {number} and is not read",
                        where=source,
                        fix=f"{_fix(name, given)}; `ignore: [{name}]` in the recipe's data source leaves it out",
                    )


def _fix(name: str, given: Mapping[str, str]) -> str | None:
    """What to do about a column that belongs to the conversation; None for others."""
    more = "..., " if given else ""
    if name in _SYSTEMS and "system" in given:
        return "One column can be the system message; write both texts into it"
    if name in _SYSTEMS:
        return f"Say `columns: {{{more}system: {name}}}` in the recipe's data source, and it is the system message"
    if name == "input":
        return f"Say `columns: {{{more}input: input}}` in the recipe's data source, and it follows the prompt"
    if name == "history":
        return "Write the turns as messages, and name their column as the prompt"
    if name in _PROMPTS:
        return (
            f"If it is the prompt, say `columns: {{prompt: {name}}}`; if it is a part of it, write both into one text"
        )
    if _REASONING.fullmatch(name):
        return "Write the reasoning into the responses as the model does, such as <think>...</think> before the answer"
    return None


def _holds(pair: Pair, value: object) -> bool:
    """Whether a pair has the text of a cell."""
    texts = (*(message.content for message in pair.prompt), pair.chosen, pair.rejected)
    return isinstance(value, str) and any(value.strip() in text for text in texts)
