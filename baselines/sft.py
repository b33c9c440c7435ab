"""Supervised fine-tuning on the chosen responses (docs/method.md#supervised-fine-tuning).

Shape legend: R rows (all chosen), U units (tokens).
"""

from typing import final

from ctpd.core.config import Config
from ctpd.objectives.base import Layout, PairObjective, Sums, Units


class SFTParams(Config):
    """There is nothing to choose."""


@final
class SFT(PairObjective):
    """Cross-entropy of the chosen response and its end token, prompt masked; the mean is over the step's tokens."""

    params_type = SFTParams
    counts = "tokens"
    sides = ("chosen",)

    def __init__(self, params: SFTParams) -> None:
        super().__init__()
        self.params = params
        self.layout = Layout(granularity="tokens")

    def forward(self, units: Units) -> Sums:
        return cross_entropy(units)


def cross_entropy(units: Units) -> Sums:
    """Minus the log-probability of all counted units, to be divided by their number."""
    logp = units.policy.masked_fill(~units.mask, 0.0).sum()
    return Sums(-logp, units.mask.sum(), {"logps/chosen": logp.detach()})
