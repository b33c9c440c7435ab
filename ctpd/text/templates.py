"""Templates that render conversations as text. The rendering must contain the response unchanged (docs/method.md#templates)."""

# ruff: noqa: D102 (methods are documented on the Protocol)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

from ctpd.core.errors import UserError
from ctpd.text.limited import LimitReached, limited
from ctpd.text.pairs import Message

# A template that writes today's date would render another text every day, so the date is fixed
# (docs/method.md#templates).
_DATE = {
    **{"%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26"},
    **{"%A": "Friday", "%a": "Fri", "%H": "12", "%M": "00", "%S": "00"},
}
_DATE_STRING = "26 Jul 2024"  # the default of Llama 3's template
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f" | replace({mark!r}, {value!r})" for mark, value in sorted(_DATE.items(), key=lambda item: -len(item[0]))
    )
    + " }}{%- endmacro -%}"
)


class FastTokenizer(Protocol):
    """The members used here of a fast transformers tokenizer (backed by the tokenizers library)."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def name_or_path(self) -> Any: ...
    @property
    def backend_tokenizer(self) -> Any: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def all_special_tokens(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def convert_ids_to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...
    def convert_tokens_to_ids(self, *args: Any, **kwargs: Any) -> Any: ...
    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...


class Frame(NamedTuple):
    """The text around the response to one prompt."""

    before: str  # counts as prompt
    after: str


Row = tuple[Sequence[Message], str]
"""A prompt and a response to it."""


class Template(Protocol):
    """How one model's conversations are rendered."""

    @property
    def writes_end(self) -> bool:
        """Whether the text contains the special tokens. If not, EOS, and BOS if the tokenizer adds it, are added as ids."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the rendering, as JSON types; part of the tokenizer's digest."""
        ...

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame]:
        """The text around any response to each prompt; ``where`` names the pairs in errors."""
        ...

    def render(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> list[str]:
        """Whole conversations: ``before + response + after``. Raises UserError if the template gives another text."""
        ...


@final
@dataclass(frozen=True, slots=True)
class PlainTemplate:
    """A template for base models: one text for each role, each with exactly one ``{content}``.

    The assistant's text before ``{content}`` is the generation prompt. The assistant's text after ``{content}`` is
    left out: the EOS token follows the response. Without ``system``, system messages are refused.
    """

    user: str
    assistant: str
    system: str | None = None

    def __post_init__(self) -> None:
        for role in ("user", "assistant", "system"):
            text = getattr(self, role)
            if not isinstance(text, str) and not (role == "system" and text is None):
                raise UserError(f"the text is not a string but {text!r}", where=f"plain template, role '{role}'")
            if text is not None and text.count("{content}") != 1:
                raise UserError(
                    f"the text {text!r} contains {{content}} {text.count('{content}')} times",
                    where=f"plain template, role '{role}'",
                    fix='Write each role\'s text with exactly one {content}, as in "{content}\\n"',
                )

    @property
    def writes_end(self) -> bool:
        return False

    @property
    def identity(self) -> dict[str, Any]:
        return {"plain": {"user": self.user, "assistant": self.assistant, "system": self.system}}

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame]:
        opening = self.assistant.partition("{content}")[0]
        turns = [[self._turn(message, at) for message in prompt] for prompt, at in zip(prompts, where, strict=True)]
        return [Frame("".join([*of_prompt, opening]), "") for of_prompt in turns]

    def render(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> list[str]:
        return [frame.before + response for (_, response), frame in zip(rows, frames, strict=True)]

    def _turn(self, message: Message, where: str) -> str:
        text = {"user": self.user, "assistant": self.assistant, "system": self.system}[message.role]
        if text is None:
            raise UserError(
                "the prompt has a system message, for which the plain template has no text",
                where=where,
                fix="Add a text for the role 'system' to the plain template",
            )
        return text.replace("{content}", message.content)


@final
class ChatTemplate:
    """The tokenizer's own chat template with fixed variables, rendered with limits of time and memory (`limited`).

    Args:
        tokenizer: a tokenizer with a chat template.
        variables: what the template reads besides the messages, such as ``enable_thinking``. ``date_string`` is set if
            absent, and ``strftime_now`` gives a fixed date.

    Raises:
        UserError: the tokenizer has no chat template, or (on use) the template fails on a conversation or reaches a
            limit, or its rendering does not contain the exact response after the generation prompt (docs/method.md#templates).
    """

    def __init__(self, tokenizer: FastTokenizer, variables: Mapping[str, Any]) -> None:
        text = tokenizer.chat_template
        self._label = f"the chat template of '{tokenizer.name_or_path or type(tokenizer).__name__}'"
        if isinstance(text, Mapping):
            text = text.get("default")
        if not isinstance(text, str):
            raise UserError(
                f"the tokenizer '{tokenizer.name_or_path}' has no chat template",
                fix="Write a plain template for this model into the recipe: the texts of user and assistant",
            )
        self._tokenizer = tokenizer
        self._text = _FIXED_CLOCK + text if "strftime_now" in text else text
        self._variables = {"date_string": _DATE_STRING, **variables}

    @property
    def writes_end(self) -> bool:
        return True

    @property
    def identity(self) -> dict[str, Any]:
        return {"chat": self._text, "variables": self._variables}

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame]:
        found = self._limited(len(prompts), lambda i: self._frame(prompts[i], where=where[i]), where)
        return [Frame(before, after) for before, after in found]

    def render(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> list[str]:
        self._limited(len(rows), lambda i: self._check(*rows[i], frame=frames[i], where=where[i]), where)
        return [frame.before + response + frame.after for (_, response), frame in zip(rows, frames, strict=True)]

    def _limited(self, count: int, work: Callable[[int], Sequence[str]], where: Sequence[str]) -> list[list[str]]:
        try:
            return limited(count, work)
        except LimitReached as error:
            raise self._refusal(f"it {error.what}", where=where[error.row]) from error

    def _frame(self, prompt: Sequence[Message], *, where: str) -> Frame:
        opening = self._apply(prompt, where=where, add_generation_prompt=True)
        # A placeholder locates the response: a short response could also occur elsewhere in the text.
        number = 0
        while (placeholder := f"Response{number}") in opening:
            number += 1
        full = self._apply([*prompt, Message("assistant", placeholder)], where=where, add_generation_prompt=False)
        if not full.startswith(opening):
            raise self._refusal(
                "the rendered conversation does not begin with the prompt and the generation prompt", where=where
            )
        parts = full[len(opening) :].split(placeholder)
        if len(parts) != 2:
            raise self._refusal(f"the rendering contains the response {len(parts) - 1} times", where=where)
        return Frame(opening + parts[0], parts[1])

    def _check(self, prompt: Sequence[Message], response: str, *, frame: Frame, where: str) -> tuple[()]:
        text = self._apply([*prompt, Message("assistant", response)], where=where, add_generation_prompt=False)
        if text != frame.before + response + frame.after:
            raise self._refusal("the template changes the response", where=where)
        return ()

    def _apply(self, messages: Sequence[Message], *, where: str, add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever the program in the template does
            raise self._refusal(f"it fails on the conversation ({error})", where=where) from error
        assert isinstance(text, str)
        return text

    def _refusal(self, what: str, *, where: str) -> UserError:
        return UserError(
            f"{self._label} cannot be aligned: {what}",
            where=where,
            fix="Set the template's variables so that it writes the response as it is, give a plain template, "
            "or remove the row",
        )
