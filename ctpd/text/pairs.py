"""Preference pairs in every form that TRL accepts, validated row by row (docs/method.md#preference-pairs)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ctpd.core.errors import UserError, listed, nearest, shortened

Marks = tuple[tuple[int, int, bool], ...]

_FORMS = (
    "A row holds prompt, chosen and rejected as strings or as lists of messages; "
    "the prompt may be part of chosen and rejected"
)
_ROLES = ("system", "user", "assistant")


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


def parse_pairs(rows: Iterable[Mapping[str, object]], *, source: str) -> list[Pair]:
    """Parse rows of preference data.

    A row holds ``prompt``, ``chosen`` and ``rejected``, each a string or a list of messages ``{"role", "content"}``.
    Without a prompt, or with a prompt string beside whole conversations, the prompt is what chosen and rejected begin
    with in common (as TRL extracts it). The last assistant message is the response; responses are stripped. Empty and
    equal responses are kept here: `prepare_pairs` drops and counts them. Other columns (scores, ids) are ignored.
    Optional columns ``chosen_marks`` and ``rejected_marks`` hold lists of ``[start, end, right]`` over the response.

    Args:
        rows: the rows in order; a pair's id is its row's number, counted from 0.
        source: names the file or data set in errors.

    Raises:
        UserError: a missing column, a wrong type, tools, roles in an order that gives no pair; the error names source,
        row and column.
    """
    return [_parse_row(row, id=str(number), where=f"{source}, row {number}") for number, row in enumerate(rows)]


def _parse_row(row: Mapping[str, object], *, id: str, where: str) -> Pair:
    if not isinstance(row, Mapping):
        raise UserError(f"the row is {_kind(row)}, not an object with columns", where=where, fix=_FORMS)
    for column in ("tools", "chat_template_kwargs"):
        if _is_filled(row.get(column)):
            raise UserError(
                f"the row has {column}, which this program does not render",
                where=f"{where}, column '{column}'",
                fix="Remove such rows; variables of a template are fixed in the recipe",
            )
    chosen, rejected = (_conversation(row, column, where=where) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("one of chosen and rejected is a string, the other a list of messages", where=where, fix=_FORMS)
    prompt = _conversation(row, "prompt", where=where) if row.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, responses = _from_strings(prompt, chosen, rejected, where=where)
    else:
        assert isinstance(chosen, tuple)
        assert isinstance(rejected, tuple)
        turns, responses = _from_messages(prompt, chosen, rejected, where=where)
    if not turns or turns[-1].role != "user":
        what = "chosen and rejected share no prompt"
        if turns:
            what = f"the message before the response is the {turns[-1].role}'s"
        raise UserError(what, where=where, fix="A prompt must end with a user's message. " + _FORMS)
    marks = [
        _marks(row, column, response, where=where)
        for column, response in zip(("chosen_marks", "rejected_marks"), responses, strict=True)
    ]
    return Pair(id, turns, responses[0].strip(), responses[1].strip(), marks[0], marks[1])


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
        raise UserError("the prompt is empty", where=f"{where}, column 'prompt'", fix=_FORMS)
    return (Message("user", prompt),), (chosen, rejected)


def _from_messages(
    prompt: str | tuple[Message, ...] | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...], *, where: str
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise UserError(
                "the conversation does not end with an assistant's message",
                where=f"{where}, column '{column}'",
                fix=_FORMS,
            )
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise UserError(
            "chosen and rejected differ before their last message, so they answer different prompts",
            where=where,
            fix="Cut both conversations after the first answer in which they differ",
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
        raise UserError(
            f"expected a string or a list of messages, found {_kind(value)}", where=where_column, fix=_FORMS
        )
    return tuple(_message(item, where=f"{where_column}, message {i}") for i, item in enumerate(value))


def _missing(row: Mapping[str, object], column: str, *, where: str) -> UserError:
    names = [str(name) for name in row]
    if "completion" in names and "chosen" not in names and "rejected" not in names:
        return UserError(
            "the data are not pairs: a row has one completion" + (" and a label" if "label" in names else ""),
            where=where,
            fix="Preference training needs two responses to one prompt in each row. Join a good and a bad completion of "
            "the same prompt as `chosen` and `rejected`; a prompt that has only one cannot be used",
        )
    if not names:
        return UserError(f"the column '{column}' is missing; the row has no columns", where=where, fix=_FORMS)
    found = f"the column '{column}' is missing; the row has {listed(names, to=column)}.{nearest(column, names)}"
    return UserError(found, where=where, fix=_FORMS)


def _message(item: object, *, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"expected an object with role and content, found {_kind(item)}", where=where, fix=_FORMS)
    role, content = item.get("role"), item.get("content")
    if _is_filled(item.get("tool_calls")) or role in ("tool", "function"):
        raise UserError(
            "the message uses a tool, which this program does not render", where=where, fix="Remove such rows"
        )
    if not isinstance(role, str) or role not in _ROLES:
        hint = nearest(role, _ROLES) if isinstance(role, str) else ""
        raise UserError(
            f"unknown role {shortened(repr(role))}.{hint}", where=where, fix=f"Roles are {', '.join(_ROLES)}"
        )
    if not isinstance(content, str):
        raise UserError(f"the content is {_kind(content)}, not a string", where=where, fix="Give text only")
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
        raise UserError(f"expected a list of marks, found {_kind(value)}", where=where, fix=fix)
    shift, length = len(response) - len(response.lstrip()), len(response.strip())
    marks = []
    for mark in value:
        match list(mark) if isinstance(mark, Sequence | np.ndarray) and not isinstance(mark, str) else None:
            case [int(start), int(end), bool(right)] if 0 <= start < end <= len(response):
                marks.append((max(start - shift, 0), min(end - shift, length), right))
            case _:
                raise UserError(
                    f"{shortened(repr(mark))} is no mark on a response of {len(response)} characters",
                    where=where,
                    fix=fix,
                )
    return tuple((start, end, right) for start, end, right in marks if start < end)


def _valid_text(text: str, *, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
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


def _kind(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "nothing (null)"
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, TypeError, ValueError):  # nested deeply, or keys that JSON has not
        return type(value).__name__
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
