"""What an objective is, and what it declares, so that no code has to branch on a method's name.

Shape legend: R rows of one batch (first all chosen, then all rejected), U units.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ctpd.core.config import Config
from ctpd.core.roles import Role
from ctpd.ops.spans import Aggregate as Aggregate
from ctpd.ops.weights import Signal, WeightParameters

Granularity = Literal["spans", "tokens"]
Reference = Literal["teacher", "initial"]
Side = Literal["chosen", "rejected"]
BOTH_SIDES: tuple[Side, ...] = ("chosen", "rejected")
Pairing = Literal["none", "position", "edit_distance"]
Counted = Literal["pairs", "tokens", "units"]


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


class Weighting(Config):
    """Which importance weights (``ctpd.ops.weights.span_weights``)."""

    strategy: str
    parameters: WeightParameters = WeightParameters()


class Layout(Config):
    """What ``Units`` are made of: all that must be known to prepare an objective's batches."""

    granularity: Granularity
    """Aligned spans, or the student's own tokens."""
    aggregate: Aggregate = "sum"
    """How the log-probabilities of a unit's tokens become the unit's."""
    end_span: bool = True
    """Whether the end of turn, the last unit of a response that was not cut, is counted."""
    reference: Reference | None = None
    """The reference model: the teacher's SFT model, or the initial policy (the model that this training starts from,
    which for a run is the student's SFT model); None for no reference."""
    weighting: Weighting | None = None
    """The importance weights; None for none, which is weight 1."""


class Generation(Config):
    """Responses that a model generates to replace the data's, before anything is trained."""

    role: Role
    """Whose SFT model generates."""
    side: Side
    """Which responses are replaced."""
    keep_equal: bool = False
    """Whether a response stays that equals the other one of its pair, for an objective that does not compare the two."""


class TeacherView(Config):
    """What an objective must be given of its teachers."""

    models: tuple[Signal, ...] = (Signal.TEACHER_REFERENCE,)
    """Which frozen models; most objectives want one."""
    top_k: int | None = None
    """None for a teacher in memory; else the K likeliest tokens of each row, from a stored signal."""
    temperature: float = 1.0
    """Of the stored distributions; without meaning for a teacher in memory."""
    boundary: bool = False
    """A stored signal of two numbers a token: its log-probability, and that of a boundary after it."""
    pairing: Pairing = "position"
    """How a teacher's token is found for a student's: none, the k-th for the k-th, or by dynamic time warping over the
    edit distance of their strings."""
    skip_last: bool = False
    """The student's last scored token of each response has no aligned token."""
    same_tokenizer: bool = False
    """The objective is defined for models that share a tokenizer only."""

    @property
    def is_stored(self) -> bool:
        """Whether a stored signal is enough, and no teacher is in memory while the student trains."""
        return self.boundary or self.top_k is not None


@dataclass(frozen=True)
class Requirements:
    """What has to be prepared for an objective: data, known without making the module again.

    Attributes:
        layout: how units are made.
        sides: the responses of a pair that the policy scores.
        teacher: the teacher's distributions; None where log-probabilities of units are enough.
        generation: which responses a model generates; None for the data's own.
        micro_batch: items of one forward pass, where the loss depends on which items go together.
    """

    layout: Layout
    sides: tuple[Side, ...]
    teacher: TeacherView | None
    generation: Generation | None
    micro_batch: int | None


class Objective(nn.Module, ABC):
    """The common part of all objectives: ``ObjectiveClass(ObjectiveClass.params_type(...))`` makes one.

    Its parameters, if any, are trained together with the model, saved with the run and left out of an export.

    Attributes:
        counts: by what the trainer divides a step's loss: pairs, or the student's scored tokens or units (spans) of
            the chosen responses.
        sides: the responses of a pair that the policy has to score.
        layout: how units are made.
        teacher: the teacher's distributions that it is given; None where log-probabilities of units are enough.
        generation: which responses are replaced by a model's own; None for the data's.
        objective_learning_rate: learning rate of its own parameters; None for the run's.
        micro_batch: items of one forward pass, for an objective whose loss depends on its batch mates; None where it
            does not, and as many go together as the memory allows.
    """

    params_type: ClassVar[type[Config]]
    counts: ClassVar[Counted]
    sides: ClassVar[tuple[Side, ...]]
    generation: ClassVar[Generation | None] = None
    layout: Layout
    teacher: TeacherView | None = None
    objective_learning_rate: float | None = None
    micro_batch: int | None = None

    @property
    def requirements(self) -> Requirements:
        """What has to be prepared for it."""
        return Requirements(self.layout, self.sides, self.teacher, self.generation, self.micro_batch)


class PairObjective(Objective):
    """An objective of the log-probabilities of units: it never sees a vocabulary."""

    @abstractmethod
    def forward(self, units: Units) -> Sums:
        """The sums over one micro-batch; ``units`` holds the reference and weights that ``layout`` names."""
