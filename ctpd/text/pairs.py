"""Preference pairs in every form that TRL accepts, validated row by row (docs/method.md#preference-pairs)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

from ctpd.core.errors import shortened
from ctpd.text.config import Layout
from ctpd.text.layouts import (
    FIRST_ROWS,
    PLAIN,
    UNRENDERED,
    Cells,
    cells,
    has_prompts,
    missing,
    refuse_absent,
    refuse_other_prompt,
    refuse_transcripts,
)
from ctpd.text.messages import FORMS, conversation, whole_prompt
from ctpd.text.messages import Message as Message
from ctpd.text.values import BadRow, WrongColumns, WrongForm, as_list, is_filled, is_null, kind, valid_text

DROP_REASONS = (
    *("empty", "equal", "special_token_text", "long_prompt"),
    *("null_content", "roles", "different_prompts", "unread_field", "malformed", "template", "lost_text"),
)
"""Why a pair is left out (docs/method.md#dropped-pairs)."""

Marks = tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two responses to it.

    Marks are character ranges ``(start, end, right)`` of a response, half open; the testbed marks which of its answers
    are right.
    """

    id: str
    prompt: tuple[Message, ...]  # ends with a user's message
    chosen: str  # stripped
    rejected: str  # stripped
    chosen_marks: Marks = ()
    rejected_marks: Marks = ()

    @property
    def num_characters(self) -> int:
        """Characters of the prompt and of both responses."""
        return len(self.chosen) + len(self.rejected) + sum(len(message.content) for message in self.prompt)

    def cut(self, num_chosen: int, num_rejected: int) -> "Pair":
        """The pair with only the first characters of its responses; a cut response may end with white space."""
        return replace(self, chosen=self.chosen[:num_chosen], rejected=self.rejected[:num_rejected])


class Dropped(NamedTuple):
    """A row of the data that is left out.

    Attributes:
        row: its number, counted from 0; a pair's `id`.
        reason: one of `DROP_REASONS`.
        detail: a sentence, where the reason does not say all.
    """

    row: str
    reason: str
    detail: str = ""


Place = Callable[[int], tuple[str, int]]
"""Of a source of several files: for a row that has been read, counted over all of them, its file and its number there."""


class ReadPairs(NamedTuple):
    """The rows of a source in their order, pairs and rows that are none, and the source's name.

    Rows that come from a file are read as they are gone through, and can be gone through once.

    Attributes:
        place: of a source of several files, the file of a row that has been read and its number there; None for others.
        keeps_equal: whether pairs of two equal responses are used.
    """

    rows: Iterable[Pair | Dropped]
    source: str = ""
    place: Place | None = None
    keeps_equal: bool = False

    @property
    def pairs(self) -> Iterator[Pair]:
        """The pairs among the rows."""
        return (row for row in self.rows if isinstance(row, Pair))


def usable_rows(
    rows: Iterable[Mapping[str, object]], *, source: str, layout: Layout = PLAIN, place: Place | None = None
) -> Iterator[Pair | Dropped]:
    """Parse rows one by one as `parse_pairs` does; a row that is no pair is dropped with its reason.

    Args:
        rows: the rows in order.
        source: names the file or data set.
        place: of a source of several files, the file of a row and its number in it.

    Raises:
        UserError: at the end, if no row is a pair; the error is the first row's. Before the first row, if the first rows
            are transcripts and the layout does not say what of them, or none has a column that the layout names.
    """
    first, has_pairs = None, False
    for number, row in enumerate(_checked(rows, layout, source)):
        where = _where(source, number, place)
        try:
            pair = _parse_row(row, id=str(number), where=where, layout=layout)
        except BadRow as error:
            first = first or error
            inside = (error.where or "").removeprefix("" if place else where).removeprefix(", ")
            yield Dropped(str(number), error.reason, f"{inside}: {error.what}" if inside else error.what)
        else:
            has_pairs = True
            yield pair
    if first is not None and not has_pairs:
        raise first


def _where(source: str, number: int, place: Place | None) -> str:
    file, row = (source, number) if place is None else place(number)
    return f"{file}, row {row}"


def parse_pairs(
    rows: Iterable[Mapping[str, object]], *, source: str, layout: Layout = PLAIN, place: Place | None = None
) -> list[Pair]:
    """Parse rows of preference data.

    A row holds ``prompt``, ``chosen`` and ``rejected``, each a string or a list of messages ``{"role", "content"}`` or
    ``{"from", "value"}``; one message may stand without a list.
    Without a column of prompts, or with a prompt string beside whole conversations, the prompt is what chosen and rejected
    begin with in common (as TRL extracts it); texts whose prompt is null, or missing where other rows have one, are no
    pair. The last assistant message is the response; responses are stripped. Empty and equal responses are kept here:
    `prepare_pairs` drops and counts them. A column ``system`` is the system message of the prompt. Other columns (scores,
    ids) are ignored.
    Optional columns ``chosen_marks`` and ``rejected_marks`` hold lists of ``[start, end, right]`` over the response.

    Args:
        rows: the rows in order; a pair's id is its row's number, counted from 0.
        source: names the file or data set in errors.
        layout: names of the columns, and what texts are.
        place: of a source of several files, the file of a row and its number in it.

    Raises:
        UserError: a missing column, a wrong type, tools, roles in an order that gives no pair; the error names source,
        row and column.
    """
    return [
        _parse_row(row, id=str(i), where=_where(source, i, place), layout=layout)
        for i, row in enumerate(_checked(rows, layout, source))
    ]


def check_columns(rows: Sequence[Mapping[str, object]], *, source: str, layout: Layout = PLAIN) -> None:
    """Check that the first rows of a source have the columns and the form that are read.

    Raises:
        UserError: none is a pair, and one has other columns or another form; or they are transcripts, and the layout does not
            say what of them.
    """
    refuse_transcripts(rows, layout, source=source)
    refuse_absent(rows, layout, source=source)
    first = None
    for number, row in enumerate(rows):
        try:
            _parse_row(row, id=str(number), where=f"{source}, row {number}", layout=layout)
        except WrongForm as error:
            first = first or error
        except BadRow:
            continue
        else:
            return
    if first is not None:
        raise first


def _checked(rows: Iterable[Mapping[str, object]], layout: Layout, source: str) -> Iterator[Mapping[str, object]]:
    """The rows, after a look at the first of them; where these have prompts, the prompt of a row without one is null."""
    rest = iter(rows)
    head = list(islice(rest, FIRST_ROWS))
    refuse_transcripts(head, layout, source=source)
    refuse_absent(head, layout, source=source)
    if not has_prompts(head, layout):
        yield from chain(head, rest)
        return
    for row in chain(head, rest):
        yield {"prompt": None, **row} if isinstance(row, Mapping) and row else row


def _parse_row(row: Mapping[str, object], *, id: str, where: str, layout: Layout) -> Pair:
    if not isinstance(row, Mapping):
        raise BadRow(f"the row is {kind(row)}, not an object with columns", where=where, fix=FORMS)
    for column in UNRENDERED:
        if is_filled(row.get(column)):
            raise BadRow(
                f"the row has {column}, which this program does not render",
                where=f"{where}, column '{column}'",
                fix="Remove such rows; variables of a template are fixed in the recipe",
                reason="unread_field",
            )
    found = cells(row, layout, where=where)
    chosen, rejected = (_conversation(found, column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one of chosen and rejected is a string, the other a list of messages", where=where, fix=FORMS)
    prompt = None if is_null(found.get("prompt")) else _conversation(found, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, responses = _from_strings(prompt, chosen, rejected, found)
    else:
        assert isinstance(chosen, tuple)
        assert isinstance(rejected, tuple)
        turns, responses = _from_messages(prompt, chosen, rejected, found)
    turns = _with_system(found, turns)
    if not turns or turns[-1].role != "user":
        what = "chosen and rejected share no prompt"
        if turns:
            what = f"the message before the response is the {turns[-1].role}'s"
        raise BadRow(what, where=where, fix="A prompt must end with a user's message. " + FORMS, reason="roles")
    marks = [
        _marks(row, column, response, where=where)
        for column, response in zip(("chosen_marks", "rejected_marks"), responses, strict=True)
    ]
    return Pair(id, turns, responses[0].strip(), responses[1].strip(), marks[0], marks[1])


def _with_system(found: Cells, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt with the text of a column `system` as its first message."""
    value = found.get("system")
    if is_null(value) or value == "":
        return turns
    where = found.at("system")
    if not isinstance(value, str):
        raise BadRow(f"expected a string, found {kind(value)}", where=where, fix="Give the text of a system message")
    system = Message("system", valid_text(value, where=where))
    if not any(message.role == "system" for message in turns):
        return (system, *turns)
    if system not in turns:
        raise BadRow(
            "the text is another than that of the prompt's system message",
            where=where,
            fix="Keep one of the two",
            reason="unread_field",
        )
    return turns


def _from_strings(
    prompt: str | tuple[Message, ...] | None, chosen: str, rejected: str, found: Cells
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    if isinstance(prompt, tuple):
        return prompt, (chosen, rejected)
    if prompt is None:
        cut = _common_prefix(chosen, rejected)
        if cut and chosen[cut - 1 : cut] == " ":  # TRL: the space before the first difference belongs to the responses
            cut -= 1
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        refuse_other_prompt(found, prompt)
        if "prompt" in found.row:
            raise WrongForm(
                "the prompt is null, and what two texts begin with in common is none where the data have a column of it",
                where=found.at("prompt"),
                fix="Fill it; if all texts begin with their prompts, remove the column",
                reason="null_content",
            )
        if not prompt.strip():
            raise WrongColumns("the prompt is empty: chosen and rejected share none", where=found.where, fix=FORMS)
    if not prompt.strip():
        raise BadRow("the prompt is empty", where=found.at("prompt"), fix=FORMS)
    return (Message("user", prompt),), (chosen, rejected)


def _from_messages(
    prompt: str | tuple[Message, ...] | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...], found: Cells
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise BadRow(
                "the conversation does not end with an assistant's message",
                where=found.at(column),
                fix=FORMS,
                reason="roles",
            )
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise BadRow(
            "chosen and rejected differ before their last message, so they answer different prompts",
            where=found.where,
            fix="Cut both conversations after the first answer in which they differ",
            reason="different_prompts",
        )
    if isinstance(prompt, tuple):
        joined = whole_prompt(prompt, before)
        if joined is None:
            raise BadRow(
                "the prompt is another than the one that chosen and rejected begin with",
                where=found.at("prompt"),
                fix="Keep one of the two",
                reason="different_prompts",
            )
        before = joined
    elif prompt is not None and not before:
        before = (Message("user", prompt),)
    elif not before:
        refuse_other_prompt(found, "")
    return before, (chosen[-1].content, rejected[-1].content)


def _conversation(found: Cells, column: str) -> str | tuple[Message, ...]:
    if column not in found.row:
        raise missing(found, column)
    return conversation(found.row[column], where=found.at(column))


def _marks(row: Mapping[str, object], column: str, response: str, *, where: str) -> Marks:
    value = as_list(row.get(column))
    if value is None:
        return ()
    where = f"{where}, column '{column}'"
    fix = "Marks are [start, end, right]: two character positions of the response, and true or false"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"expected a list of marks, found {kind(value)}", where=where, fix=fix)
    shift, length = len(response) - len(response.lstrip()), len(response.strip())
    marks = []
    for mark in value:
        match as_list(mark) if not isinstance(mark, str) else None:
            case [int(start), int(end), bool(right)] if 0 <= start < end <= len(response):
                marks.append((max(start - shift, 0), min(end - shift, length), right))
            case _:
                raise BadRow(
                    f"{shortened(repr(mark))} is no mark on a response of {len(response)} characters",
                    where=where,
                    fix=fix,
                )
    return tuple((start, end, right) for start, end, right in marks if start < end)


def _common_prefix(left: str, right: str) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
