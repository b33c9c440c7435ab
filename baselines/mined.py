"""MinED: logits aligned by minimum edit distance (Wan et al., ICLR 2024, as in DSKD's comparison; docs/method.md#mined).

A token of the student is compared with the teacher's distribution where dynamic time warping over the edit distances
of the two models' input tokens gives it exactly one of the teacher's, and the vocabulary's map says that the two are
the same. Elsewhere the token itself is the target.

Shape legend: N scored tokens of the student, R rows of a tile, V the student's vocabulary, W the teacher's, P ids of
the student that some id of the teacher is mapped to.
"""

from collections.abc import Sequence
from typing import Annotated, final

import torch
from torch import Tensor

from ctpd.core.config import Config, Positive, Share, Tunable
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import (
    DistillationObjective,
    DistillBatch,
    LogitTokens,
    ModelFacts,
    TeacherView,
    mixed,
)
from ctpd.text.edit_distance import SPACE_MARKS, nearest_tokens


class MinEDParams(Config):
    """Defaults: DSKD's scripts."""

    kd_rate: Annotated[Share, Tunable((0.1, 0.5, 0.9))] = 0.5
    """Share of the divergence; the rest is cross-entropy."""
    temperature: Annotated[Positive, Tunable((1.0, 2.0, 4.0))] = 2.0
    """Divides both models' logits."""


@final
class MinED(DistillationObjective[LogitTokens]):
    """`(1 - kd_rate) CE(z) + kd_rate KL(target || softmax(z / temperature))`, a sum over the scored tokens.

    The target of an aligned token is the softmax of the teacher's mapped logits: of each id of the student, the logit
    of the first id of the teacher that is mapped to it; ids without one get no probability. Of any other token it is
    the token itself, for which the divergence is the cross-entropy at the temperature.

    The public code has a bug for float32: it writes the targets over the student's logits, and the divergence is 0.
    This is what it computes for 16-bit models.
    """

    params_type = MinEDParams
    counts = "tokens"
    sides = ("chosen",)
    to_student: Tensor
    reached: Tensor
    first: Tensor

    def __init__(self, params: MinEDParams) -> None:
        super().__init__()
        self.params = params
        self.teacher = TeacherView(pairing="edit_distance")

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Map the teacher's vocabulary; `nearest_tokens` says what that costs.

        DEVIATION: the public code reads the map from a file that it does not ship. This one is tokenkit's rule, from
        teacher to student; special tokens are mapped among special tokens, and space marks count as equal.
        """
        self.map_vocabulary(teacher_to_student(student, teacher))

    def map_vocabulary(self, to_student: Sequence[int]) -> None:
        """Use this map: an id of the student for each id of the teacher, -1 for none."""
        to_student_W = torch.tensor(to_student)
        first: dict[int, int] = {}
        for theirs, ours in enumerate(to_student):
            if ours >= 0:
                first.setdefault(ours, theirs)
        self.register_buffer("to_student", to_student_W, persistent=False)
        self.register_buffer("reached", torch.tensor(list(first)), persistent=False)
        self.register_buffer("first", torch.tensor(list(first.values())), persistent=False)

    def forward(self, batch: DistillBatch[LogitTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0]
        index_N = batch.aligned.clamp(min=0)
        # No id of the student is -1: a teacher's token that is mapped to none is never the same.
        is_same_N = (batch.aligned >= 0) & (self.to_student[teacher.inputs[index_N]] == student.inputs)
        theirs = teacher.rows.constant().select(index_N)
        losses_N2 = student.rows.map(self._losses, student.targets, theirs, is_same_N)
        nll, kd = losses_N2.sum(0)
        return mixed(nll, kd, kd_rate=self.params.kd_rate, batch=batch, aligned=is_same_N.sum())

    def _losses(self, logits_RV: Tensor, targets_R: Tensor, teacher_RW: Tensor, is_same_R: Tensor) -> Tensor:
        """[R, 2]: cross-entropy, and the divergence from the target."""
        nll_R = -logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]
        logq_RV = (logits_RV / self.params.temperature).log_softmax(-1)
        logp_RP = (teacher_RW[:, self.first] / self.params.temperature).log_softmax(-1)
        soft_R = (logp_RP.exp() * (logp_RP - logq_RV[:, self.reached])).sum(-1)
        hard_R = -logq_RV.gather(-1, targets_R[:, None])[:, 0]
        return torch.stack([nll_R, torch.where(is_same_R, soft_R, hard_R)], dim=1)


def teacher_to_student(student: ModelFacts, teacher: ModelFacts) -> list[int]:
    """For each column of the teacher's logits the student's id of the nearest spelling, -1 for none."""
    found = [-1] * teacher.vocab_size
    for is_special in (False, True):
        theirs, ours = (_spellings(model, is_special=is_special) for model in (teacher, student))
        for index, nearest in enumerate(nearest_tokens(theirs, ours).tolist()):
            if nearest >= 0:
                found[index] = nearest
    return found


def _spellings(model: ModelFacts, *, is_special: bool) -> list[str]:
    """The special tokens of a model's logits by id, or the other ones; "" for all others."""
    mark = SPACE_MARKS[0]
    return [
        token.replace(SPACE_MARKS[1], mark) if (index in model.special_ids) == is_special else ""
        for index, token in enumerate(model.tokens[: model.vocab_size])
    ]
