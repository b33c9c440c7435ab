"""Messages of a conversation as data sets write them: lists of objects, and transcripts (docs/data.md#forms-of-rows)."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from ctpd.core.errors import nearest, shortened
from ctpd.text.values import BadRow, WrongForm, as_list, is_filled, is_null, kind, valid_text

ROLES = ("system", "user", "assistant")
FORMS = (
    "A row holds prompt, chosen and rejected as strings or as lists of messages; "
    "the prompt may be part of chosen and rejected"
)
_NAMES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_TOOLS = ("tool", "function", "function_call", "observation")
ROLE_NAMES = (*_NAMES, *_TOOLS)
"""What messages of data sets have as their role, also those that are not read."""
_UNREAD = ("reasoning_content", "reasoning", "thinking")  # of a message: they would be lost
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
"""The keys of a message, and those of ShareGPT's."""
_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant|System):[ \t]*")
_OTHER_TURNS = re.compile(
    r"[\s#*]*(?:human|user|system|assistant)\**:.*\n[ \t#*]*assistant\**:", re.IGNORECASE | re.DOTALL
)
_SPEAKERS = {"Human": "user", "Assistant": "assistant", "System": "system"}


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


def conversation(value: object, *, where: str) -> str | tuple[Message, ...]:
    """A text, or the messages of a list; an object is one message, or one list for each key of the messages.

    A message is ``{"role", "content"}``, or ShareGPT's ``{"from", "value"}`` with the roles `human` and `gpt`.

    Raises:
        BadRow: neither, a role that is not known, a content that is no text, tools, or reasoning in a field of its own.
    """
    if isinstance(value, str):
        return valid_text(value, where=where)
    value = as_list(value)
    if isinstance(value, Mapping):
        value = _of_object(value, where=where)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise BadRow(
            f"expected a string or a list of messages, found {kind(value)}",
            where=where,
            fix=FORMS,
            reason="null_content" if is_null(value) else "malformed",
        )
    return tuple(_message(item, where=f"{where}, message {i}") for i, item in enumerate(value))


def whole_prompt(prompt: Sequence[Message], before: Sequence[Message]) -> tuple[Message, ...] | None:
    """The messages of a column of prompts and those before the response, which may repeat them, as one conversation.

    White space at the ends of contents does not count when they are compared.

    Args:
        prompt: of its own column.
        before: of the conversation in `chosen` and `rejected`, without its last message.

    Returns:
        The longer one where one begins with the other but for a system message; both, one behind the other, where
        ``before`` goes on from ``prompt``; None where they contradict.
    """
    if not prompt or not before:
        return (*prompt, *before)
    system, turns = _apart(prompt)
    other, more = _apart(before)
    if system and other and _stripped(system) != _stripped(other):
        return None
    if _stripped(more)[: len(turns)] == _stripped(turns):
        return tuple(before) if other else (*system, *more)
    goes_on = not other and turns[-1].role != more[0].role and _stripped(turns)[0] != _stripped(more)[0]
    return (*prompt, *before) if goes_on else None


def _apart(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    """The system message at the beginning, if there is one, and the others."""
    count = int(messages[0].role == "system")
    return messages[:count], messages[count:]


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(role, content.strip()) for role, content in messages]


def is_message(value: object) -> bool:
    """Whether a value is one message with a role that is known, in either form."""
    return isinstance(value, Mapping) and any(
        isinstance(value.get(role), str) and value[role] in ROLE_NAMES and content in value
        for role, content in MESSAGE_KEYS
    )


def transcript(text: str, *, where: str) -> tuple[Message, ...] | None:
    """The turns of ``Human: ... Assistant: ...`` with an empty line before each, or None for a text that begins otherwise.

    White space around a turn is removed.
    """
    found = list(_TURN.finditer(valid_text(text, where=where)))
    if not found or found[0].start() > 0:
        return None
    stops = [*(turn.start() for turn in found[1:]), len(text)]
    return tuple(
        Message(_SPEAKERS[turn[1]], text[turn.end() : stop].strip()) for turn, stop in zip(found, stops, strict=True)
    )


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript with a turn of the assistant behind another, which `transcript` reads."""
    turns = [turn[1] for turn in _TURN.finditer(text)] if _TURN.match(text) else []
    return "Assistant" in turns[1:]


def is_other_transcript(text: str) -> bool:
    """Whether a text is a transcript that `transcript` does not read: other names, or a turn on each line."""
    return not is_transcript(text) and _OTHER_TURNS.match(text) is not None


def holds_new_messages(value: object) -> bool:
    """Whether a cell holds messages that versions before 2 of `ctpd.text.layouts.READING` did not read as they are now."""
    value = as_list(value)
    if isinstance(value, Mapping):
        return True
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return any(
        isinstance(item, Mapping)
        and (item.get("role") not in ROLES or any(is_filled(item.get(key)) for key in ("from", "value", *_UNREAD)))
        for item in value
    )


def _of_object(value: Mapping[object, object], *, where: str) -> list[object]:
    """The messages of an object: it is one, or holds lists of roles and of contents (`datasets.Sequence` of objects)."""
    lists = {key: as_list(value[key]) for key in chain(*MESSAGE_KEYS) if key in value}
    if not lists or not all(isinstance(part, list) for part in lists.values()):
        return [value]
    sizes = {len(part) for part in lists.values() if isinstance(part, list)}
    if len(sizes) > 1:
        raise BadRow("the lists of roles and of contents have not the same length", where=where, fix=FORMS)
    return [dict(zip(lists, item, strict=True)) for item in zip(*lists.values(), strict=True)]


def _message(item: object, *, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"expected an object with role and content, found {kind(item)}", where=where, fix=FORMS)
    role, content = (
        item.get(other) if is_null(item.get(name)) and other in item else item.get(name)
        for name, other in zip(*MESSAGE_KEYS, strict=True)
    )
    if is_filled(item.get("tool_calls")) or role in _TOOLS:
        raise BadRow(
            "the message uses a tool, which this program does not render",
            where=where,
            fix="Remove such rows",
            reason="unread_field",
        )
    for name in _UNREAD:
        if is_filled(item.get(name)):
            raise BadRow(
                f"the message has `{name}` beside its content, which this program does not render",
                where=where,
                fix="Write the reasoning into the content as the model does, such as <think>...</think> before the answer",
                reason="unread_field",
            )
    if not isinstance(role, str) or role not in _NAMES:
        hint = nearest(role, _NAMES) if isinstance(role, str) else ""
        fix = f"Roles are {', '.join(ROLES)}, or human and gpt"
        raise BadRow(f"unknown role {shortened(repr(role))}.{hint}", where=where, fix=fix)
    if isinstance(content, list):
        raise WrongForm(
            f"the content is {kind(content)}, not a string: a list of parts, as for images",
            where=where,
            fix="Write the text of the parts as one string; rows with other parts cannot be used",
        )
    if is_null(content) and isinstance(item.get("text"), str):
        raise WrongForm("the message has its text as `text`", where=where, fix="Rename the key to `content`")
    if not isinstance(content, str):
        reason = "null_content" if is_null(content) else "malformed"
        raise BadRow(f"the content is {kind(content)}, not a string", where=where, fix="Give text only", reason=reason)
    return Message(_NAMES[role], valid_text(content, where=where))
