"""Preference pairs in every form that TRL accepts, validated row by row (docs/method.md#preference-pairs)."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ctpd.core.errors import UserError, listed, nearest, shortened

DROP_REASONS = (
    *("empty", "equal", "special_token_text", "long_prompt"),
    *("null_content", "roles", "different_prompts", "unread_field", "malformed", "template"),
)
"""Why a pair is left out (docs/method.md#dropped-pairs)."""

Marks = tuple[tuple[int, int, bool], ...]

_FORMS = (
    "A row holds prompt, chosen and rejected as strings or as lists of messages; "
    "the prompt may be part of chosen and rejected"
)
_ROLES = ("system", "user", "assistant")
_UNREAD = ("reasoning_content", "reasoning", "thinking")  # of a message: they would be lost


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


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
    """

    rows: Iterable[Pair | Dropped]
    source: str = ""
    place: Place | None = None

    @property
    def pairs(self) -> Iterator[Pair]:
        """The pairs among the rows."""
        return (row for row in self.rows if isinstance(row, Pair))


class BadRow(UserError):
    """A row that is no pair.

    Attributes:
        reason: one of `DROP_REASONS`.
    """

    def __init__(self, what: str, *, where: str, fix: str, reason: str = "malformed") -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason


def usable_rows(
    rows: Iterable[Mapping[str, object]], *, source: str, place: Place | None = None
) -> Iterator[Pair | Dropped]:
    """Parse rows one by one as `parse_pairs` does; a row that is no pair is dropped with its reason.

    Args:
        rows: the rows in order.
        source: names the file or data set.
        place: of a source of several files, the file of a row and its number in it.

    Raises:
        UserError: at the end, if no row is a pair; the error is the first row's.
    """
    first, has_pairs = None, False
    for number, row in enumerate(rows):
        where = _where(source, number, place)
        try:
            pair = _parse_row(row, id=str(number), where=where)
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


def parse_pairs(rows: Iterable[Mapping[str, object]], *, source: str, place: Place | None = None) -> list[Pair]:
    """Parse rows of preference data.

    A row holds ``prompt``, ``chosen`` and ``rejected``, each a string or a list of messages ``{"role", "content"}``.
    Without a prompt, or with a prompt string beside whole conversations, the prompt is what chosen and rejected begin
    with in common (as TRL extracts it). The last assistant message is the response; responses are stripped. Empty and
    equal responses are kept here: `prepare_pairs` drops and counts them. A column ``system`` is the system message of the
    prompt. Other columns (scores, ids) are ignored.
    Optional columns ``chosen_marks`` and ``rejected_marks`` hold lists of ``[start, end, right]`` over the response.

    Args:
        rows: the rows in order; a pair's id is its row's number, counted from 0.
        source: names the file or data set in errors.
        place: of a source of several files, the file of a row and its number in it.

    Raises:
        UserError: a missing column, a wrong type, tools, roles in an order that gives no pair; the error names source,
        row and column.
    """
    return [_parse_row(row, id=str(i), where=_where(source, i, place)) for i, row in enumerate(rows)]


def _parse_row(row: Mapping[str, object], *, id: str, where: str) -> Pair:
    if not isinstance(row, Mapping):
        raise BadRow(f"the row is {_kind(row)}, not an object with columns", where=where, fix=_FORMS)
    for column in ("tools", "chat_template_kwargs"):
        if _is_filled(row.get(column)):
            raise BadRow(
                f"the row has {column}, which this program does not render",
                where=f"{where}, column '{column}'",
                fix="Remove such rows; variables of a template are fixed in the recipe",
                reason="unread_field",
            )
    chosen, rejected = (_conversation(row, column, where=where) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one of chosen and rejected is a string, the other a list of messages", where=where, fix=_FORMS)
    prompt = _conversation(row, "prompt", where=where) if row.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, responses = _from_strings(prompt, chosen, rejected, where=where)
    else:
        assert isinstance(chosen, tuple)
        assert isinstance(rejected, tuple)
        turns, responses = _from_messages(prompt, chosen, rejected, where=where)
    turns = _with_system(row, turns, where=where)
    if not turns or turns[-1].role != "user":
        what = "chosen and rejected share no prompt"
        if turns:
            what = f"the message before the response is the {turns[-1].role}'s"
        raise BadRow(what, where=where, fix="A prompt must end with a user's message. " + _FORMS, reason="roles")
    marks = [
        _marks(row, column, response, where=where)
        for column, response in zip(("chosen_marks", "rejected_marks"), responses, strict=True)
    ]
    return Pair(id, turns, responses[0].strip(), responses[1].strip(), marks[0], marks[1])


def _with_system(row: Mapping[str, object], turns: tuple[Message, ...], *, where: str) -> tuple[Message, ...]:
    """The prompt with the text of a column `system` as its first message."""
    value = row.get("system")
    if _is_null(value) or value == "":
        return turns
    where = f"{where}, column 'system'"
    if not isinstance(value, str):
        raise BadRow(f"expected a string, found {_kind(value)}", where=where, fix="Give the text of a system message")
    system = Message("system", _valid_text(value, where=where))
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
    prompt: str | tuple[Message, ...] | None, chosen: str, rejected: str, *, where: str
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    if isinstance(prompt, tuple):
        return prompt, (chosen, rejected)
    if prompt is None:
        cut = _common_prefix(chosen, rejected)
        if cut and chosen[cut - 1 : cut] == " ":  # TRL: the space before the first difference belongs to the responses
            cut -= 1
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    if not prompt.strip():
        raise BadRow("the prompt is empty", where=f"{where}, column 'prompt'", fix=_FORMS)
    return (Message("user", prompt),), (chosen, rejected)


def _from_messages(
    prompt: str | tuple[Message, ...] | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...], *, where: str
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise BadRow(
                "the conversation does not end with an assistant's message",
                where=f"{where}, column '{column}'",
                fix=_FORMS,
                reason="roles",
            )
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise BadRow(
            "chosen and rejected differ before their last message, so they answer different prompts",
            where=where,
            fix="Cut both conversations after the first answer in which they differ",
            reason="different_prompts",
        )
    if isinstance(prompt, tuple):
        before = before if prompt and before[: len(prompt)] == prompt else prompt + before
    elif prompt is not None and not before:
        before = (Message("user", prompt),)
    return before, (chosen[-1].content, rejected[-1].content)


def _conversation(row: Mapping[str, object], column: str, *, where: str) -> str | tuple[Message, ...]:
    where_column = f"{where}, column '{column}'"
    if column not in row:
        raise _missing(row, column, where=where)
    value = row[column]
    if isinstance(value, str):
        return _valid_text(value, where=where_column)
    if isinstance(value, np.ndarray):  # pandas reads lists from parquet as arrays
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise BadRow(
            f"expected a string or a list of messages, found {_kind(value)}",
            where=where_column,
            fix=_FORMS,
            reason="null_content" if _is_null(value) else "malformed",
        )
    return tuple(_message(item, where=f"{where_column}, message {i}") for i, item in enumerate(value))


def _missing(row: Mapping[str, object], column: str, *, where: str) -> BadRow:
    names = [str(name) for name in row]
    if "completion" in names and "chosen" not in names and "rejected" not in names:
        return BadRow(
            "the data are not pairs: a row has one completion" + (" and a label" if "label" in names else ""),
            where=where,
            fix="Preference training needs two responses to one prompt in each row. Join a good and a bad completion of "
            "the same prompt as `chosen` and `rejected`; a prompt that has only one cannot be used",
        )
    if not names:
        return BadRow(f"the column '{column}' is missing; the row has no columns", where=where, fix=_FORMS)
    found = f"the column '{column}' is missing; the row has {listed(names, to=column)}.{nearest(column, names)}"
    return BadRow(found, where=where, fix=_FORMS)


def _message(item: object, *, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"expected an object with role and content, found {_kind(item)}", where=where, fix=_FORMS)
    role, content = item.get("role"), item.get("content")
    if _is_filled(item.get("tool_calls")) or role in ("tool", "function"):
        raise BadRow(
            "the message uses a tool, which this program does not render",
            where=where,
            fix="Remove such rows",
            reason="unread_field",
        )
    for name in _UNREAD:
        if _is_filled(item.get(name)):
            raise BadRow(
                f"the message has `{name}` beside its content, which this program does not render",
                where=where,
                fix="Write the reasoning into the content as the model does, such as <think>...</think> before the answer",
                reason="unread_field",
            )
    if not isinstance(role, str) or role not in _ROLES:
        hint = nearest(role, _ROLES) if isinstance(role, str) else ""
        raise BadRow(f"unknown role {shortened(repr(role))}.{hint}", where=where, fix=f"Roles are {', '.join(_ROLES)}")
    if not isinstance(content, str):
        reason = "null_content" if _is_null(content) else "malformed"
        raise BadRow(f"the content is {_kind(content)}, not a string", where=where, fix="Give text only", reason=reason)
    return Message(role, _valid_text(content, where=where))


def _marks(row: Mapping[str, object], column: str, response: str, *, where: str) -> Marks:
    value = row.get(column)
    if value is None:
        return ()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    where = f"{where}, column '{column}'"
    fix = "Marks are [start, end, right]: two character positions of the response, and true or false"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"expected a list of marks, found {_kind(value)}", where=where, fix=fix)
    shift, length = len(response) - len(response.lstrip()), len(response.strip())
    marks = []
    for mark in value:
        match list(mark) if isinstance(mark, Sequence | np.ndarray) and not isinstance(mark, str) else None:
            case [int(start), int(end), bool(right)] if 0 <= start < end <= len(response):
                marks.append((max(start - shift, 0), min(end - shift, length), right))
            case _:
                raise BadRow(
                    f"{shortened(repr(mark))} is no mark on a response of {len(response)} characters",
                    where=where,
                    fix=fix,
                )
    return tuple((start, end, right) for start, end, right in marks if start < end)


def _valid_text(text: str, *, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"character {error.start} of the text is half of a surrogate pair, which no tokenizer reads",
            where=where,
            fix="Write the file again as valid UTF-8",
        ) from None
    return text


def _common_prefix(left: str, right: str) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def _is_filled(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.size > 0
    if isinstance(value, str):  # some data sets store tools as JSON text
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and value is not False and not (isinstance(value, Sequence | Mapping) and not value)


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and bool(np.isnan(value)))


def _kind(value: object) -> str:
    if _is_null(value):
        return "nothing (null)"
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, TypeError, ValueError):  # nested deeply, or keys that JSON has not
        return type(value).__name__
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
