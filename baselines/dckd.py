"""Distilling from a preference-tuned teacher on both responses of a pair: DCKD (Gao et al., ICLR 2025; docs/method.md#dckd).

The teacher is the preference-tuned model. Both models' distributions are reduced to the teacher's K likeliest tokens
and one bucket for the rest; the student learns them on the chosen and on the rejected response.

Shape legend: N scored tokens, R rows of a tile, V vocabulary.
"""

from typing import Annotated, final

import torch
from torch import Tensor

from baselines.kept import buckets
from ctpd.core.config import Config, NonNegative, PositiveInt, Tunable
from ctpd.objectives.base import BOTH_SIDES, Sums
from ctpd.objectives.distillation import (
    DistillationObjective,
    DistillBatch,
    TeacherView,
    TopTokens,
    chosen_tokens,
    per_token,
)
from ctpd.ops.logit_rows import Top
from ctpd.ops.weights import Signal

# The public code's floors of a probability: of either side's, and once more of the student's.
_FLOOR, _STUDENT_FLOOR = 1e-8, 1e-7


class DCKDParams(Config):
    """Defaults: equal parts. The public configuration has zeros and leaves them to a recipe that is not public."""

    sft_weight: NonNegative = 1.0
    """Factor of the chosen response's cross-entropy."""
    distillation_weight: Annotated[NonNegative, Tunable((0.3, 1.0, 3.0))] = 1.0
    """Factor of both divergences."""
    chosen_weight: NonNegative = 1.0
    """Factor of the divergence on the chosen response."""
    rejected_weight: NonNegative = 1.0
    """Factor of the divergence on the rejected response."""
    top_k: PositiveInt = 50
    """How many of the teacher's likeliest tokens are stored."""


@final
class DCKD(DistillationObjective[TopTokens]):
    """`sft NLL(chosen) + distillation (chosen FKL(chosen) + rejected FKL(rejected))`.

    DEVIATION: all are sums, divided by the step's chosen tokens. The public code takes the mean of each over the tokens
    of a micro-batch, which weighs a token by the lengths of its batch mates.
    """

    params_type = DCKDParams
    counts = "tokens"
    sides = BOTH_SIDES

    def __init__(self, params: DCKDParams) -> None:
        super().__init__()
        self.params = params
        self.teacher = TeacherView(models=(Signal.TEACHER_POSITIVE,), top_k=params.top_k, same_tokenizer=True)

    def forward(self, batch: DistillBatch[TopTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0]

        def both(logits_RV: Tensor, targets_R: Tensor, top: Top, is_aligned_R: Tensor) -> Tensor:
            nll_R = -logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]
            return torch.stack([nll_R, _forward_kl(logits_RV, top).masked_fill(~is_aligned_R, 0.0)], dim=1)

        top = teacher.rows.select(batch.aligned.clamp(min=0))
        losses_N2 = student.rows.map(both, student.targets, top, batch.aligned >= 0)
        is_chosen_N = student.row < batch.num_pairs
        nll = losses_N2[:, 0].masked_fill(~is_chosen_N, 0.0).sum()
        chosen = losses_N2[:, 1].masked_fill(~is_chosen_N, 0.0).sum()
        rejected = losses_N2[:, 1].masked_fill(is_chosen_N, 0.0).sum()
        params = self.params
        kd = params.chosen_weight * chosen + params.rejected_weight * rejected
        loss = params.sft_weight * nll + params.distillation_weight * kd
        return Sums(loss, chosen_tokens(batch), per_token(batch, nll=nll, kd=kd, chosen=chosen, rejected=rejected))


def _forward_kl(logits_RV: Tensor, top: Top) -> Tensor:
    student_logps_RB1, teacher_RB1 = buckets(logits_RV, top)
    teacher_RB1 = teacher_RB1.clamp(_FLOOR, 1.0 - _FLOOR)
    student_RB1 = student_logps_RB1.exp().clamp(_FLOOR, 1.0 - _FLOOR).clamp(min=_STUDENT_FLOOR)
    return (teacher_RB1 * (teacher_RB1.log() - student_RB1.log())).sum(-1)
