"""The distillation family's shared part: what an objective over whole distributions is given, and what it declares.

All of them see *scored tokens*: the tokens of the responses, the end of turn included, each with the row of logits
that predicts it. Logits are formed tile by tile (`ctpd.ops.rows`); none of these objectives builds `[B, T, V]`.

Shape legend: N scored tokens of the student, M of the teacher, R rows (responses) of a batch, T tokens of the longest
row, V vocabulary, K entries kept of a distribution.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctpd.objectives.base import Layout, Objective, Sums
from ctpd.objectives.base import TeacherView as TeacherView
from ctpd.ops.rows import LogitRows, Top, TopRows

Distributions = LogitRows | TopRows


class Tokens(NamedTuple):
    """The scored tokens of one model in a batch, row after row, in order.

    Attributes:
        rows: what predicts each: N rows of logits, or of stored distributions; None where neither is asked for.
        targets: the token itself.
        inputs: the token at the predicting position: the one before.
        row: the response it belongs to, in [0, R); chosen responses first.
        unit: its span inside the response; both models' tokens of a span have the same number.
        every: the rows of all R * T positions, prompt and padding included; None for stored distributions.
        input_ids: [R, T] all tokens, padded with 0.
        embed: ids -> input embeddings, without gradient; None for stored distributions.
        columns: stored numbers of each token (`TeacherView.boundary`), or None.
        position: the token's own place among all R * T positions (one after its predictor's): the row of `every` there
            predicts what follows the token. None for stored distributions.
    """

    rows: Distributions | None
    targets: Int[Tensor, " N"]
    inputs: Int[Tensor, " N"]
    row: Int[Tensor, " N"]
    unit: Int[Tensor, " N"]
    every: LogitRows | None = None
    input_ids: Int[Tensor, "R T"] | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    columns: Float[Tensor, "N C"] | None = None
    position: Int[Tensor, " N"] | None = None

    @property
    def is_last(self) -> Bool[Tensor, " N"]:
        """Whether a token is the last scored one of its response."""
        last_N = torch.ones_like(self.row, dtype=torch.bool)
        last_N[:-1] = self.row[1:] != self.row[:-1]
        return last_N

    @property
    def place(self) -> Int[Tensor, " N"]:
        """The place of each token among the scored ones of its response, from 0."""
        index_N = torch.arange(len(self.row), device=self.row.device)
        starts_N = torch.ones_like(self.row, dtype=torch.bool)
        starts_N[1:] = self.row[1:] != self.row[:-1]
        return index_N - torch.cummax(torch.where(starts_N, index_N, 0), dim=0).values


class DistillBatch(NamedTuple):
    """One batch of B pairs: R = B rows where only the chosen responses are scored, else 2B, the chosen first.

    `partner[n]` is the teacher's token for the student's token n, -1 for none (`TeacherView.pairing`).
    """

    student: Tokens
    teachers: tuple[Tokens, ...]
    partner: Int[Tensor, " N"]
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


class DistillationObjective(Objective):
    """An objective over distributions; `teacher` says of whose, and is never None."""

    layout = Layout(granularity="spans")

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Prepare what depends on both models: maps of vocabularies, projectors. Called once, after seeding."""

    @abstractmethod
    def forward(self, batch: DistillBatch) -> Sums:
        """The sums over one micro-batch."""


class RowObjective(DistillationObjective):
    """A mix of cross-entropy and a loss of each row against its partner's: `(1 - kd_rate) CE + kd_rate KD`.

    The sum over the student's scored tokens, divided by their number over the step: the exact mean over tokens,
    also where micro-batches differ in length (BASELINES 0).
    """

    counts = "tokens"
    sides = ("chosen",)
    kd_rate: float

    @abstractmethod
    def rows(
        self, logits_RV: Float[Tensor, "R V"], targets_R: Int[Tensor, " R"], teacher: Tensor | Top, paired_R: Tensor
    ) -> Float[Tensor, " R"]:
        """The loss of each row against its teacher's row, which is another token's where `paired_R` is False."""

    def forward(self, batch: DistillBatch) -> Sums:
        student, teacher = batch.student, batch.teachers[0].rows
        assert isinstance(student.rows, LogitRows)
        assert teacher is not None
        paired_N = batch.partner >= 0

        def both(logits_RV: Tensor, targets_R: Tensor, theirs: Tensor | Top, paired_R: Tensor) -> Tensor:
            nll_R = -logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]
            return torch.stack([nll_R, self.rows(logits_RV, targets_R, theirs, paired_R)], dim=1)

        losses_N2 = student.rows.map(both, student.targets, teacher.select(batch.partner.clamp(min=0)), paired_N)
        nll, kd = losses_N2[:, 0].sum(), losses_N2[:, 1].sum()
        return mixed(nll, kd, kd_rate=self.kd_rate, batch=batch)


def mixed(nll: Tensor, kd: Tensor, *, kd_rate: float, batch: DistillBatch, **parts: Tensor) -> Sums:
    """`(1 - kd_rate) nll + kd_rate kd` over the scored tokens of the chosen responses; logs both per token."""
    count = chosen_tokens(batch)
    loss = (1.0 - kd_rate) * nll + kd_rate * kd
    return Sums(loss, count, per_token(batch, nll=nll, kd=kd, **parts))


def chosen_tokens(batch: DistillBatch) -> int:
    """The scored tokens of the student in the chosen responses: what the trainer divides by."""
    return int((batch.student.row < batch.num_pairs).sum())


def per_token(batch: DistillBatch, **sums: Tensor) -> dict[str, Tensor]:
    """Metrics `kd/NAME`: means over the micro-batch's chosen tokens, weighted by its pairs (`Sums.metrics`)."""
    scale = batch.num_pairs / max(chosen_tokens(batch), 1)
    return {f"kd/{name}": value.detach() * scale for name, value in sums.items()}


def sorted_probabilities(rows: Tensor | Top) -> Float[Tensor, "R W"]:
    """Probabilities, largest first: all of them, or those that were kept."""
    return rows.logps.exp() if isinstance(rows, Top) else rows.softmax(-1).sort(-1, descending=True).values
