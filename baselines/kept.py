"""A distribution cut to the tokens that were kept of another, and a bucket for all the rest (docs/method.md#stored-distributions).

Shape legend: R rows, V vocabulary, K kept tokens; B1 = K + 1 buckets, the rest last.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ctpd.ops.logit_rows import Top

# The log-probability of a token that a vocabulary does not have: finite, so that 0 times it is 0; its exponential is 0.
_NOTHING = -1e4


class Buckets(NamedTuple):
    """Both models' probabilities of the same K + 1 buckets; the student's as logarithms."""

    student_logps: Float[Tensor, "R B1"]
    teacher: Float[Tensor, "R B1"]


def buckets(logits_RV: Float[Tensor, "R V"], top: Top, *, temperature: float = 1.0) -> Buckets:
    """The student's logits over the buckets of a teacher's stored rows, which are at the same temperature.

    A kept token that the student has no column for counts as not kept.
    """
    width = logits_RV.shape[-1]
    logps_RV = (logits_RV / temperature).log_softmax(-1)
    ids_RK = top.ids.clamp(max=width)
    kept_logps_RK = F.pad(logps_RV, (0, 1), value=_NOTHING).gather(-1, ids_RK)
    # The sum of the other probabilities: 1 minus the sum of the stored ones would lose a small rest to rounding.
    rest_R = F.pad(logps_RV.exp(), (0, 1)).scatter(-1, ids_RK, 0.0).sum(-1)
    rest_logps_R = rest_R.clamp(min=1e-30).log()
    teacher_RK = top.logps.to(logits_RV.dtype).exp().masked_fill(top.ids >= width, 0.0)
    teacher_rest_R = (1.0 - teacher_RK.sum(-1)).clamp(min=0.0)
    return Buckets(
        torch.cat([kept_logps_RK, rest_logps_R[:, None]], dim=1),
        torch.cat([teacher_RK, teacher_rest_R[:, None]], dim=1),
    )
