"""Which documents of a task are evaluated, and the chat template that their prompts are rendered with."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateSyntaxError
from lm_eval.utils import hash_string
from transformers import PreTrainedTokenizerBase

from ctpd.core.errors import UserError
from ctpd.text.limited import LimitReached, interrupted, limited
from ctpd.text.templates import QUESTION, chat_text, fixed_clock, holds_text
from harness.record import TemplateUse

_NO_TEMPLATE = "Evaluate with `chat_template: false`"


class Documents(NamedTuple):
    """Which documents of a task are evaluated, and how their prompts are made.

    Attributes:
        data_root: a mirror of the hub; None takes the hub itself (or the cache of ``datasets``).
        limit: the first so many documents of each task; None takes all.
        chat_template: whether prompts are rendered with the tokenizer's chat template.
        allow_code: whether the task may run code of its own, or code that a model generates.
        samples: a folder for sample files in lm-eval's format (``harness.samples``); None writes none.
        template_variables: what the chat template reads besides the messages.
        think_end_token: what a model generates up to this text, its reasoning, is not scored.
    """

    data_root: Path | None
    limit: int | None = None
    chat_template: bool = False
    allow_code: bool = False
    samples: Path | None = None
    template_variables: Mapping[str, Any] = {}
    think_end_token: str | None = None


def template_use(tokenizer: PreTrainedTokenizerBase, documents: Documents) -> TemplateUse | None:
    """The chat template that prompts are rendered with; None without one."""
    text = chat_text(tokenizer) if documents.chat_template else None
    if text is None:
        return None
    return TemplateUse(digest=hash_string(text), variables=dict(documents.template_variables))


def check_template(tokenizer: PreTrainedTokenizerBase, documents: Documents) -> None:
    """Refuse a template that is missing, does not come to an end on a short conversation, or leaves its question out."""
    if not documents.chat_template:
        return
    if chat_text(tokenizer) is None:
        raise UserError("the tokenizer has no chat template", fix=_NO_TEMPLATE)
    if documents.template_variables.get("enable_thinking") is True and documents.think_end_token is None:
        raise UserError(
            "the chat template has `enable_thinking: true`, and no `think_end_token` says where the reasoning ends, so that "
            "it would be scored as the answer",
            fix="Add the model's `think_end_token`, such as </think>, or set `enable_thinking: false`",
        )

    def render(_row: int) -> tuple[str, ...]:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": QUESTION}], tokenize=False, **documents.template_variables
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the tokenizer's chat template is none of Jinja's ({error})", fix=_NO_TEMPLATE) from error
        except MemoryError:
            raise
        except Exception:  # the documents may be what it is written for
            return ()
        return (str(text),)

    with _limits_reported():
        (rendered,) = limited(1, render)
    if rendered and not holds_text(rendered[0], QUESTION):
        raise UserError(
            "the tokenizer's chat template writes a conversation without the text of the user's message",
            fix=_NO_TEMPLATE,
        )


@contextlib.contextmanager
def _limits_reported() -> Iterator[None]:
    try:
        yield
    except LimitReached as error:
        raise UserError(f"the tokenizer's chat template {error.what}", fix=_NO_TEMPLATE) from error


@contextlib.contextmanager
def template_of(lm: Any, documents: Documents) -> Iterator[None]:
    """Render with the variables and the fixed date of training, and interrupt a template that does not come to an end."""
    usual = lm.apply_chat_template

    def apply(*args: Any, **options: Any) -> Any:
        with _limits_reported(), interrupted():
            try:
                return usual(*args, **options)
            except (UserError, LimitReached, MemoryError):
                raise
            except Exception as error:  # whatever the program in the template does
                raise UserError(
                    f"the tokenizer's chat template fails on a document ({error})", fix=_NO_TEMPLATE
                ) from error

    variables = dict(documents.template_variables)
    changes: dict[str, Any] = {"apply_chat_template": apply, "chat_template_args": variables}
    if hasattr(lm, "hf_chat_template"):  # lm-eval's class for vLLM, which gives the template and this variable by name
        changes["enable_thinking"] = variables.pop("enable_thinking", lm.enable_thinking)
        if isinstance(lm.hf_chat_template, str):
            changes["hf_chat_template"] = fixed_clock(lm.hf_chat_template)
    text = chat_text(lm.tokenizer)
    with _changed(lm, changes), _changed(lm.tokenizer, {} if text is None else {"chat_template": fixed_clock(text)}):
        yield


@contextlib.contextmanager
def _changed(thing: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of an object for the time of the block."""
    own = {name: value for name, value in vars(thing).items() if name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(thing, name)
        for name, value in own.items():
            setattr(thing, name, value)
