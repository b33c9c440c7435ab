"""Sums over units: the padded and the flat form against a naive loop."""

import pytest
import torch
from torch import Tensor

from ctpd.ops.spans import Aggregate, flat_unit_sums, unit_logps

ROWS = [[-1, -1, 0, 0, 1, -1, 2], [-1, 0, 1, 1, 1], [-1, -1], [0, 0, 1, 2, 3, 3]]
NUM_UNITS = [3, 2, 0, 4]
AGGREGATES: list[Aggregate] = ["sum", "mean"]


def values(*, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(row), generator=generator, dtype=torch.float64) for row in ROWS]


def naive(values: list[Tensor], aggregate: Aggregate) -> list[list[float]]:
    """The definition: for each row and unit, the sum or mean over its tokens."""
    result = []
    for logps, units, count in zip(values, ROWS, NUM_UNITS, strict=True):
        members = [[float(v) for v, u in zip(logps, units, strict=True) if u == unit] for unit in range(count)]
        result.append([sum(m) / (len(m) if aggregate == "mean" else 1) for m in members])
    return result


def padded(rows: list[Tensor], *, fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_padded_units_are_sums_over_their_tokens(aggregate: Aggregate, dtype: torch.dtype) -> None:
    """Each unit is the sum (mean) of its tokens; units beyond a row's own are 0."""
    units = padded([torch.tensor(row, dtype=dtype) for row in ROWS], fill=-1)
    result = unit_logps(padded(values(), fill=7.0), units, num_units=5, aggregate=aggregate)
    expected = padded([torch.tensor(row, dtype=torch.float64) for row in naive(values(), aggregate)], fill=0.0)
    torch.testing.assert_close(result, torch.nn.functional.pad(expected, (0, 1)))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_tokens_without_a_unit_never_matter(aggregate: Aggregate) -> None:
    """Even NaN at prompt and padding leaves values and gradients alone; their own gradient is 0."""
    units = padded([torch.tensor(row) for row in ROWS], fill=-1)
    poisoned = padded(values(), fill=float("nan")).masked_fill(units < 0, float("nan")).requires_grad_()
    result = unit_logps(poisoned, units, num_units=4, aggregate=aggregate)
    (grad,) = torch.autograd.grad(result.sum(), poisoned)
    assert torch.isfinite(result).all()
    assert not grad[units < 0].any()
    assert grad[units >= 0].all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradients_are_right(aggregate: Aggregate) -> None:
    """Analytic against numeric gradients."""
    units = padded([torch.tensor(row) for row in ROWS], fill=-1)
    logps = padded(values(), fill=0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit_logps(x, units, num_units=4, aggregate=aggregate), (logps,))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_flat_form_equals_padded_form(aggregate: Aggregate) -> None:
    """Stored signals and the policy in training get the same units."""
    starts = [torch.tensor([0, *counts]).cumsum(0) for counts in ([len(row) for row in ROWS], NUM_UNITS)]
    flat_units = torch.cat([torch.tensor(row, dtype=torch.int32) for row in ROWS])
    result = flat_unit_sums(
        torch.cat(values()), flat_units, token_starts=starts[0], unit_starts=starts[1], aggregate=aggregate
    )
    expected = [x for row in naive(values(), aggregate) for x in row]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_flat_sums_do_not_lose_small_terms() -> None:
    """Float32 signals are added up in float64: 2^24 + 1 + 1 is not 2^24."""
    logps = torch.tensor([-(2.0**24), -1.0, -1.0], dtype=torch.float32)
    starts = torch.tensor([0, 3]), torch.tensor([0, 1])
    result = flat_unit_sums(logps, torch.zeros(3, dtype=torch.int32), token_starts=starts[0], unit_starts=starts[1])
    assert result.dtype == torch.float32
    assert result.item() == -(2.0**24) - 2.0
