"""Universal Logit Distillation (Boizard et al., TMLR 2025, arXiv 2402.12030), as CTPD's authors ran it (docs/method.md#uld).

The k-th token of the student's response is compared with the k-th of the teacher's: the distance is that of the two
sorted distributions, so no vocabulary has to be mapped.

Shape legend: R rows of a tile, V the student's vocabulary.
"""

from typing import Annotated, final

import torch.nn.functional as F
from torch import Tensor

from ctpd.core.config import Config, PositiveInt, Share, Tunable
from ctpd.objectives.distillation import RowObjective, TeacherView, sorted_probabilities
from ctpd.ops.logit_rows import Top


class ULDParams(Config):
    """Defaults: the scripts of CTPD's authors, but for an exact teacher."""

    kd_rate: Annotated[Share, Tunable((0.1, 0.5, 0.9))] = 0.5
    """Share of the distance; the rest is cross-entropy."""
    top_k: PositiveInt | None = None
    """Left out for a teacher in memory; else its K largest probabilities from a stored signal. The distance is then wrong by at most the mass that was dropped, which is recorded."""
    skip_student_eos: bool = False
    """Leave the student's last token out of the distance, as the original code does by default."""


@final
class ULD(RowObjective[Tensor | Top]):
    """`sum_j |sorted softmax(student)_j - sorted softmax(teacher)_j|` of every row that has an aligned one."""

    params_type = ULDParams

    def __init__(self, params: ULDParams) -> None:
        super().__init__()
        self.params, self.kd_rate = params, params.kd_rate
        self.teacher = TeacherView(top_k=params.top_k, skip_last=params.skip_student_eos)

    def rows(self, logits_RV: Tensor, targets_R: Tensor, teacher: Tensor | Top, is_aligned_R: Tensor) -> Tensor:
        student_RV, teacher_RW = sorted_probabilities(logits_RV), sorted_probabilities(teacher)
        missing = student_RV.shape[1] - teacher_RW.shape[1]
        distance_R = (F.pad(student_RV, (0, max(-missing, 0))) - F.pad(teacher_RW, (0, max(missing, 0)))).abs().sum(1)
        return distance_R.masked_fill(~is_aligned_R, 0.0)
