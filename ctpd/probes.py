"""Short trials of a loaded model: whether a faster way to call it gives the numbers of the plain way.

Functions that answer a question leave the model and the random state as they were and give the same answer again.
`configure_scorer` is the one that changes the model.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from ctpd.checkpoints import first_line
from ctpd.core.errors import CtpdError, UserError
from ctpd.models import Score, score


class Tolerance(NamedTuple):
    """How far numbers that are computed in two ways may lie apart.

    Attributes:
        logps: largest absolute difference of log-probabilities, in nats.
        logits: largest difference of logits, relative to the largest logit.
        gradients: largest difference of gradients, relative to the largest entry.
    """

    logps: float
    logits: float
    gradients: float


SINGLE_PRECISION = Tolerance(logps=1e-3, logits=1e-4, gradients=1e-2)
HALF_PRECISION = Tolerance(logps=0.1, logits=4e-2, gradients=0.1)


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """The tolerance for a model whose weights have this dtype: the wide one for 16 bits and less."""
    return SINGLE_PRECISION if dtype in (torch.float32, torch.float64) else HALF_PRECISION


def same_logits(expected: Tensor, found: Tensor) -> bool:
    """Whether logits of one shape, computed in two ways, are equal within the tolerance."""
    limit = tolerance_of(expected.dtype).logits * float(expected.abs().max())
    return largest_difference(expected, found) <= limit  # False for NaN


def largest_difference(expected: Tensor, found: Tensor) -> float:
    """The largest absolute difference."""
    return float((found - expected).abs().max())


def same_results(model: nn.Module, expected: Callable[[], Tensor], found: Callable[[], Tensor]) -> bool:
    """Whether two ways to compute log-probabilities give equal values and gradients, of the first and last parameter.

    LoRA's B matrices start at zero, where a forgotten adapter would not show: they are random during the trial.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    with _in_evaluation(model), _random_adapters(model):
        for way in (expected, found):
            with torch.enable_grad():
                logps_N = way()
                ends = [trained[0], trained[-1]] if trained else []
                grads = torch.autograd.grad(logps_N.sum(), ends, materialize_grads=True) if ends else ()
            results.append([logps_N.detach().float(), *(g.float() for g in grads)])
    tolerance = tolerance_of(next(model.parameters()).dtype)
    (logps_N, *grads_of_expected), (other_N, *grads_of_found) = results
    return largest_difference(logps_N, other_N) <= tolerance.logps and all(
        largest_difference(grad, other) <= tolerance.gradients * max(float(grad.abs().max()), 1e-6)
        for grad, other in zip(grads_of_expected, grads_of_found, strict=True)
    )


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _random_adapters(model: nn.Module) -> Iterator[None]:
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    try:
        with torch.no_grad():
            for name in saved:
                parameter = model.get_parameter(name)
                generator = torch.Generator(parameter.device).manual_seed(0)
                nn.init.normal_(parameter, std=0.02, generator=generator)
        yield
    finally:
        for name, value in saved.items():
            model.get_parameter(name).data.copy_(value)


def other_mixing(model: nn.Module) -> str | None:
    """What besides full and sliding attention lets positions interact in a model; None if nothing is known to."""
    config: Any = model.config
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    if other := set(layer_types) - {"full_attention", "sliding_attention"}:
        return f"layers of kind {', '.join(sorted(other))}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "convolutions over positions"
    return None


@contextlib.contextmanager
def short_windows(model: nn.Module, size: int) -> Iterator[None]:
    """Shorten sliding windows for the duration of a trial, so that rows of a few tokens are longer than a window."""
    config: Any = model.config
    parts: list[Any] = [config.get_text_config(), *model.modules()]
    windows = [(part, part.sliding_window) for part in parts if isinstance(getattr(part, "sliding_window", None), int)]
    try:
        for part, _ in windows:
            part.sliding_window = size
        yield
    finally:
        for part, window in windows:
            part.sliding_window = window


def trial_tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Tokens of made-up rows on the model's device, none of them token 0 or the padding token.

    The embedding of these may be zero. A row that begins with it keeps zeros through all layers, where some models have
    no gradient and the gradient of RMSNorm is larger by ``eps ** -0.5`` in each layer, beyond float32 after some ten.
    """
    config = _base(model).config.get_text_config()
    vocabulary: int = config.vocab_size
    ids = 1 + torch.arange(math.prod(shape)) * 7919 % (vocabulary - 1)
    padding = getattr(config, "pad_token_id", None)
    ids[ids == padding] = 1 if padding != 1 else 2
    return ids.reshape(shape).to(next(model.parameters()).device)


def configure_scorer(model: nn.Module) -> None:
    """Let the scorer use full logits, with a warning, if `scores_without_logits` is False; otherwise the tiled head.

    Raises:
        UserError: as `scores_without_logits` and `check_causal`.
    """
    base = _base(model)
    base._scorer_uses_logits = not scores_without_logits(model)
    if base._scorer_uses_logits:
        warnings.warn(
            f"the scorer without logits does not reproduce {type(base).__name__}; full logits are used, which need more memory",
            stacklevel=2,
        )
    check_causal(model)


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose log-probability of a token depends on that token and on those after it, as BERT's does.

    What a causal model does not read has a gradient of zero; a difference of values could be as small as rounding.

    Raises:
        UserError: the model is not causal.
    """
    base = _base(model)
    embeddings: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    predictor = 3
    ids_1T = trial_tokens(model, (1, 12))
    request = Score(torch.tensor([predictor], device=ids_1T.device), ids_1T[0, predictor + 1 : predictor + 2])
    hook = base.get_input_embeddings().register_forward_hook(note)
    try:
        with _in_evaluation(model), torch.enable_grad():
            (grad,) = torch.autograd.grad(score(model, ids_1T, request).sum(), embeddings[:1], materialize_grads=True)
    finally:
        hook.remove()
    if grad.shape[:2] != ids_1T.shape:
        return  # its embedding is called with something else than the tokens
    sizes_T = grad[0].abs().amax(-1)
    if sizes_T[predictor + 1 :].max() > 1e-7 * sizes_T.max():
        raise UserError(
            f"{type(base).__name__} is not causal: the log-probability that it gives a token depends on that token itself",
            fix="Use a causal language model of transformers (one like BERT is causal with `is_decoder: true` in its config.json)",
        )


def scores_without_logits(model: nn.Module) -> bool:
    """Whether the output embedding applied tile by tile gives the values and gradients of the model's own logits."""
    base = _base(model)
    ids = trial_tokens(model, (2, 12))
    predictors = torch.tensor([3, 4, 15, 20], device=ids.device)
    request = Score(predictors, ids.flatten()[predictors + 1])

    def by(uses_logits: bool) -> Callable[[], Tensor]:
        def way() -> Tensor:
            base._scorer_uses_logits = uses_logits
            return score(model, ids, request)

        return way

    before = base._scorer_uses_logits
    try:
        return same_results(model, by(uses_logits=True), _or_nan(by(uses_logits=False), request))
    except (CtpdError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own forward raises whatever it likes
        raise UserError(
            f"{type(base).__name__} gives no log-probabilities of a text alone ({first_line(error)})",
            fix="Use a causal language model of transformers",
        ) from error
    finally:
        base._scorer_uses_logits = before


def _or_nan(way: Callable[[], Tensor], request: Score) -> Callable[[], Tensor]:
    """A way to compute log-probabilities that gives NaN, which equals nothing, where it raises an error."""

    def tried() -> Tensor:
        try:
            return way()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a decoder that is not called as those of other models raises whatever it likes
            return torch.full(request.targets.shape, torch.nan, requires_grad=True)

    return tried


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
