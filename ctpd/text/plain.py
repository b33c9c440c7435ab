"""Templates of base models: one text for each role (docs/method.md#templates)."""

# ruff: noqa: D102 (methods are documented on the Protocol)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from ctpd.core.errors import UserError
from ctpd.text.pairs import Message
from ctpd.text.templates import EndToken, Frame, Refused, Row


@final
@dataclass(frozen=True, slots=True)
class PlainTemplate:
    """A template for base models: one text for each role, each with exactly one ``{content}``.

    The assistant's text before ``{content}`` is the generation prompt. The assistant's text after ``{content}`` is
    left out: the EOS token follows the response. Without ``system``, prompts with a system message are refused.
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
    def end(self) -> EndToken | None:
        return None

    @property
    def identity(self) -> dict[str, Any]:
        return {"plain": {"user": self.user, "assistant": self.assistant, "system": self.system}}

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame | Refused]:
        return [self._frame(prompt) for prompt in prompts]

    def differences(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> list[str]:
        return [""] * len(rows)

    def own(self, prompt: Sequence[Message], response: str) -> str:
        frame = self._frame(prompt)
        return frame.why if isinstance(frame, Refused) else frame.before + response + frame.after

    def _frame(self, prompt: Sequence[Message]) -> Frame | Refused:
        texts = {"user": self.user, "assistant": self.assistant, "system": self.system}
        parts = []
        for message in prompt:
            text = texts[message.role]
            if text is None:
                return Refused(
                    "the prompt has a system message, for which the plain template has no text (its role 'system')"
                )
            parts.append(text.replace("{content}", message.content))
        return Frame("".join([*parts, self.assistant.partition("{content}")[0]]), "", "tokenizer")
