"""Short trials of a loaded model: whether a quicker way to call it gives what the plain way gives."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ctpd.models import Score, score

PROBE_TOLERANCES = {torch.float32: (1e-3, 1e-2)}  # of log-probabilities; of gradients, relative to their largest entry
PROBE_TOLERANCES_16_BITS = (0.1, 0.1)


@torch.no_grad()
def _randomised_adapters(model: nn.Module) -> dict[str, Tensor]:
    saved = {}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            saved[name] = parameter.detach().clone()
            nn.init.normal_(parameter, std=0.02)
    return saved


def same_results(model: nn.Module, expected: Callable[[], Tensor], found: Callable[[], Tensor]) -> bool:
    """Probe: whether two ways to compute log-probabilities give the same values and gradients, of the first and last parameter.

    Adapter weights start at zero, where a forgotten adapter would not show: they are randomised meanwhile.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved, was_training = _randomised_adapters(model), model.training
    model.eval()
    results = []
    try:
        for way in (expected, found):
            with torch.enable_grad():
                logps_N = way()
                grads = torch.autograd.grad(logps_N.sum(), [trained[0], trained[-1]]) if trained else ()
            results.append([logps_N.detach().float(), *(g.float() for g in grads)])
    finally:
        for name, value in saved.items():
            model.get_parameter(name).data.copy_(value)
        model.train(was_training)
    value, relative = PROBE_TOLERANCES.get(next(model.parameters()).dtype, PROBE_TOLERANCES_16_BITS)
    (logps_N, *grads), (other_N, *other_grads) = results
    return bool((logps_N - other_N).abs().max() <= value) and all(
        bool((grad - other).abs().max() <= relative * grad.abs().max().clamp(min=1e-6))
        for grad, other in zip(grads, other_grads, strict=True)
    )


def other_mixing(model: nn.Module) -> str | None:
    """What besides full and sliding attention lets a model's positions see each other; None if nothing is known to."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if other := set(layer_types) - {"full_attention", "sliding_attention"}:
        return f"layers of kind {', '.join(sorted(other))}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "convolutions over positions"
    return None


@contextlib.contextmanager
def short_windows(model: nn.Module, size: int) -> Iterator[None]:
    """For the time, sliding windows of so few positions that a short trial shows whether attention knows them."""
    parts: list[Any] = [model.config.get_text_config(), *model.modules()]
    windows = [(part, part.sliding_window) for part in parts if isinstance(getattr(part, "sliding_window", None), int)]
    try:
        for part, _ in windows:
            part.sliding_window = size
        yield
    finally:
        for part, window in windows:
            part.sliding_window = window


def probe_scorer(model: nn.Module) -> None:
    """Compare the scorer with full logits, values and gradients, and fall back to full logits if they differ."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.arange(24, device=device).reshape(2, 12) * 7919 % vocabulary
    request = Score(
        torch.tensor([3, 4, 15, 20], device=device), ids.flatten()[torch.tensor([4, 5, 16, 21], device=device)]
    )

    def by(uses_logits: bool) -> Callable[[], Tensor]:
        def way() -> Tensor:
            base._scorer_uses_logits = uses_logits
            return score(model, ids, request)

        return way

    if not same_results(model, by(uses_logits=True), by(uses_logits=False)):
        base._scorer_uses_logits = True
        warnings.warn(
            f"the scorer without logits does not reproduce {type(base).__name__}; full logits are used, which need more memory",
            stacklevel=2,
        )
