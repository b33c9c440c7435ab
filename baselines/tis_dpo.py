"""TIS-DPO (Liu et al., ICLR 2025, arXiv 2410.04350): DPO with token weights from the student's own contrastive pair.

DEVIATION: without the KL term between the models, which the authors' code leaves out by default (`token_level: false`);
weights by the paper's formula, which is not in the authors' code (BASELINES 11).
"""

from dataclasses import dataclass
from typing import final

from ctpd.objectives.base import BOTH_SIDES, Layout, PairObjective, Sums, Units, Weighting
from ctpd.objectives.preference import preference_sums


@dataclass(frozen=True, kw_only=True)
class TISDPOParams:
    """``beta``: the factor of the margin; the others are the parameters of the weights (``Weighting``)."""

    beta: float = 0.1
    k: float = 1.0
    mu: float = 1.0
    lower: float = -0.5
    upper: float = 1.5
    round_decimals: int | None = None


@final
class TISDPO(PairObjective):
    """The student's tokens, the student's weights, the student's reference; the end token is not counted."""

    params_type = TISDPOParams
    counts = "pairs"
    sides = BOTH_SIDES

    def __init__(self, params: TISDPOParams) -> None:
        super().__init__()
        self.params = params
        weighting = Weighting(
            strategy="student",
            k=params.k,
            mu=params.mu,
            lower=params.lower,
            upper=params.upper,
            round_decimals=params.round_decimals,
        )
        self.layout = Layout(granularity="tokens", end_span=False, reference="student", weighting=weighting)

    def forward(self, units: Units) -> Sums:
        return preference_sums(units, beta=self.params.beta)
