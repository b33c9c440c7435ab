"""Direct preference optimisation (Rafailov et al., 2023, Eq. 7): uniform weights, the student's own reference."""

from dataclasses import dataclass
from typing import final

from ctpd.objectives.base import BOTH_SIDES, Layout, PairObjective, Sums, Units
from ctpd.objectives.preference import preference_sums


@dataclass(frozen=True, kw_only=True)
class DPOParams:
    """``beta``: the factor of the margin."""

    beta: float = 0.1


@final
class DPO(PairObjective):
    """A sum over a whole response does not depend on how it is cut: any granularity gives DPO, to rounding."""

    params_type = DPOParams
    counts = "pairs"
    sides = BOTH_SIDES

    def __init__(self, params: DPOParams) -> None:
        super().__init__()
        self.params = params
        self.layout = Layout(granularity="spans", reference="student")

    def forward(self, units: Units) -> Sums:
        return preference_sums(units, beta=self.params.beta)
