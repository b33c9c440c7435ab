"""Advantage-guided distillation for preference alignment: ADPA (Gao et al., ICLR 2025; docs/method.md#adpa).

The student answers by itself; a teacher before and after preference tuning says how much better each next token would
have been. The rejected response of a pair is the student's own (`generation`), also where it is the chosen one; the chosen
one is the data's.

Shape legend: N scored tokens, R rows of a tile, V vocabulary, K kept tokens of the tuned teacher, L of the reference.
"""

from typing import Annotated, final

import torch
from jaxtyping import Float
from torch import Tensor

from ctpd.core.config import Config, NonNegative, PositiveInt, Tunable
from ctpd.objectives.base import BOTH_SIDES, Generation, Sums
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

_FLOOR = 1e-8
# The least probability that a token has which the reference teacher's stored row lacks.
_LEAST_REFERENCE = 1e-7


class ADPAParams(Config):
    """Defaults: equal parts. The public configuration has zeros and leaves them to a recipe that is not public."""

    sft_weight: NonNegative = 1.0
    """Factor of the chosen response's cross-entropy."""
    advantage_weight: Annotated[NonNegative, Tunable((0.3, 1.0, 3.0))] = 1.0
    """Factor of the advantage on the student's own response."""
    top_k: PositiveInt = 50
    """How many of the likeliest tokens are stored of each teacher."""
    clamp: bool = False
    """Replication switch `adpa_as_shipped`: the public code passes advantages through its loader of probabilities, which clamps them to [1e-8, 1 - 1e-8]: a negative advantage vanishes, a large one is 1."""


@final
class ADPA(DistillationObjective[TopTokens]):
    """`sft NLL(chosen) - advantage sum_t sum_a pi(a | s_t) A_t(a)`, a over the tuned teacher's K likeliest tokens.

    `A = log p_tuned - log p_reference`; the student's probabilities are not renormalised over the K. The public code's
    optional penalty on the divergence from the initial student is left out: it is off there.

    DEVIATION: both are sums, divided by the step's chosen tokens; the public code divides each by its own tokens of
    the micro-batch.
    """

    params_type = ADPAParams
    counts = "tokens"
    sides = BOTH_SIDES
    generation = Generation(role="student", side="rejected", keep_equal=True)

    def __init__(self, params: ADPAParams) -> None:
        super().__init__()
        self.params = params
        models = (Signal.TEACHER_POSITIVE, Signal.TEACHER_REFERENCE)
        self.teacher = TeacherView(models=models, top_k=params.top_k, same_tokenizer=True)

    def forward(self, batch: DistillBatch[TopTokens]) -> Sums:
        student, params = batch.student, self.params
        # Both teachers read the same tokens, so an aligned token has the same index in both.
        index_N, is_aligned_N = batch.aligned.clamp(min=0), batch.aligned >= 0
        tuned, reference = (teacher.rows.select(index_N) for teacher in batch.teachers)

        def both(logits_RV: Tensor, targets_R: Tensor, tuned: Top, reference: Top, is_aligned_R: Tensor) -> Tensor:
            logps_RV = logits_RV.log_softmax(-1)
            nll_R = -logps_RV.gather(-1, targets_R[:, None])[:, 0]
            gain_R = _expected_advantage(logps_RV, tuned, reference, clamp=params.clamp)
            return torch.stack([nll_R, gain_R.masked_fill(~is_aligned_R, 0.0)], dim=1)

        losses_N2 = student.rows.map(both, student.targets, tuned, reference, is_aligned_N)
        is_chosen_N = student.row < batch.num_pairs
        nll = losses_N2[:, 0].masked_fill(~is_chosen_N, 0.0).sum()
        kd = -losses_N2[:, 1].masked_fill(is_chosen_N, 0.0).sum()
        loss = params.sft_weight * nll + params.advantage_weight * kd
        return Sums(loss, chosen_tokens(batch), per_token(batch, nll=nll, kd=kd))


def advantages(tuned: Top, reference: Top) -> Float[Tensor, "R K"]:
    """`log p_tuned(a) - log p_reference(a)` of the tuned teacher's kept tokens.

    Where the reference did not keep a token, its probability there is taken for that of the tuned teacher's least
    likely kept token, at least 1e-7.
    """
    same_RKL = tuned.ids[:, :, None] == reference.ids[:, None, :]
    kept_RK = (same_RKL * reference.logps.exp()[:, None, :]).sum(-1)
    least_R1 = tuned.logps.exp().amin(-1, keepdim=True).clamp(min=_LEAST_REFERENCE)
    return tuned.logps - torch.where(same_RKL.any(-1), kept_RK, least_R1).log()


def _expected_advantage(logps_RV: Tensor, tuned: Top, reference: Top, *, clamp: bool) -> Float[Tensor, " R"]:
    width = logps_RV.shape[-1]
    with torch.no_grad():
        stored = (Top(top.ids, top.logps.to(logps_RV.dtype)) for top in (tuned, reference))
        advantage_RK = advantages(*stored)
        # A token without a column of the student's is among the rest, whose advantage is 0.
        advantage_RK = advantage_RK.masked_fill(tuned.ids >= width, 0.0)
    probability_RK = logps_RV.gather(-1, tuned.ids.clamp(max=width - 1)).exp()
    if not clamp:
        return (probability_RK * advantage_RK).sum(-1)
    # The rest's advantage of 0 becomes 1e-8 as well.
    gain_R = (probability_RK * advantage_RK.clamp(_FLOOR, 1.0 - _FLOOR)).sum(-1)
    return gain_R + _FLOOR * (1.0 - probability_RK.sum(-1))
