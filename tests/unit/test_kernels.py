"""The Triton kernels of the output head against the same passes in torch.

On a GPU they are compiled. Without one they run in Triton's interpreter, if Triton is installed:

    TRITON_INTERPRET=1 pytest tests/unit/test_kernels.py
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ctpd.ops import tiles
from ctpd.ops.logps import token_logps
from ctpd.ops.tiles import LogitTransform

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"), reason="there is no GPU"),
    pytest.mark.filterwarnings("default"),  # of Triton and of torch about the device
]

N, H, V = 37, 16, 5003
TILES = {"one tile": (N, V), "tiles of columns": (N, 2100), "tiles of rows and columns": (5, 2100)}
ROUNDING = 1.1 if ON_GPU else 1.5  # the interpreter rounds to 16 bits towards zero
VARIANTS = {"plain": {}, "softcap and scale": {"transform": LogitTransform(softcap=3.0, scale=1.7)}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Log-probabilities and the gradients of hidden states and weight, with the kernels or without."""

    def values_and_grads(
        dtype: torch.dtype, *, fused: bool, trained: bool, tile: tuple[int, int], **options: Any
    ) -> list[Tensor]:
        monkeypatch.setattr(tiles, "_has_kernels", lambda device: fused)
        for name in ("_CPU", "_GPU"):
            monkeypatch.setattr(tiles, name, getattr(tiles, name)._replace(rows=tile[0]))
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias, incoming = (
            torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in [(N, H), (V, H), (V,), (N,)]
        )
        targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
        leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
        size = tile[0] * tile[1] * (dtype.itemsize if fused else 4)
        found = token_logps(hidden, weight, targets, bias_V=bias, tile_bytes=size, **options)
        return [found.detach(), *torch.autograd.grad(found, leaves, incoming.to(found.dtype))]

    return values_and_grads


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_equal_torch_in_float32(
    variant: str, trained: bool, tile: tuple[int, int], run: Callable[..., list[Tensor]]
) -> None:
    options = {"trained": trained, "tile": tile, **VARIANTS[variant]}
    ours, torchs = (run(torch.float32, fused=fused, **options) for fused in (True, False))
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_are_as_exact_as_torch_in_bfloat16(
    variant: str, trained: bool, tile: tuple[int, int], run: Callable[..., list[Tensor]]
) -> None:
    """The same rounded logits; gradients as far from those in float32 as torch's."""
    options = {"trained": trained, "tile": tile, **VARIANTS[variant]}
    ours, torchs = (run(torch.bfloat16, fused=fused, **options) for fused in (True, False))
    exact = run(torch.float32, fused=False, **options)
    torch.testing.assert_close(ours[0], torchs[0], rtol=1e-4, atol=1e-4)
    for our, other, right in zip(ours[1:], torchs[1:], exact[1:], strict=True):
        assert our.dtype == torch.bfloat16
        assert (our.float() - right).norm() <= ROUNDING * (other.float() - right).norm()


def test_kernels_pass_on_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit that is NaN or infinite gives no number, as in torch."""
    monkeypatch.setattr(tiles, "_has_kernels", lambda device: True)
    for bad in (float("nan"), float("inf")):
        hidden, weight = torch.ones(2, 1, device=DEVICE), torch.zeros(V, 1, device=DEVICE)
        weight[V - 1] = bad
        assert token_logps(hidden, weight, torch.zeros(2, dtype=torch.int64, device=DEVICE)).isnan().all()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_tokens_that_are_impossible_count_nothing(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of minus infinity, as some models give the padding of their vocabulary."""
    monkeypatch.setattr(tiles, "_has_kernels", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).to(DEVICE) for shape in [(N, H), (V, H)])
    bias = torch.zeros(V, device=DEVICE)
    bias[::2] = -torch.inf
    targets = torch.full((N,), 1, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    found = token_logps(hidden, weight, targets, bias_V=bias)
    expected = (hidden @ weight[1::2].T).log_softmax(-1)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(logps_N.sum(), hidden)[0] for logps_N in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
