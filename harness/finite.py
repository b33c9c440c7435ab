"""A model whose numbers are NaN or infinite is refused, not scored: the likeliest of NaN is a document like any other."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ctpd.core.errors import NotFinite, listed

_FIX = "Evaluate a model whose numbers are finite; `precision: float32` helps where one overflows in bfloat16"


@contextlib.contextmanager
def finite_logits(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Watch the logits of all forward passes in the block, without waiting for the device.

    Gives a function that waits and raises NotFinite if those of a pass were NaN or infinite. Single logits of minus
    infinity are allowed: some models mask tokens so.
    """
    bad: list[Tensor] = []  # one number: the positions so far whose largest logit is not finite

    def look(_model: nn.Module, _arguments: Any, outputs: Any) -> None:
        logits = getattr(outputs, "logits", None)
        if logits is not None:
            found = (~logits.detach().amax(-1).isfinite()).sum()
            bad[:] = [bad[0] + found if bad else found]

    def check() -> None:
        if bad and bad[0]:
            raise NotFinite("the logits of the model are not finite", fix=_FIX)

    hook = model.register_forward_hook(look)
    try:
        yield check
    finally:
        hook.remove()


def refuse_non_finite(samples: Mapping[str, Sequence[Mapping[str, Any]]], scores: Mapping[str, float]) -> None:
    """Refuse likelihoods of documents, and scores, that are NaN or infinite.

    Args:
        samples: lm-eval's, by task.
        scores: by metric.

    Raises:
        NotFinite: one is.
    """
    for task, of_task in sorted(samples.items()):
        documents = [str(one["doc_id"]) for one in of_task if not all(map(math.isfinite, _numbers(one["resps"])))]
        if documents:
            raise NotFinite(f"the likelihoods of documents {listed(documents)} of '{task}' are not finite", fix=_FIX)
    for metric, value in scores.items():
        if not math.isfinite(value):
            raise NotFinite(f"the score '{metric}' is not finite ({value})", fix=_FIX)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
