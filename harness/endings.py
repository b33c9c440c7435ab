"""How generated answers end: by themselves or at the limit of tokens, and the room that a model has for them."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from ctpd.core.errors import Unmeasurable


class Endings:
    """How many generated answers ended by themselves, with a stop string or an end token before the limit of tokens.

    Attributes:
        answers: those of which it is known.
        ended: those of them that did.
    """

    def __init__(self) -> None:
        self.answers = self.ended = 0

    def add(self, *, ended: bool) -> None:
        """Count one answer."""
        self.answers += 1
        self.ended += ended

    def of(self, answers: int) -> int | None:
        """How many of so many ended; None where it is not known of all."""
        return self.ended if self.answers == answers else None


def watched_vllm(lm: Any) -> Endings:
    """Count the endings of the answers that vLLM generates from now on, by the reasons that it gives.

    It also refuses answers that do not fit into the model's context, of which lm-eval would cut the prompt by a negative number
    of tokens.
    """
    endings, generate_text, generate_tokens = Endings(), lm.generate_until, lm._model_generate

    def texts(requests: list[Instance], **options: Any) -> Any:
        for request in requests:
            room_for_prompt(lm.max_length, normalize_gen_kwargs(request.args[1], lm.max_gen_toks)["max_gen_toks"])
        return generate_text(requests, **options)

    def tokens(*args: Any, **options: Any) -> Any:
        outputs = generate_tokens(*args, **options)
        if options.get("generate", False):
            for output in outputs:
                reason = getattr(output.outputs[0], "finish_reason", None)
                if reason is not None:
                    endings.add(ended=reason == "stop")
        return outputs

    lm.generate_until, lm._model_generate = texts, tokens
    return endings


def room_for_prompt(max_length: int, max_answer: int) -> int:
    """The tokens of a model's length that an answer of ``max_answer`` tokens leaves for the prompt.

    Raises:
        Unmeasurable: none.
    """
    if max_length > max_answer:
        return max_length - max_answer
    raise Unmeasurable(
        f"the model's length of {max_length} tokens leaves no room for a prompt before the {max_answer} tokens that "
        "the task generates",
        fix="Evaluate a model with a longer context, or lower `max_gen_toks` in the task's file",
    )
