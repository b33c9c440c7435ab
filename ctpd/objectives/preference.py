"""The weighted preference objective (METHOD 5): DPO, TIS-DPO, CTPD and every ablation are cells of one table.

Shape legend: R = 2B rows (B chosen, then B rejected), U units.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ctpd.core.errors import UserError
from ctpd.objectives.base import BOTH_SIDES, Anchor, Granularity, Layout, PairObjective, Sums, Units, Weighting
from ctpd.ops.spans import Aggregate
from ctpd.ops.weights import find_strategy


@dataclass(frozen=True, kw_only=True)
class PreferenceParams:
    """A cell of the table; the defaults are CTPD.

    Args:
        granularity, aggregate, end_span: what a unit is (``Layout``).
        weights: a strategy of METHOD 4; `k`, `mu`, `lower`, `upper` and `round_decimals` are its parameters.
        reference: whose SFT model is the reference.
        beta: the factor of the margin.
    """

    granularity: Granularity = "spans"
    weights: str = "teacher"
    reference: Anchor = "teacher"
    beta: float = 0.1
    aggregate: Aggregate = "sum"
    end_span: bool = True
    k: float = 1.0
    mu: float = 1.0
    lower: float = -0.5
    upper: float = 1.5
    round_decimals: int | None = None


@final
class Preference(PairObjective):
    """``-log sigmoid(beta (r_w - r_l))`` with ``r = sum_i w_i (logp_S(p_i) - logp_ref(p_i))``, summed over pairs.

    Raises:
        UserError: an unknown strategy, or the teacher's signals on units that only the student has.
    """

    params_type = PreferenceParams
    counts = "pairs"
    sides = BOTH_SIDES

    def __init__(self, params: PreferenceParams) -> None:
        super().__init__()
        _check(params)
        self.params = params
        # Uniform weights are no weights: nothing has to be computed, stored or loaded for them.
        weighting = Weighting(
            strategy=params.weights,
            k=params.k,
            mu=params.mu,
            lower=params.lower,
            upper=params.upper,
            round_decimals=params.round_decimals,
        )
        self.layout = Layout(
            granularity=params.granularity,
            aggregate=params.aggregate,
            end_span=params.end_span,
            reference=params.reference,
            weighting=None if params.weights == "uniform" else weighting,
        )

    def forward(self, units: Units) -> Sums:
        return preference_sums(units, beta=self.params.beta)


def preference_sums(units: Units, *, beta: float) -> Sums:
    """Loss and metrics of METHOD 5, summed over the pairs of a micro-batch.

    Weights and reference are constants; weights that are None are 1.
    """
    assert units.reference is not None
    ratio_RU = units.policy - units.reference
    if units.weights is not None:
        # Masked here too: an arbitrary weight times a gradient of 0 need not be 0.
        ratio_RU = ratio_RU * units.weights.masked_fill(~units.mask, 0.0)
    chosen_B, rejected_B = (beta * _masked_sums(ratio_RU, units)).chunk(2)
    margin_B = chosen_B - rejected_B
    loss_B = -F.logsigmoid(margin_B)
    with torch.no_grad():
        logps_chosen_B, logps_rejected_B = _masked_sums(units.policy, units).chunk(2)
        metrics = {
            "rewards/chosen": chosen_B.detach(),
            "rewards/rejected": rejected_B.detach(),
            "rewards/accuracies": (margin_B > 0).to(margin_B.dtype),
            "rewards/margins": margin_B.detach(),
            "logps/chosen": logps_chosen_B,
            "logps/rejected": logps_rejected_B,
            "policy/accuracies": (logps_chosen_B > logps_rejected_B).to(margin_B.dtype),
            "saturation": torch.sigmoid(-margin_B),
        }
    return Sums(loss_B.sum(), len(loss_B), {name: values.sum() for name, values in metrics.items()})


def _masked_sums(values_RU: Float[Tensor, "R U"], units: Units) -> Float[Tensor, " R"]:
    return values_RU.masked_fill(~units.mask, 0.0).sum(1)


def _check(params: PreferenceParams) -> None:
    needs = find_strategy(params.weights).needs
    if params.granularity == "tokens":
        teachers = [f"weights: {params.weights}"] if any(need.of_teacher for need in needs) else []
        teachers += ["reference: teacher"] if params.reference == "teacher" else []
        if teachers:
            raise UserError(
                f"`granularity: tokens` cannot go with `{'` and `'.join(teachers)}`: "
                "the teacher has no log-probabilities of the student's tokens",
                fix="Use `granularity: spans`, or the student's weights and reference",
            )
    if params.beta <= 0:
        raise UserError(f"`beta: {params.beta}` is not above 0")
