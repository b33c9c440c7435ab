"""The weighted preference objective (docs/method.md#preference-objective): DPO, TIS-DPO, CTPD and every ablation are cells of one table.

Shape legend: R = 2B rows (B chosen, then B rejected), U units.
"""

from typing import Annotated, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ctpd.core.config import Config, Tunable
from ctpd.core.roles import Role
from ctpd.objectives.base import BOTH_SIDES, Granularity, Layout, PairObjective, Sums, Units, Weighting
from ctpd.ops.spans import Aggregate
from ctpd.ops.weights import WeightParameters, find_strategy


class MarginParams(Config):
    """What every preference objective has."""

    beta: Annotated[float, Field(gt=0), Tunable((0.03, 0.1, 0.3, 1.0))] = 0.1
    """Factor of the margin inside the sigmoid: the strength of the pull to the reference."""


class PreferenceParams(WeightParameters, MarginParams):
    """A cell of the table; the defaults are CTPD."""

    granularity: Granularity = "spans"
    """What a unit is: an aligned span, or a token of the student."""
    weights: str = "teacher"
    """A weight strategy; `k`, `mu`, `lower`, `upper` and `round_decimals` are its parameters."""
    reference: Role = "teacher"
    """Whose SFT model is the reference."""
    aggregate: Aggregate = "sum"
    """How the log-probabilities of a unit's tokens become the unit's."""
    end_span: bool = True
    """Whether the end of turn is counted."""

    @model_validator(mode="after")
    def _exist_for_units(self) -> "PreferenceParams":
        if self.granularity == "tokens":
            needs = find_strategy(self.weights).needs
            teachers = [f"weights: {self.weights}"] if any(need.role == "teacher" for need in needs) else []
            teachers += ["reference: teacher"] if self.reference == "teacher" else []
            if teachers:
                raise ValueError(
                    f"`granularity: tokens` cannot go with `{'` and `'.join(teachers)}`: the teacher has no "
                    "log-probabilities of the student's tokens. Use `granularity: spans`, or the student's weights and "
                    "reference."
                )
        return self

    @field_validator("weights")
    @classmethod
    def _known(cls, name: str) -> str:
        return find_strategy(name).name


@final
class Preference(PairObjective):
    """``-log sigmoid(beta (r_w - r_l))`` with ``r = sum_i w_i (logp_S(p_i) - logp_ref(p_i))``, summed over pairs."""

    params_type = PreferenceParams
    counts = "pairs"
    sides = BOTH_SIDES

    def __init__(self, params: PreferenceParams) -> None:
        super().__init__()
        self.params = params
        # Uniform weights are no weights: nothing has to be computed, stored or loaded for them.
        weighting = Weighting(strategy=params.weights, parameters=WeightParameters.of(params))
        self.layout = Layout(
            granularity=params.granularity,
            aggregate=params.aggregate,
            end_span=params.end_span,
            reference="teacher" if params.reference == "teacher" else "initial",
            weighting=None if params.weights == "uniform" else weighting,
        )

    def forward(self, units: Units) -> Sums:
        return preference_sums(units, beta=self.params.beta)


def preference_sums(units: Units, *, beta: float) -> Sums:
    """Loss and metrics of docs/method.md#preference-objective, summed over the pairs of a micro-batch.

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
