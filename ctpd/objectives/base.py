"""What an objective is, and what it declares so that nobody has to ask for its name.

Shape legend: R rows of one batch (first all chosen, then all rejected), U units.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ctpd.ops.spans import Aggregate as Aggregate

Granularity = Literal["spans", "tokens"]
Anchor = Literal["teacher", "student"]
Side = Literal["chosen", "rejected"]
BOTH_SIDES: tuple[Side, ...] = ("chosen", "rejected")


class Needs(StrEnum):
    """What must be in a batch beside the policy's own log-probabilities."""

    REFERENCE = "reference"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Sums:
    """Totals over one micro-batch; the trainer divides once per step.

    ``loss`` is to be divided by the step's total of ``count``, each of ``metrics`` by its number of pairs.
    """

    loss: Float[Tensor, ""]
    count: int | Tensor
    metrics: dict[str, Tensor]


class Units(NamedTuple):
    """The units of one batch of B pairs: rows [0, B) are chosen; with both ``sides``, rows [B, 2B) are rejected.

    ``mask`` marks the units that are counted; everything else holds arbitrary values where it is False.
    """

    policy: Float[Tensor, "R U"]
    mask: Bool[Tensor, "R U"]
    reference: Float[Tensor, "R U"] | None = None
    weights: Float[Tensor, "R U"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """Which importance weights: the arguments of ``ctpd.ops.weights.span_weights``."""

    strategy: str
    k: float = 1.0
    mu: float = 1.0
    lower: float = -0.5
    upper: float = 1.5
    round_decimals: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What ``Units`` are made of: all that must be known to prepare an objective's batches.

    Args:
        granularity: aligned spans, or the student's own tokens.
        aggregate: how the log-probabilities of a unit's tokens become the unit's.
        end_span: whether the end of turn, the last unit of a response that was not cut, is counted.
        reference: whose SFT model is the reference; None for no reference.
        weighting: the importance weights; None for none, which is weight 1.
    """

    granularity: Granularity
    aggregate: Aggregate = "sum"
    end_span: bool = True
    reference: Anchor | None = None
    weighting: Weighting | None = None


class Objective(nn.Module, ABC):
    """The common part of all objectives: ``ObjectiveClass(ObjectiveClass.params_type(...))`` makes one.

    ``counts`` says by what the trainer divides a step's loss: pairs, scored tokens of the student, or units of both
    models (distinct spans) in the scored responses.
    ``sides`` are the responses of a pair that the policy has to score.
    """

    params_type: ClassVar[type[Any]]
    counts: ClassVar[Literal["pairs", "tokens", "units"]]
    sides: ClassVar[tuple[Side, ...]]

    @property
    @abstractmethod
    def needs(self) -> frozenset[Needs]:
        """What must be in a batch beside the policy's own log-probabilities."""


class PairObjective(Objective):
    """An objective of the log-probabilities of units: it never sees a vocabulary."""

    layout: Layout

    @property
    def needs(self) -> frozenset[Needs]:
        wanted = {Needs.REFERENCE: self.layout.reference, Needs.WEIGHTS: self.layout.weighting}
        return frozenset(need for need, source in wanted.items() if source is not None)

    @abstractmethod
    def forward(self, units: Units) -> Sums:
        """The sums over one micro-batch; ``units`` holds what ``needs`` names."""
