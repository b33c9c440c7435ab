"""Templates that render conversations as text: the prompt as for generation, the response, the end (docs/method.md#templates)."""

# ruff: noqa: D102 (methods are documented on the Protocol)

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, final

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
DIFFERENCES = ("prompt", "inserted", "response", "end", "fails", "doubled")
"""How a template's own rendering of a whole conversation may differ: see `MEANINGS`."""
MEANINGS = {
    "prompt": "the whole conversation does not begin with the prompt as it is rendered for generation",
    "inserted": "text that is not in the generation prompt stands before the response",
    "response": "the response is changed, such as its reasoning removed",
    "end": "another text follows the response",
    "fails": "the template fails on the whole conversation, but not on the prompt",
    "doubled": "the generation prompt ends with a tag, such as <think>, with which the response begins again: the row has it twice",
}
QUESTION = "What is the capital of Norway?"
"""What a template is tried on before there are data."""
_OPENING_TAG = re.compile(r"<[^<>/\s][^<>]*>\s*$")
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
    end_from: str = "template"  # or the origin of an `EndToken`: what says which token ends the response


class Refused(NamedTuple):
    """A prompt that a template does not render, or renders without its question, and why."""

    why: str
    reason: str = "template"  # of the rows that are dropped for it: one of `ctpd.text.pairs.DROP_REASONS`


class EndToken(NamedTuple):
    """The text of a token that ends responses, and where it is from."""

    text: str
    origin: Literal["recipe", "generation_config", "tokenizer"]


Row = tuple[Sequence[Message], str]
"""A prompt and a response to it."""


class Template(Protocol):
    """How one model's conversations are rendered."""

    @property
    def writes_end(self) -> bool:
        """Whether the text contains the special tokens. If not, EOS, and BOS if the tokenizer adds it, are added as ids."""
        ...

    @property
    def end(self) -> EndToken | None:
        """The token that ends a response where the text of the template has none, or the recipe names one."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the rendering, as JSON types; part of the tokenizer's digest."""
        ...

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame | Refused]:
        """The text around any response to each prompt; ``where`` names the pairs in errors."""
        ...

    def differences(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> list[str]:
        """How the template itself renders ``before + response + after``: one of `DIFFERENCES`, or nothing if as that."""
        ...

    def own(self, prompt: Sequence[Message], response: str) -> str:
        """The template's own rendering of a whole conversation, or why it has none."""
        ...


@final
class ChatTemplate:
    """The tokenizer's own chat template with fixed variables, rendered with limits of time and memory (`limited`).

    The prompt is what the template writes with ``add_generation_prompt=True``, and white space that it puts between that
    and a response. Its own rendering of whole conversations says what ends a response, and is compared (`differences`).

    Args:
        tokenizer: a tokenizer with a chat template.
        variables: what the template reads besides the messages, such as ``enable_thinking``. ``date_string`` is set if
            absent, and ``strftime_now`` gives a fixed date.
        end: the token that ends responses. That of a recipe is used in any case, another if the template writes no
            special token behind a response; None takes the tokenizer's EOS token then.
        merge_system: write a system message as the beginning of the first user message.

    Raises:
        UserError: the tokenizer has no chat template, or (on use) the template is none of Jinja's, or reaches a limit.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        variables: Mapping[str, Any],
        *,
        end: EndToken | None = None,
        merge_system: bool = False,
    ) -> None:
        self._label = f"the chat template of '{tokenizer.name_or_path or type(tokenizer).__name__}'"
        text = chat_text(tokenizer)
        if text is None:
            raise UserError(
                f"the tokenizer '{tokenizer.name_or_path}' has no chat template",
                fix="Write a plain template for this model into the recipe: the texts of user and assistant",
            )
        self._tokenizer = tokenizer
        self._text = fixed_clock(text)
        self._variables = fixed_variables(variables)
        self._end, self._merges = end, merge_system
        if end is None and tokenizer.eos_token_id is not None:
            self._end = EndToken(tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id), "tokenizer")
        self._special = special_pattern(tokenizer)
        self._known: dict[tuple[Message, ...], Frame | Refused] = {}

    @property
    def writes_end(self) -> bool:
        return True

    @property
    def end(self) -> EndToken | None:
        return self._end

    @property
    def identity(self) -> dict[str, Any]:
        return {"chat": self._text, "variables": self._variables}

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame | Refused]:
        keys = [tuple(prompt) for prompt in prompts]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        found = self._limited(len(new), lambda i: self._frame(keys[new[i]]), [where[i] for i in new])
        made = {keys[i]: _frame_or_refusal(texts) for i, texts in zip(new, found, strict=True)}
        self._known = {key: made[key] if key in made else self._known[key] for key in keys}  # those of one block
        return [self._known[key] for key in keys]

    def differences(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> list[str]:
        found = self._limited(len(rows), lambda i: (self._difference(*rows[i], frame=frames[i]),), where)
        return [kind for (kind,) in found]

    def own(self, prompt: Sequence[Message], response: str) -> str:
        def render(_row: int) -> tuple[str]:
            try:
                return (self._apply((*prompt, Message("assistant", response)), add_generation_prompt=False),)
            except _Fails as error:
                return (f"{self._label} fails on the conversation ({error})",)

        return self._limited(1, render, ["a conversation"])[0][0]

    def _limited(self, count: int, work: Callable[[int], Sequence[str]], where: Sequence[str]) -> list[list[str]]:
        try:
            return limited(count, work)
        except LimitReached as error:
            raise UserError(
                f"{self._label} {error.what}", where=where[error.row], fix="Give another template, or remove the row"
            ) from error

    def _frame(self, prompt: tuple[Message, ...]) -> tuple[str, ...]:
        """The text before and behind a response and what says how it ends, or why there is none, and a reason."""
        try:
            opening = self._apply(prompt, add_generation_prompt=True)
        except _Fails as error:
            return (f"{self._label} fails on the conversation ({error}){self._way_out(prompt)}",)
        if not holds_text(opening, prompt[-1].content):
            return (self._loss(prompt), "lost_text")
        # A placeholder locates the response: a short response could also occur elsewhere in the text.
        number = 0
        while (placeholder := f"Response{number}") in opening:
            number += 1
        try:
            whole = self._apply((*prompt, Message("assistant", placeholder)), add_generation_prompt=False)
        except _Fails:
            whole = ""
        before, found, written = whole.rpartition(placeholder)
        between = before.removeprefix(opening) if before.startswith(opening) else ""
        after, origin = self._after(written if found else "")
        if not after:
            return (f"{self._label} writes no special token behind a response, and the tokenizer has no EOS token",)
        return opening + (between if between.isspace() else ""), after, origin

    def _loss(self, prompt: Sequence[Message]) -> str:
        """That a generation prompt lacks the user's text."""
        said = f"{self._label} renders the prompt without the text of the user's last message"
        try:
            parts = [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in prompt]
            reads_parts = holds_text(self._render(parts, add_generation_prompt=True), prompt[-1].content)
        except _Fails:
            reads_parts = False
        return f"{said}: it reads messages in parts, of text and of images, alone" if reads_parts else said

    def _way_out(self, prompt: Sequence[Message]) -> str:
        """That a conversation which the template does not render could be rendered with its system message merged."""
        joined = merged(prompt)
        if self._merges or joined is prompt:
            return ""
        try:
            self._apply(joined, add_generation_prompt=True)
        except _Fails:
            return ""
        return ", but renders it with `system: merge`"

    def _after(self, written: str) -> tuple[str, str]:
        """The text from the response to its end token and what says so, of what the template writes behind a response."""
        end = self._end
        if end is not None and end.origin == "recipe":
            before, found, _ = written.partition(end.text)
            return (before if found else "") + end.text, end.origin
        if self._special.search(written) is not None:
            return written, "template"
        return ("", "") if end is None else (end.text, end.origin)

    def _difference(self, prompt: Sequence[Message], response: str, *, frame: Frame) -> str:
        tag = _OPENING_TAG.search(frame.before)
        if tag is not None and response.startswith(tag.group().rstrip()):
            return "doubled"
        try:
            own = self._apply((*prompt, Message("assistant", response)), add_generation_prompt=False)
        except _Fails:
            return "fails"
        if own == frame.before + response + frame.after:
            return ""
        if not own.startswith(frame.before):
            return "prompt"
        rest = own[len(frame.before) :]
        if rest.startswith(response):
            # What follows the end token is not part of the row.
            return "" if rest.startswith(response + frame.after) else "end"
        return "inserted" if response in rest else "response"

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        given = [message._asdict() for message in (merged(messages) if self._merges else messages)]
        return self._render(given, add_generation_prompt=add_generation_prompt)

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever the program in the template does
            from jinja2 import TemplateSyntaxError  # here, for commands that render nothing

            if isinstance(error, TemplateSyntaxError):
                raise UserError(
                    f"{self._label} is no Jinja template ({error})",
                    fix="Bring the file of the template again, or correct it",
                ) from error
            raise _Fails(str(error)) from error
        assert isinstance(text, str)
        return text


class _Fails(Exception):
    """A template fails on a conversation."""


def holds_text(rendered: str, content: str) -> bool:
    """Whether a template has written a message's text: white space and case aside, which some templates change."""
    return _squeezed(content) in _squeezed(rendered)


def _squeezed(text: str) -> str:
    return "".join(text.casefold().split())


def chat_text(tokenizer: FastTokenizer) -> str | None:
    """The text of a tokenizer's chat template, the default one of several."""
    text = tokenizer.chat_template
    if isinstance(text, Mapping):
        text = text.get("default")
    return text if isinstance(text, str) else None


def fixed_clock(text: str) -> str:
    """A chat template with a fixed date where it would write today's."""
    return _FIXED_CLOCK + text if "strftime_now" in text and not text.startswith(_FIXED_CLOCK) else text


def fixed_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a template, with the fixed date if they have none."""
    return {"date_string": _DATE_STRING, **variables}


def merged(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation with its leading system message as the beginning of the user message behind it."""
    if len(messages) < 2 or [message.role for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [Message("user", f"{system.content}\n\n{user.content}"), *rest]


def special_texts(tokenizer: FastTokenizer) -> frozenset[str]:
    """The texts of a tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_tokens) | {t.content for t in added.values() if t.special}


def special_pattern(tokenizer: FastTokenizer, extra: Sequence[str] = ()) -> re.Pattern[str]:
    """Finds the text of any special token, and ``extra`` texts."""
    texts = sorted(special_texts(tokenizer).union(extra), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _frame_or_refusal(texts: Sequence[str]) -> Frame | Refused:
    return Frame(*texts) if len(texts) == len(Frame._fields) else Refused(*texts)
