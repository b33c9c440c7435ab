"""Token-level distillation between models that share a tokenizer (docs/method.md#token-level-distillation).

Forward KL is Hinton et al. 2015, reverse KL MiniLLM's, generalised JSD that of GKD (Agarwal et al., ICLR 2024), skewed
KL DistiLLM's (Ko et al., ICML 2024), adaptive KL Wu et al. 2024; the mix with cross-entropy and its normalisation are
DSKD's. GKD's sampling from the student while training is not part of it: the responses are the data's.

Shape legend: R rows of a tile, V vocabulary, B1 buckets of a stored row (`baselines.kept`).
"""

from typing import Annotated, final

import torch
from pydantic import model_validator
from torch import Tensor

from baselines.divergences import DivergenceName, find_divergence
from baselines.kept import buckets
from ctpd.core.config import Config, Positive, PositiveInt, Share, Tunable
from ctpd.core.errors import UserError
from ctpd.objectives.distillation import RowObjective, TeacherView
from ctpd.ops.logit_rows import Top


class TokenKDParams(Config):
    """Defaults: DSKD's scripts, which CTPD's authors took over."""

    divergence: DivergenceName = "forward_kl"
    """Of the teacher's and the student's distribution."""
    kd_rate: Annotated[Share, Tunable((0.1, 0.5, 0.9))] = 0.5
    """Share of the divergence; the rest is cross-entropy."""
    temperature: Annotated[Positive, Tunable((1.0, 2.0, 4.0))] = 2.0
    """Divides both models' logits. GKD's own loss has 1.0."""
    beta: Share = 0.5
    """The teacher's share in the mixture of `generalised_jsd`; 0 is forward KL, 1 reverse KL, as in TRL."""
    skew: Share = 0.1
    """The share of a distribution itself in the mixture it is compared with (skewed KL)."""
    tail_mass: Share = 0.5
    """Of the teacher's distribution, the probability that counts as tail (adaptive KL)."""
    tau_squared: bool = False
    """Multiply the divergence by `temperature ** 2` (Hinton et al.). DSKD and TRL do not."""
    top_k: PositiveInt | None = None
    """Left out for a teacher in memory; else its K likeliest tokens from a stored signal at this temperature and one bucket for the rest. Forward KL only: the others weigh what the student has outside of them."""

    @model_validator(mode="after")
    def _stores_for_forward_kl_only(self) -> "TokenKDParams":
        if self.top_k is not None and self.divergence != "forward_kl":
            raise UserError(
                f"`top_k: {self.top_k}` cannot go with `divergence: {self.divergence}`: what the teacher's stored "
                "signal lacks is bounded for forward KL only",
                fix="Leave out `top_k` (a teacher in memory), or use `divergence: forward_kl`",
            )
        return self


@final
class TokenKD(RowObjective[Tensor | Top]):
    """`(1 - kd_rate) CE + kd_rate D(teacher, student)`, a sum over the scored tokens.

    Rows of the two output heads may differ by padding: columns that only one of the models has are left out of the
    divergence (not of the cross-entropy).
    """

    params_type = TokenKDParams

    def __init__(self, params: TokenKDParams) -> None:
        super().__init__()
        self._divergence = find_divergence(
            params.divergence,
            temperature=params.temperature,
            beta=params.beta,
            skew=params.skew,
            tail_mass=params.tail_mass,
        )
        self.params, self.kd_rate = params, params.kd_rate
        self.teacher = TeacherView(top_k=params.top_k, temperature=params.temperature, same_tokenizer=True)

    def rows(self, logits_RV: Tensor, targets_R: Tensor, teacher: Tensor | Top, is_aligned_R: Tensor) -> Tensor:
        if isinstance(teacher, Top):
            divergence_R = _kept_forward_kl(logits_RV, teacher, temperature=self.params.temperature)
        else:
            width = min(logits_RV.shape[-1], teacher.shape[-1])
            divergence_R = self._divergence(logits_RV[:, :width], teacher[:, :width])
        factor = self.params.temperature**2 if self.params.tau_squared else 1.0
        return factor * divergence_R.masked_fill(~is_aligned_R, 0.0)


def _kept_forward_kl(logits_RV: Tensor, top: Top, *, temperature: float) -> Tensor:
    """Forward KL over the kept tokens and the rest: at most that over the whole vocabulary (data processing)."""
    student_logps_RB1, teacher_RB1 = buckets(logits_RV, top, temperature=temperature)
    return (torch.xlogy(teacher_RB1, teacher_RB1) - teacher_RB1 * student_logps_RB1).sum(-1)
