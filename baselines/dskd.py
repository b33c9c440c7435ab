"""Dual-space distillation (Zhang et al., EMNLP 2024, arXiv 2406.17328) of models that share a tokenizer (docs/method.md#dskd).

Two linear maps project hidden states into the other model's space, so that both distributions of a comparison come from
one output head: the teacher's hidden states through the student's, the student's through the teacher's.
`baselines.dskd_cma` does the same for any two tokenizers.

Shape legend: N scored tokens of the student, M of the teacher, R rows of a tile, V the vocabulary of the head in use,
H hidden size.
"""

from typing import Annotated, NamedTuple, final

import torch
from torch import Tensor, nn

from baselines.divergences import DivergenceName, RowDivergence, find_divergence, forward_kl
from ctpd.core.config import Config, Positive, Share, Tunable
from ctpd.core.errors import UserError
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import (
    DistillationObjective,
    DistillBatch,
    LogitTokens,
    ModelFacts,
    TeacherView,
    mixed,
)
from ctpd.ops.logit_rows import LogitRows


class DSKDParams(Config):
    """Defaults: the scripts of DSKD and of CTPD's authors."""

    divergence: DivergenceName = "forward_kl"
    """In the student's space; in the teacher's space it is always forward KL, as published."""
    kd_rate: Annotated[Share, Tunable((0.1, 0.5, 0.9))] = 0.5
    """Share of the three distillation terms; the rest is cross-entropy."""
    temperature: Annotated[Positive, Tunable((1.0, 2.0, 4.0))] = 2.0
    """Divides the logits of both divergences."""
    projector_learning_rate: Positive = 1e-3
    """Learning rate of the projectors."""


@final
class DSKD(DistillationObjective[LogitTokens]):
    """`(1 - kd_rate) CE(z) + kd_rate (CE(q) + D(z, sg(q)) + KL(u || r))` over the student's scored tokens.

    z and u are the models' logits, q the teacher's hidden states in the student's space, r the student's in the
    teacher's. The student's head gets gradients from z alone, the projector to the student's space from CE(q) alone,
    the other one from the last term.
    """

    params_type = DSKDParams
    counts = "tokens"
    sides = ("chosen",)
    t2s: nn.Linear
    s2t: nn.Linear

    def __init__(self, params: DSKDParams) -> None:
        super().__init__()
        self._divergence = find_divergence(params.divergence, temperature=params.temperature)
        self.params, self.objective_learning_rate = params, params.projector_learning_rate
        self.teacher = TeacherView(same_tokenizer=True)

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        self.t2s = nn.Linear(teacher.hidden_size, student.hidden_size)
        self.s2t = nn.Linear(student.hidden_size, teacher.hidden_size)

    def forward(self, batch: DistillBatch[LogitTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0].rows
        check_states((student.rows, self.t2s.out_features), (teacher, self.s2t.out_features))
        is_aligned_N = batch.aligned >= 0
        theirs = teacher.constant().select(batch.aligned.clamp(min=0))
        mapped = LogitRows(projected(self.t2s, theirs.hidden, student.rows), student.rows.head.constant())
        ours = student_space(student.rows, student.targets, mapped, self._divergence)
        s2t_kd_N = teacher_space(projected(self.s2t, student.rows.hidden, theirs), theirs, self.params.temperature)
        t2s_ce, t2s_kd, hits, s2t_kd = (
            part_N.masked_fill(~is_aligned_N, 0.0).sum() for part_N in (ours.t2s_ce, ours.t2s_kd, ours.hit, s2t_kd_N)
        )
        parts = {"t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd, "t2s_accuracy": hits}
        kd = t2s_ce + t2s_kd + s2t_kd
        return mixed(ours.nll.sum(), kd, kd_rate=self.params.kd_rate, batch=batch, **parts)


class StudentSpace(NamedTuple):
    """Terms under the student's head, one a scored token; `hit` is 1 where the mapped teacher's state predicts it."""

    nll: Tensor
    t2s_ce: Tensor
    t2s_kd: Tensor
    hit: Tensor


def student_space(rows: LogitRows, targets_N: Tensor, mapped: LogitRows, divergence: RowDivergence) -> StudentSpace:
    """CE(z), CE(q), D(z, sg(q)) and `argmax q = target`, each [N]; q are the rows of ``mapped``."""

    def terms(logits_RV: Tensor, targets_R: Tensor, mapped_RV: Tensor) -> Tensor:
        return torch.stack(
            [
                _cross_entropy(logits_RV, targets_R),
                _cross_entropy(mapped_RV, targets_R),
                divergence(logits_RV, mapped_RV.detach()),
                (mapped_RV.argmax(-1) == targets_R).to(logits_RV.dtype),
            ],
            dim=1,
        )

    return StudentSpace(*rows.map(terms, targets_N, mapped).unbind(1))


def teacher_space(hidden_MH: Tensor, teacher: LogitRows, temperature: float) -> Tensor:
    """KL(u || r): [M], of the teacher's rows u and the student's hidden states r under the teacher's constant head."""

    def divergence(logits_RV: Tensor, teacher_RV: Tensor) -> Tensor:
        return forward_kl(logits_RV, teacher_RV, temperature=temperature)

    return LogitRows(hidden_MH, teacher.head.constant()).map(divergence, teacher)


def projected(projector: nn.Linear, hidden_NH: Tensor, to: LogitRows) -> Tensor:
    """Hidden states in another model's space, in the dtype of that model's own."""
    states: Tensor = projector(hidden_NH.to(projector.weight.dtype))
    return states.to(to.hidden.dtype)


def check_states(*sides: tuple[LogitRows, int]) -> None:
    """Refuse rows whose hidden states are logits: so it is where the scorer fell back to full logits."""
    if any(rows.hidden.shape[-1] != size for rows, size in sides):
        raise UserError(
            "the method compares hidden states, and one of the models gives logits only (see the warning about its scorer)",
            fix="Use a method that compares distributions, or a model whose last hidden states give its logits",
        )


def _cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    return -logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]
