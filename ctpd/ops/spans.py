"""Log-probabilities of units: aligned spans, or a student's own tokens (docs/method.md#log-probabilities-of-units).

Two forms of one definition: padded and differentiable for the policy in training, flat for stored signals.

Shape legend: R rows (one response each), T tokens, U units; flat arrays hold all rows one after another, `starts` is
R + 1.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Aggregate = Literal["sum", "mean"]


def unit_logps(
    logps_RT: Float[Tensor, "R T"], unit_RT: Int[Tensor, "R T"], *, num_units: int, aggregate: Aggregate = "sum"
) -> Float[Tensor, "R U"]:
    """Log-probability of each unit: the sum (or the mean) over the tokens that spell it.

    Args:
        logps_RT: log-probabilities of tokens; values at tokens without a unit are ignored, and get no gradient.
        unit_RT: the unit of each token in its row, -1 for none (prompt, padding).
        num_units: U, the width of the result; a unit without tokens gets 0.
    """
    none_RT = unit_RT < 0
    index_RT = unit_RT.long().masked_fill(none_RT, 0)
    zeros_RU = logps_RT.new_zeros(len(logps_RT), num_units)
    sums_RU = zeros_RU.scatter_add(1, index_RT, logps_RT.masked_fill(none_RT, 0.0))
    if aggregate == "sum":
        return sums_RU
    return sums_RU / zeros_RU.scatter_add(1, index_RT, (~none_RT).to(zeros_RU.dtype)).clamp(min=1.0)


def flat_unit_sums(
    logps_T: Float[Tensor, " T"],
    unit_T: Int[Tensor, " T"],
    *,
    token_starts: Int[Tensor, " starts"],
    unit_starts: Int[Tensor, " starts"],
    aggregate: Aggregate = "sum",
) -> Float[Tensor, " U"]:
    """The same over flat rows, added up in float64; the result has the dtype of ``logps_T``. Not differentiable.

    Args:
        logps_T: log-probabilities of the tokens of all rows; values at tokens without a unit are ignored.
        unit_T: the unit of each token, counted from 0 in its row, -1 for none.
        token_starts, unit_starts: where each row begins, and the total, in tokens and in units.
    """
    row_T = torch.repeat_interleave(token_starts.diff())
    kept_T = unit_T >= 0
    index_K = unit_T[kept_T].long() + unit_starts[:-1].long()[row_T[kept_T]]
    sums_U = torch.zeros(int(unit_starts[-1]), dtype=torch.float64, device=logps_T.device)
    sums_U.index_add_(0, index_K, logps_T.detach()[kept_T].double())
    if aggregate == "mean":
        sums_U /= torch.bincount(index_K, minlength=len(sums_U)).clamp(min=1)
    return sums_U.to(logps_T.dtype)
