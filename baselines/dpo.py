"""Direct preference optimisation (Rafailov et al., 2023, Eq. 7): uniform weights, the initial policy as the reference."""

from typing import final

from ctpd.objectives.base import BOTH_SIDES, Layout, PairObjective, Sums, Units
from ctpd.objectives.preference import MarginParams, preference_sums


class DPOParams(MarginParams):
    """The margin's factor."""


@final
class DPO(PairObjective):
    """A sum over a whole response does not depend on how it is cut: any granularity gives DPO, to rounding."""

    params_type = DPOParams
    counts = "pairs"
    sides = BOTH_SIDES

    def __init__(self, params: DPOParams) -> None:
        super().__init__()
        self.params = params
        self.layout = Layout(granularity="spans", reference="initial")

    def forward(self, units: Units) -> Sums:
        return preference_sums(units, beta=self.params.beta)
