"""The distillation family's shared part: what an objective over whole distributions is given, and what it declares.

All of them see *scored tokens*: the tokens of the responses, the end of turn included, each with the row of logits
that predicts it. Logits are computed tile by tile (`ctpd.ops.logit_rows`); none of these objectives builds a tensor
[R, T, V].

Shape legend: B pairs, N scored tokens of the student, M of the teacher, R rows (responses) of a batch, T tokens of the
longest row, V vocabulary, K stored tokens of a distribution.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctpd.objectives.base import Layout, Objective, Sums
from ctpd.objectives.base import TeacherView as TeacherView
from ctpd.ops.logit_rows import LogitRows, Top, TopRows


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The scored tokens of one model in a batch, response after response, in order.

    Attributes:
        targets: the token itself.
        inputs: the token before it, at the position that predicts it.
        row: the response it belongs to, in [0, R); chosen responses first.
        unit: its span inside the response; both models' tokens of a span have the same number.
    """

    targets: Int[Tensor, " N"]
    inputs: Int[Tensor, " N"]
    row: Int[Tensor, " N"]
    unit: Int[Tensor, " N"]

    @property
    def is_last(self) -> Bool[Tensor, " N"]:
        """Whether a token is the last scored one of its response."""
        last_N = torch.ones_like(self.row, dtype=torch.bool)
        last_N[:-1] = self.row[1:] != self.row[:-1]
        return last_N

    @property
    def index(self) -> Int[Tensor, " N"]:
        """The index of each token among the scored ones of its response, from 0."""
        index_N = torch.arange(len(self.row), device=self.row.device)
        starts_N = torch.ones_like(self.row, dtype=torch.bool)
        starts_N[1:] = self.row[1:] != self.row[:-1]
        return index_N - torch.cummax(torch.where(starts_N, index_N, 0), dim=0).values


@final
@dataclass(frozen=True, kw_only=True)
class LogitTokens(Tokens):
    """The scored tokens of a model in memory: the student, or a teacher that is not stored.

    Attributes:
        rows: N rows of logits, each predicting a token.
        every: the rows of all R * T positions, prompt and padding included.
        position: the token's own index among all R * T positions: `every` there predicts what follows the token.
        embed: token ids -> input embeddings, without gradient.
    """

    rows: LogitRows
    every: LogitRows
    position: Int[Tensor, " N"]
    embed: Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class TopTokens(Tokens):
    """The scored tokens of a teacher of which the likeliest tokens are stored (`TeacherView.top_k`)."""

    rows: TopRows


@final
@dataclass(frozen=True, kw_only=True)
class BoundaryTokens(Tokens):
    """The scored tokens of a teacher of which two log-probabilities a token are stored (`TeacherView.boundary`).

    Attributes:
        logps: of the token.
        boundary_logps: of a word boundary after the token.
    """

    logps: Float[Tensor, " N"]
    boundary_logps: Float[Tensor, " N"]


TeacherTokens = TypeVar("TeacherTokens", bound=Tokens)
_Teacher_co = TypeVar("_Teacher_co", bound=Tokens, covariant=True)


@final
@dataclass(frozen=True, kw_only=True)
class DistillBatch(Generic[_Teacher_co]):
    """One batch of B pairs: R = B rows where only the chosen responses are scored, else 2B, the chosen first.

    Attributes:
        student: its scored tokens.
        teachers: those of each teacher of `TeacherView.models`, of the type that the view asks for.
        aligned: for each token of the student, the index of its aligned token among the teacher's; -1 for none
            (`TeacherView.pairing`).
        num_pairs, num_rows: B and R.
    """

    student: LogitTokens
    teachers: tuple[_Teacher_co, ...]
    aligned: Int[Tensor, " N"]
    num_pairs: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model before training: its vocabulary as strings by id, and sizes.

    `tokens[i]` is the tokenizer's own spelling of id i (with its space marker), "" for an id without a token.
    """

    tokens: Sequence[str]
    special_ids: frozenset[int]
    vocab_size: int  # columns of the logits
    hidden_size: int


class DistillationObjective(Objective, Generic[TeacherTokens]):
    """An objective over distributions; `teacher` says of which models, and is never None.

    The type parameter is what `teacher` makes of each of them: `LogitTokens` for a teacher in memory, `TopTokens` for
    `top_k`, `BoundaryTokens` for `boundary`.
    """

    layout = Layout(granularity="spans")

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Prepare what depends on both models: maps of vocabularies, projectors. Called once, after seeding."""

    @abstractmethod
    def forward(self, batch: DistillBatch[TeacherTokens]) -> Sums:
        """The sums over one micro-batch."""


TeacherRow = TypeVar("TeacherRow", Tensor, Top, Tensor | Top)


class RowObjective(DistillationObjective[LogitTokens | TopTokens], Generic[TeacherRow]):
    """A mix of cross-entropy and a loss of each row against its aligned row: `(1 - kd_rate) CE + kd_rate KD`.

    The type parameter is what `rows` gets of the teacher: `Tensor` (logits) for a teacher in memory, `Top` for a stored
    one (`TeacherView.top_k`), `Tensor | Top` if a parameter decides.

    The sum over the student's scored tokens, divided by their number over the step: the exact mean over tokens,
    also where micro-batches differ in length (docs/method.md#shared-formulation).
    """

    counts = "tokens"
    sides = ("chosen",)
    kd_rate: float

    @abstractmethod
    def rows(
        self, logits_RV: Float[Tensor, "R V"], targets_R: Int[Tensor, " R"], teacher: TeacherRow, is_aligned_R: Tensor
    ) -> Float[Tensor, " R"]:
        """The loss of each row against the teacher's; without an aligned token `teacher` holds another token's row."""

    def forward(self, batch: DistillBatch[LogitTokens | TopTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0]

        def both(logits_RV: Tensor, targets_R: Tensor, theirs: TeacherRow, is_aligned_R: Tensor) -> Tensor:
            nll_R = -logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]
            return torch.stack([nll_R, self.rows(logits_RV, targets_R, theirs, is_aligned_R)], dim=1)

        theirs = teacher.rows.select(batch.aligned.clamp(min=0))
        losses_N2 = student.rows.map(both, student.targets, theirs, batch.aligned >= 0)
        nll, kd = losses_N2[:, 0].sum(), losses_N2[:, 1].sum()
        return mixed(nll, kd, kd_rate=self.kd_rate, batch=batch)


def mixed(nll: Tensor, kd: Tensor, *, kd_rate: float, batch: DistillBatch[Tokens], **parts: Tensor) -> Sums:
    """`(1 - kd_rate) nll + kd_rate kd` over the scored tokens of the chosen responses; logs both per token."""
    count = chosen_tokens(batch)
    loss = (1.0 - kd_rate) * nll + kd_rate * kd
    return Sums(loss, count, per_token(batch, nll=nll, kd=kd, **parts))


def chosen_tokens(batch: DistillBatch[Tokens]) -> int:
    """The number of the student's scored tokens in the chosen responses."""
    return int((batch.student.row < batch.num_pairs).sum())


def per_token(batch: DistillBatch[Tokens], **sums: Tensor) -> dict[str, Tensor]:
    """Metrics `kd/NAME`: means over the micro-batch's chosen tokens, times its pairs (`Sums.metrics`)."""
    scale = batch.num_pairs / max(chosen_tokens(batch), 1)
    return {f"kd/{name}": value.detach() * scale for name, value in sums.items()}


def sorted_probabilities(rows: Tensor | Top) -> Float[Tensor, "R W"]:
    """Probabilities, largest first: all of them, or those that were kept."""
    return rows.logps.exp() if isinstance(rows, Top) else rows.softmax(-1).sort(-1, descending=True).values
