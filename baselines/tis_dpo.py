"""TIS-DPO (Liu et al., ICLR 2025, arXiv 2410.04350): DPO with token weights from the student's own contrastive pair.

DEVIATION: without the KL term between the models, which the authors' code leaves out by default (`token_level: false`);
weights by the paper's formula, which is not in the authors' code (docs/method.md#tis-dpo).
"""

from typing import final

from ctpd.objectives.base import BOTH_SIDES, Layout, PairObjective, Sums, Units, Weighting
from ctpd.objectives.preference import MarginParams, preference_sums
from ctpd.ops.weights import WeightParameters


class TISDPOParams(WeightParameters, MarginParams):
    """The margin's factor and the parameters of the weights."""


@final
class TISDPO(PairObjective):
    """The student's tokens, the student's weights, the student's reference; the end token is not counted."""

    params_type = TISDPOParams
    counts = "pairs"
    sides = BOTH_SIDES

    def __init__(self, params: TISDPOParams) -> None:
        super().__init__()
        self.params = params
        self.layout = Layout(
            granularity="tokens",
            end_span=False,
            reference="initial",
            weighting=Weighting(strategy="student", parameters=WeightParameters.of(params)),
        )

    def forward(self, units: Units) -> Sums:
        return preference_sums(units, beta=self.params.beta)
