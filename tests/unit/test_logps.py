"""Tiled log-probabilities against full logits: values, gradients, memory and work."""

import importlib.util
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctpd.ops import tiles
from ctpd.ops.logps import token_logps, token_logps_module
from ctpd.ops.tiles import NO_TRANSFORM, LogitTransform

N, H, V = 23, 12, 57
ONE_ROW = 1  # bytes: every tile is a single row
SEVEN_ROWS = 7 * V * 8  # bytes: uneven tiles
VARIANTS = {
    "plain": {},
    "softcap": {"transform": LogitTransform(softcap=2.5)},
    "scale": {"transform": LogitTransform(scale=0.37)},
    "softcap and scale": {"transform": LogitTransform(softcap=3.0, scale=1.7)},
}


def full_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias_V: Tensor | None = None,
    transform: LogitTransform = NO_TRANSFORM,
) -> Tensor:
    """The definition, with all logits at once."""
    logits = nn.functional.linear(hidden, weight, bias_V) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets and the gradient that comes in."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, incoming = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in [(N, H), (V, H), (V,), (N,)]
    )
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator), incoming


def value_and_grads(compute: Callable[..., Tensor], *inputs: Tensor, incoming: Tensor) -> list[Tensor]:
    """``compute`` on fresh leaves, and the gradient of each leaf that is floating point and asks for one."""
    value = compute(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves, incoming.to(value.dtype))]


class Recorder(TorchDispatchMode):
    """Counts matrix products with the vocabulary and records the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.num_products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of four rows, so that a column's sums are of several tiles."""
    for name in ("_CPU", "_GPU"):
        monkeypatch.setattr(tiles, name, getattr(tiles, name)._replace(rows=4))


@pytest.mark.parametrize("tile_bytes", [ONE_ROW, SEVEN_ROWS, 2**30])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_full_logits_in_float64(variant: str, trained: bool, with_bias: bool, tile_bytes: int) -> None:
    """Values and all gradients are those of full logits, for any tile, trained or frozen."""
    hidden, weight, bias, targets, incoming = problem()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    bias.requires_grad_(trained)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        bias_V = bias if with_bias else None
        return token_logps(hidden, weight, targets, bias_V=bias_V, tile_bytes=tile_bytes, **VARIANTS[variant])

    def full(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return full_logps(hidden, weight, targets, bias_V=bias if with_bias else None, **VARIANTS[variant])

    inputs = [hidden, weight, bias if with_bias else bias.detach()]
    results = [value_and_grads(f, *inputs, incoming=incoming) for f in (ours, full)]
    assert len(results[0]) == 2 + trained + (trained and with_bias)
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_is_as_exact_as_full_logits_in_float32(trained: bool) -> None:
    """In float32 the error against float64 is of the order of full logits' own error."""
    hidden, weight, _, targets, incoming = problem()

    def run(compute: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)]
        return value_and_grads(lambda h, w: compute(h, w, targets), *leaves, incoming=incoming)

    exact = run(full_logps, torch.float64)
    ours, full = run(token_logps, torch.float32), run(full_logps, torch.float32)
    for ours_x, full_x, exact_x in zip(ours, full, exact, strict=True):
        assert ours_x.dtype == torch.float32
        torch.testing.assert_close(ours_x.double(), exact_x, rtol=1e-4, atol=1e-5)
        error, full_error = ((x.double() - exact_x).abs().max() for x in (ours_x, full_x))
        assert error <= 4 * full_error + 1e-6


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_over_many_rows_are_of_all_their_tiles(dtype: torch.dtype, trained: bool) -> None:
    """Several tiles of rows and of columns. With 16-bit weights a column's sum is float32 until its last tile."""
    hidden, weight, _, targets, incoming = problem(dtype)
    size = 4 * 20 * max(dtype.itemsize, 4)
    assert [
        (t.rows.stop - t.rows.start, t.columns.stop - t.columns.start)
        for t in tiles.TiledHead.of(hidden, weight, NO_TRANSFORM, size).tiles(N, V, by_columns=True)
    ][:2] == [(4, 20), (4, 20)]
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]
    got = value_and_grads(lambda h, w: token_logps(h, w, targets, tile_bytes=size), *leaves, incoming=incoming)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    expected = value_and_grads(lambda h, w: full_logps(h, w, targets), *exact, incoming=incoming)
    for ours, right in zip(got, expected, strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < (1e-12 if dtype == torch.float64 else 0.01)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_bfloat16_inputs_give_float32_results(trained: bool) -> None:
    """16-bit inputs: the result is float32 on the model's own (16-bit) logits; gradients have the inputs' dtype."""
    hidden, weight, _, targets, incoming = problem(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    got = value_and_grads(
        lambda h, w: token_logps(h, w, targets, tile_bytes=SEVEN_ROWS), hidden, weight, incoming=incoming
    )
    logits = (hidden @ weight.T).float()
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got[0], expected.detach())
    leaves = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    exact = value_and_grads(lambda h, w: full_logps(h, w, targets), *leaves, incoming=incoming)
    for grad, exact_grad in zip(got[1:], exact[1:], strict=True):
        assert grad.dtype == torch.bfloat16
        assert float((grad.double() - exact_grad).norm() / exact_grad.norm()) < 0.02


def test_autocast_decides_the_dtype_of_the_products() -> None:
    """Under autocast float32 parameters are used as in the library's own head, with float32 gradients."""
    hidden, weight, _, targets, incoming = problem(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = token_logps(hidden, weight, targets)
        logits = nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(value, [hidden, weight], incoming)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_tied_weight_collects_both_gradients() -> None:
    """A weight that is the input embedding too gets the sum of both gradients."""
    _, weight, _, targets, incoming = problem()
    ids = torch.arange(N) % V
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def through(compute: Callable[..., Tensor]) -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        return value_and_grads(
            lambda w: compute(torch.tanh(w[ids] @ mix), w, targets) + compute(w[ids], w, targets),
            leaf,
            incoming=incoming,
        )

    torch.testing.assert_close(through(token_logps), through(full_logps), rtol=1e-11, atol=1e-12)


def test_frozen_head_needs_no_tile_in_the_backward_pass() -> None:
    """With a frozen head the backward pass makes no matrix product; with a trained one it makes three per tile."""
    hidden, weight, _, targets, incoming = problem()
    hidden.requires_grad_()
    num_backward_products = {}
    for trained in (False, True):
        logps = token_logps(hidden, weight.requires_grad_(trained), targets, tile_bytes=2**30)
        with Recorder() as backward:
            logps.backward(incoming)
        num_backward_products[trained] = backward.num_products
    assert num_backward_products == {False: 0, True: 3}


def test_only_the_bias_or_only_the_weight_may_be_trained() -> None:
    """Each input gets its gradient, whether or not the others require one."""
    hidden, weight, bias, targets, incoming = problem()
    for trained in range(3):
        inputs = [x.clone().requires_grad_(i == trained) for i, x in enumerate((hidden, weight, bias))]
        ours = value_and_grads(lambda h, w, b: token_logps(h, w, targets, bias_V=b), *inputs, incoming=incoming)
        full = value_and_grads(lambda h, w, b: full_logps(h, w, targets, bias_V=b), *inputs, incoming=incoming)
        torch.testing.assert_close(ours, full, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_no_tensor_is_larger_than_a_tile_or_the_weight(trained: bool, softcap: float | None) -> None:
    """Forward and backward never make anything of size [rows, vocabulary]."""
    num_rows, num_hidden, num_vocabulary = 4096, 4, 300
    hidden = torch.randn(num_rows, num_hidden, requires_grad=True)
    weight = torch.randn(num_vocabulary, num_hidden, requires_grad=trained)
    targets = torch.randint(num_vocabulary, (num_rows,))
    tile_bytes = 64 * num_vocabulary * 4
    with Recorder() as recorder:
        logps = token_logps(hidden, weight, targets, transform=LogitTransform(softcap=softcap), tile_bytes=tile_bytes)
        logps.sum().backward()
    assert recorder.largest <= max(tile_bytes // 4, num_rows * num_hidden)


def test_nothing_is_kept_when_nothing_needs_a_gradient() -> None:
    """Without gradients (frozen model or no_grad) the values are the same and no graph is built."""
    hidden, weight, _, targets, _ = problem()
    expected = full_logps(hidden, weight, targets)
    torch.testing.assert_close(token_logps(hidden, weight, targets), expected)
    with torch.no_grad():
        value = token_logps(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)


def test_no_rows_give_an_empty_result_with_zero_gradients() -> None:
    """A micro-batch without scored rows is no error."""
    _, weight, _, _, _ = problem()
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    for trained in (True, False):
        leaf = weight.clone().requires_grad_(trained)
        logps = token_logps(hidden, leaf, torch.zeros(0, dtype=torch.int64))
        logps.sum().backward()
        assert logps.shape == (0,)
        assert leaf.grad is None or not leaf.grad.any()


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-1e4 neither overflow nor give NaN, in the value or in the gradient."""
    for trained in (True, False):
        hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
        weight = torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_(trained)
        logps = token_logps(hidden, weight, torch.tensor([1, 1]))
        logps.sum().backward()
        assert logps.tolist() == [-2e4, 0.0]
        assert torch.isfinite(hidden.grad).all()


def test_second_derivatives_are_refused() -> None:
    """Differentiating twice is an error, not a wrong number."""
    hidden, weight, _, targets, _ = problem()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(hidden, weight, targets).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_head_equals_full_logits(variant: str) -> None:
    """A head that is only a module (here an adapter on a linear layer) has the values and gradients of full logits."""
    hidden, weight, bias, targets, incoming = problem()
    torch.manual_seed(0)
    down, up = nn.Linear(H, 2, bias=False).double(), nn.Linear(2, V, bias=False).double()
    leaves = [hidden.requires_grad_(), down.weight, up.weight]

    def head(rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, weight, bias) + up(down(rows))

    ours = token_logps_module(hidden, head, targets, tile_rows=5, **VARIANTS[variant])
    merged = weight + up.weight @ down.weight
    full = full_logps(hidden, merged, targets, bias_V=bias, **VARIANTS[variant])
    torch.testing.assert_close(ours, full, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad(value, leaves, incoming, retain_graph=True) for value in (ours, full)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(token_logps_module(hidden, head, targets, **VARIANTS[variant]), full)


def test_16_bit_weight_gradients_of_a_large_vocabulary() -> None:
    """A vocabulary of several blocks: each block's gradient is written at its offset, summed in float32 over tiles."""
    num_vocabulary = 2**15 + 3
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator).bfloat16()
    weight = torch.randn(num_vocabulary, 4, generator=generator).bfloat16().requires_grad_()
    targets = torch.tensor([0, 2**14 - 1, 2**14, 2**15, num_vocabulary - 1, 5])
    token_logps(hidden, weight, targets, tile_bytes=2 * 4 * num_vocabulary).sum().backward()
    exact = weight.detach().double().requires_grad_()
    full_logps(hidden.double(), exact, targets).sum().backward()
    assert weight.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=0.1, atol=1e-3)


def test_a_gpu_without_a_compiler_is_used_without_kernels_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton may be installed and unable to compile."""

    def try_on(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "ctpd.kernels", types.SimpleNamespace(try_on=try_on))
    with pytest.warns(
        UserWarning, match=r"Triton does not compile kernels for cuda \(Failed to find C compiler\): the out"
    ):
        assert not tiles._has_kernels.__wrapped__(torch.device("cuda"))
