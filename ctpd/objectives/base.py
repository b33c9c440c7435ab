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
from ctpd.ops.weights import Signal

Granularity = Literal["spans", "tokens"]
Anchor = Literal["teacher", "student"]
Side = Literal["chosen", "rejected"]
BOTH_SIDES: tuple[Side, ...] = ("chosen", "rejected")
Pairing = Literal["none", "position", "edit_distance"]
Counted = Literal["pairs", "tokens", "units"]


class Needs(StrEnum):
    """What must be in a batch beside the policy's own log-probabilities."""

    REFERENCE = "reference"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Sums:
    """Totals over one micro-batch; the Trainer adds them up and divides once per optimizer step.

    Attributes:
        loss: a sum over the micro-batch; the gradient of a step is that of the total loss over the total count.
        count: the number of pairs, tokens or units (``Objective.counts``) that ``loss`` is a sum over. The Trainer
            takes the same number from the batch before the forward pass (``ctpd.train.batches.count_units``).
        metrics: sums over the pairs of the micro-batch; the Trainer logs them divided by the number of pairs.
    """

    loss: Float[Tensor, ""]
    count: int | Tensor
    metrics: dict[str, Tensor]


class Units(NamedTuple):
    """The log-probabilities of the units of B pairs: rows [0, B) are chosen; with both ``sides``, rows [B, 2B) rejected.

    Attributes:
        policy: under the trained model, in nats.
        mask: the units that are counted; the other tensors hold arbitrary values where it is False.
        reference: under the reference model; None without a reference.
        weights: importance weights; None for weight 1.
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


class Generation(NamedTuple):
    """Responses that a model writes in place of the data's, before anything is trained."""

    writer: Anchor
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """What an objective must be given of its teachers.

    Args:
        models: which frozen teachers; most objectives want one.
        top_k: None for a teacher in memory; else the K likeliest tokens of each row, from a stored signal.
        temperature: of the stored distributions; without meaning for a teacher in memory.
        boundary: a stored signal of two numbers a token: its log-probability, and that of a boundary after it.
        pairing: how a teacher's token is found for a student's: none, the k-th for the k-th, or by dynamic time
            warping over the edit distance of their strings.
        skip_last: the student's last scored token of each response has no partner.
        same_tokenizer: the objective is defined for models that share a tokenizer only.
    """

    models: tuple[Signal, ...] = (Signal.TEACHER_REFERENCE,)
    top_k: int | None = None
    temperature: float = 1.0
    boundary: bool = False
    pairing: Pairing = "position"
    skip_last: bool = False
    same_tokenizer: bool = False

    @property
    def is_stored(self) -> bool:
        """Whether a stored signal is enough, and no teacher is in memory while the student trains."""
        return self.boundary or self.top_k is not None


class Objective(nn.Module, ABC):
    """The common part of all objectives: ``ObjectiveClass(ObjectiveClass.params_type(...))`` makes one.

    Its parameters, if any, are trained beside the model, saved with the run and left out of an export.

    Attributes:
        counts: by what the trainer divides a step's loss: pairs, or the student's scored tokens or units (spans) of
            the chosen responses.
        sides: the responses of a pair that the policy has to score.
        layout: how units are made.
        teacher: the teacher's distributions that it is given; None where log-probabilities of units are enough.
        generation: which responses are replaced by a model's own; None for the data's.
        objective_learning_rate: step size of its own parameters; None for the run's.
        micro_batch: items of one forward pass, for an objective whose loss depends on its batch mates; None where it
            does not, and as many go together as the memory allows.
    """

    params_type: ClassVar[type[Any]]
    counts: ClassVar[Counted]
    sides: ClassVar[tuple[Side, ...]]
    generation: ClassVar[Generation | None] = None
    layout: Layout
    teacher: TeacherView | None = None
    objective_learning_rate: float | None = None
    micro_batch: int | None = None

    @property
    @abstractmethod
    def needs(self) -> frozenset[Needs]:
        """What must be in a batch beside the policy's own log-probabilities."""


class PairObjective(Objective):
    """An objective of the log-probabilities of units: it never sees a vocabulary."""

    @property
    def needs(self) -> frozenset[Needs]:
        wanted = {Needs.REFERENCE: self.layout.reference, Needs.WEIGHTS: self.layout.weighting}
        return frozenset(need for need, source in wanted.items() if source is not None)

    @abstractmethod
    def forward(self, units: Units) -> Sums:
        """The sums over one micro-batch; ``units`` holds what ``needs`` names."""
