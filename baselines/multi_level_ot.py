"""Multi-level optimal transport (Cui et al., AAAI 2025), as in its public code with f = 1 (docs/method.md#multi-level-optimal-transport), and CTPD's port.

The k-th token of the student's response is compared with the k-th of the teacher's, over 50 columns of each model's
distribution: those with most probability over the whole batch, largest first. So responses of one batch change each
other's loss: it has no meaning apart from its micro-batch.

Shape legend: N scored tokens, R rows of a tile, B responses, L tokens of the longest response, V vocabulary, K columns.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctpd.core.config import Config, NonNegative, PositiveInt, Tunable
from ctpd.core.errors import UserError
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import (
    DistillationObjective,
    DistillBatch,
    LogitTokens,
    TeacherView,
    TopTokens,
    chosen_tokens,
    per_token,
)
from ctpd.ops.logit_rows import LogitRows

_Batch = DistillBatch[LogitTokens | TopTokens]

_COLUMNS = 50
# The public code's Sinkhorn distance: temperature of its softmax, regularisation, iterations, and its factor.
_SOFTENING, _REGULARISATION, _ITERATIONS, _SINKHORN_SCALE = 2.0, 0.1, 10, 0.001


class MultiLevelOTParams(Config):
    """Defaults: the public code."""

    ce_weight: NonNegative = 1.0
    """Factor of the cross-entropy."""
    distillation_weight: Annotated[NonNegative, Tunable((0.5, 1.5, 4.5))] = 1.5
    """Factor of all three distances."""
    sequence_weight: NonNegative = 0.1
    """Factor of the second distance, between the rows' softened columns."""
    sinkhorn_weight: NonNegative = 0.1
    """Factor of the third distance, the transport between all rows of two responses."""
    skip_student_eos: bool = True
    """Leave the student's last token out of the distances, as the public code does."""
    top_k: PositiveInt | None = None
    """Left out for a teacher in memory; else its K likeliest tokens from a stored signal. The columns are then each row's own K likeliest, with CTPD's form of the distances: a batch's common columns cannot be stored."""
    ctpd_variant: bool = False
    """Replication switch `mlot_ctpd`: the port of CTPD's authors. Each row's own 50 likeliest columns; prompt, response and padding alike count, paired by absolute position; and the distances, which are means, are added to the *sum* of cross-entropies, which drowns them. Their scripts: both weights 0.5."""
    micro_batch: PositiveInt = 8
    """Responses that share their columns; the public code's batch. It must divide `pairs_per_step`."""

    @model_validator(mode="after")
    def _port_has_its_teacher_in_memory(self) -> "MultiLevelOTParams":
        if self.ctpd_variant and self.top_k is not None:
            raise UserError(
                f"`ctpd_variant: true` cannot go with `top_k: {self.top_k}`: it compares every position, and responses "
                "alone are stored",
                fix="Leave out one of the two",
            )
        return self


class _Columns(NamedTuple):
    """Probabilities of the compared columns; rows past a response are zeros."""

    student: Float[Tensor, "B L K"]
    teacher: Float[Tensor, "B L K"]
    num_aligned: Int[Tensor, " B"]


@final
class MultiLevelOT(DistillationObjective[LogitTokens | TopTokens]):
    """`ce CE + distillation (HAD + sequence SL + sinkhorn SD)`.

    CE is the mean over the micro-batch's tokens, the distances are its means over responses or rows, as published; the
    trainer weighs micro-batches by their tokens, so one micro-batch a step is exactly the public loss.
    """

    params_type = MultiLevelOTParams
    counts = "tokens"
    sides = ("chosen",)

    def __init__(self, params: MultiLevelOTParams) -> None:
        super().__init__()
        self.params, self.micro_batch = params, params.micro_batch
        self.teacher = TeacherView(top_k=params.top_k, skip_last=params.skip_student_eos)

    def forward(self, batch: _Batch) -> Sums:
        params, count = self.params, chosen_tokens(batch)
        in_port_form = params.ctpd_variant or params.top_k is not None
        nll, columns = self._columns(batch)
        had, sl = _hierarchical(columns), _sequence(columns)
        sd = _sinkhorn(columns, in_port_form=in_port_form)
        kd = had + params.sequence_weight * sl + params.sinkhorn_weight * sd
        # The mean over tokens; in the port the sum over tokens is added to the distances.
        ce = nll if params.ctpd_variant else nll / max(count, 1)
        loss = params.ce_weight * ce + params.distillation_weight * kd
        parts = {name: value * count for name, value in {"kd": kd, "had": had, "sl": sl, "sd": sd}.items()}
        return Sums(loss * count, count, per_token(batch, nll=nll, **parts))

    def _columns(self, batch: _Batch) -> tuple[Tensor, _Columns]:
        """The cross-entropy of all of the student's tokens, a sum, and the compared columns of both models."""
        teacher, skip_last = batch.teachers[0], self.params.skip_student_eos
        if isinstance(teacher, TopTokens):
            num_columns = self.params.top_k or _COLUMNS

            def own(logits_RV: Tensor) -> Tensor:
                return _largest(logits_RV, num_columns)

            return _of_responses(batch, own, teacher.rows.logps.exp(), skip_last=skip_last)
        if self.params.ctpd_variant:
            return _of_all_positions(batch, teacher)
        used_N = ~batch.student.is_last if skip_last else torch.ones_like(batch.student.is_last)
        order_K, teacher_order_K = _order(batch.student.rows, used_N), _order(teacher.rows, teacher.row >= 0)
        teacher_NK = teacher.rows.constant().map(lambda logits_RV: _standardised(logits_RV)[:, teacher_order_K])

        def common(logits_RV: Tensor) -> Tensor:
            return _standardised(logits_RV)[:, order_K]

        return _of_responses(batch, common, teacher_NK, skip_last=skip_last)


def _of_responses(
    batch: _Batch, columns_of: Callable[[Tensor], Tensor], teacher_NK: Tensor, *, skip_last: bool
) -> tuple[Tensor, _Columns]:
    """The responses' rows only: cross-entropy of all of the student's tokens; columns without the skipped ones."""
    student, teacher = batch.student, batch.teachers[0]
    used_N = ~student.is_last if skip_last else torch.ones_like(student.is_last)

    def picked(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
        nll_R1 = -logits_RV.log_softmax(-1).gather(-1, targets_R[:, None])
        return torch.cat([nll_R1, columns_of(logits_RV)], dim=1)

    student_N1K = student.rows.map(picked, student.targets)
    indices = (student.row[used_N], student.index[used_N]), (teacher.row, teacher.index)
    length = max(int(index.max()) + 1 if len(index) else 0 for _, index in indices)
    both = [
        values.new_zeros(batch.num_rows, length, values.shape[1]).index_put(where, values)
        for where, values in zip(indices, (student_N1K[used_N, 1:], teacher_NK.to(student_N1K.dtype)), strict=True)
    ]
    num_aligned_B = torch.zeros(batch.num_rows, dtype=torch.long, device=student.row.device)
    num_aligned_B = num_aligned_B.index_add(0, student.row, (batch.aligned >= 0).long())
    width = max(values.shape[-1] for values in both)
    padded = [F.pad(values, (0, width - values.shape[-1])) for values in both]
    return student_N1K[:, 0].sum(), _Columns(padded[0], padded[1], num_aligned_B)


def _of_all_positions(batch: _Batch, teacher: LogitTokens) -> tuple[Tensor, _Columns]:
    """CTPD's port: every position of both inputs, cut to the shorter (the authors pad both to one length)."""
    student = batch.student
    width = min(_COLUMNS, student.every.head.width, teacher.every.head.width)
    student_BLK, teacher_BLK = (
        every.map(lambda logits_RV: _largest(logits_RV, width)).unflatten(0, (batch.num_rows, -1))
        for every in (student.every, teacher.every.constant())
    )
    length = min(student_BLK.shape[1], teacher_BLK.shape[1])
    num_aligned_B = torch.full((batch.num_rows,), length, device=student.row.device)
    columns = _Columns(student_BLK[:, :length], teacher_BLK[:, :length], num_aligned_B)
    return -student.rows.logps(student.targets).sum(), columns


@torch.no_grad()
def _order(rows: LogitRows, used_N: Tensor) -> Int[Tensor, " K"]:
    """The columns with most probability over these rows; each tile gives one row, the sum of its own."""

    def summed(logits_RV: Tensor, used_R: Tensor) -> Tensor:
        return (_standardised(logits_RV) * used_R[:, None]).sum(0, keepdim=True)

    return rows.map(summed, used_N).sum(0).argsort(descending=True)[:_COLUMNS]


def _standardised(logits_RV: Tensor) -> Tensor:
    """Probabilities of logits divided by their standard deviation, which flattens them."""
    return (logits_RV / (logits_RV.std(-1, keepdim=True) + 1e-4)).softmax(-1)


def _largest(logits_RV: Tensor, num_columns: int) -> Tensor:
    return logits_RV.softmax(-1).topk(min(num_columns, logits_RV.shape[-1]), dim=-1).values


def _hierarchical(columns: _Columns) -> Tensor:
    """HAD: the L1 distance of aligned rows, a mean over a response's, then over responses; 0 for a response without any."""
    distance_BL = (columns.student - columns.teacher).abs().sum(-1)
    is_aligned_BL = torch.arange(distance_BL.shape[1], device=distance_BL.device) < columns.num_aligned[:, None]
    means_B = distance_BL.masked_fill(~is_aligned_BL, 0.0).sum(1) / columns.num_aligned.clamp(min=1)
    return means_B.mean()


def _sequence(columns: _Columns) -> Tensor:
    """SL: `-softmax(S) log softmax(T)` of *probabilities*, a mean over all rows, those past a response included."""
    return -(columns.student.softmax(-1) * columns.teacher.log_softmax(-1)).sum(-1).mean()


def _sinkhorn(columns: _Columns, *, in_port_form: bool) -> Tensor:
    """SD: transport between the rows of two responses; a sum over responses, in the port a mean."""
    # Twenty plans of [L, L] live in one response's backward pass: not in all of them at a time.
    costs_B = torch.stack(
        [
            checkpoint(_transport, teacher_LK, student_LK, in_port_form, use_reentrant=False)
            for teacher_LK, student_LK in zip(columns.teacher, columns.student, strict=True)
        ]
    )
    return _SINKHORN_SCALE * (costs_B.mean() if in_port_form else costs_B.sum())


def _transport(teacher_LK: Tensor, student_LK: Tensor, in_port_form: bool) -> Tensor:
    x_LK, y_LK = (teacher_LK / _SOFTENING).softmax(-1), (student_LK / _SOFTENING).softmax(-1)
    cost_LL = torch.cdist(x_LK, y_LK, p=1.0)
    exponent_LL = cost_LL / _REGULARISATION
    plan_LL = (-exponent_LL.clamp(max=10.0)).exp() + 1e-8 if in_port_form else (-exponent_LL).exp()
    for _ in range(_ITERATIONS):
        plan_LL = plan_LL / plan_LL.sum(1, keepdim=True)
        plan_LL = plan_LL / plan_LL.sum(0, keepdim=True)
    return (plan_LL * cost_LL).sum()
