"""Approximate likelihood matching (Minixhofer et al. 2025, arXiv 2503.20083) after tokenkit (docs/method.md#alm).

A chunk of text at whose ends both tokenizers have a token boundary has a likelihood under both models. The distance is
that of the two events "this chunk" and "another one", softened by a temperature. No vocabulary has to be mapped, and the teacher is
two numbers a token, stored once: that is exact, and no teacher is in memory in training.

Shape legend: N scored tokens of the student, M of the teacher, R responses, C chunks (aligned spans) of the longest.
"""

import math
from typing import Annotated, Literal, NamedTuple, final

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor

from ctpd.core.config import Config, Positive, Share, Tunable
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import (
    BoundaryTokens,
    DistillationObjective,
    DistillBatch,
    ModelFacts,
    TeacherView,
)
from ctpd.ops.boundaries import boundary_ids, boundary_logps
from ctpd.ops.likelihoods import DISTANCES, Distance


class ALMParams(Config):
    """Defaults: what tokenkit's documentation recommends, as the mean of its losses `[sft, alm_unconstrained]`."""

    kd_rate: Annotated[Share, Tunable((0.1, 0.5, 0.9))] = 0.5
    """Share of the distance; the rest is cross-entropy."""
    distance: Distance = "binary_ce"
    """Of two likelihoods; `binary_ce` is the paper's."""
    temperature: Annotated[Positive, Tunable((1.0, 10.0, 100.0))] = 100.0
    """Divides log-likelihoods before the distance is taken; `binary_kl_temp_limit` is its limit."""
    append_space: bool = True
    """A chunk's likelihood includes that of a word boundary after it, so that a chunk which a tokenizer can only end by a token that goes on is not taken for a likely one."""
    merge_threshold: Annotated[float, Ge(0), Lt(1)] | None = 0.1
    """A chunk is merged with the next one as long as the teacher gives a boundary after it no more than this probability; null for chunks as they are."""
    weight: Literal["chunk_count", "token_count"] = "chunk_count"
    """Each chunk weighs 1, or as many as it has tokens of the teacher."""
    double_merge_denominator: bool = False
    """Replication switch: divide by the number of chunks merged twice, as tokenkit does, which makes the loss larger than a mean."""

    @model_validator(mode="after")
    def _merges_if_asked_about_it(self) -> "ALMParams":
        if self.double_merge_denominator and self.merge_threshold is None:
            raise ValueError("`double_merge_denominator: true` asks for a `merge_threshold`: nothing is merged here")
        return self


class Chunks(NamedTuple):
    """The chunks of R responses: log-likelihoods, boundaries after their last tokens, and the teacher's numbers of tokens.

    An entry whose `num_tokens` is 0 is no chunk; the other tensors are arbitrary but finite there.
    """

    teacher: Float[Tensor, "R C"]
    student: Float[Tensor, "R C"]
    teacher_boundary: Float[Tensor, "R C"]
    student_boundary: Float[Tensor, "R C"]
    num_tokens: Int[Tensor, "R C"]


@final
class ALM(DistillationObjective[BoundaryTokens]):
    """`sum_r S_r ((1 - kd_rate) CE_r + kd_rate ALM_r) / sum_r S_r`; `S_r` is the number of spans of a response.

    `CE_r` is the mean over its tokens, `ALM_r` over its chunks. Without merging, the ALM part is the mean over all
    chunks of the step, as in tokenkit.

    DEVIATION: with merging, tokenkit divides by the chunks of the step after merging, a number that is not known before
    the teacher's numbers are read. Here a response weighs as much as it has spans, which needs the batch alone.
    """

    params_type = ALMParams
    counts = "units"
    sides = ("chosen",)
    boundary_ids: Tensor

    def __init__(self, params: ALMParams) -> None:
        super().__init__()
        self.params = params
        self.teacher = TeacherView(boundary=True, pairing="none")

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Find the student's tokens that begin with a boundary; the teacher's are in its stored numbers."""
        ids = boundary_ids(student.tokens, student.special_ids)
        self.register_buffer("boundary_ids", torch.tensor(ids, dtype=torch.long), persistent=False)

    def forward(self, batch: DistillBatch[BoundaryTokens]) -> Sums:
        student = batch.student
        logps_N = student.rows.logps(student.targets)
        chunks = _chunks(batch, logps_N, self.boundary_ids, with_boundary=self.params.append_space)
        spans_R = (chunks.num_tokens > 0).sum(1)
        loss_R, weight_R = chunk_losses(chunks, self.params)
        alm = (spans_R * loss_R / weight_R.clamp(min=1)).sum()
        tokens_R = torch.bincount(student.row, minlength=batch.num_rows)
        nll = -(logps_N * (spans_R.to(logps_N.dtype) / tokens_R.clamp(min=1))[student.row]).sum()
        count = int(spans_R.sum())
        gap = ((chunks.teacher - chunks.student).abs() * (chunks.num_tokens > 0)).sum()
        scale = batch.num_pairs / max(count, 1)
        parts = {"nll": nll, "alm": alm, "gap": gap}
        metrics = {f"kd/{name}": value.detach() * scale for name, value in parts.items()}
        return Sums((1.0 - self.params.kd_rate) * nll + self.params.kd_rate * alm, count, metrics)


def chunk_losses(chunks: Chunks, params: ALMParams) -> tuple[Float[Tensor, " R"], Int[Tensor, " R"]]:
    """The sum of the distances of each response's chunks, and the weight that it is to be divided by."""
    groups, weight_RC = chunks, chunks.num_tokens
    if params.merge_threshold is not None:
        groups, group_RC = _merged(chunks, params.merge_threshold)
        weight_RC = groups.num_tokens
        if params.double_merge_denominator:
            twice_RC = groups.num_tokens.masked_fill(chunks.num_tokens == 0, 0)
            weight_RC = torch.zeros_like(weight_RC).scatter_add(1, group_RC, twice_RC)
    teacher_RC, student_RC, valid_RC = groups.teacher, groups.student, groups.num_tokens > 0
    if params.append_space:
        teacher_RC = teacher_RC + groups.teacher_boundary
        student_RC = student_RC + groups.student_boundary
    # Where there is no chunk, any finite log-probability will do: its distance is dropped.
    teacher_RC, student_RC = (logp_RC.masked_fill(~valid_RC, -1.0) for logp_RC in (teacher_RC, student_RC))
    distance_RC = DISTANCES[params.distance](teacher_RC, student_RC, params.temperature)
    if params.weight == "token_count":
        return (distance_RC * groups.num_tokens).sum(1), weight_RC.sum(1)
    return (distance_RC * valid_RC).sum(1), (weight_RC > 0).sum(1)


def _chunks(batch: DistillBatch[BoundaryTokens], logps_N: Tensor, ids: Tensor, *, with_boundary: bool) -> Chunks:
    student, teacher = batch.student, batch.teachers[0]
    width = 1 + int(torch.maximum(student.unit.max(), teacher.unit.max()))
    shape = (batch.num_rows, width)

    def table(values: Tensor, index: Tensor) -> Tensor:
        return values.new_zeros(math.prod(shape)).scatter_add(0, index, values).view(shape)

    ours_N, theirs_M = student.row * width + student.unit, teacher.row * width + teacher.unit
    last, their_last = _last_of_each(ours_N), _last_of_each(theirs_M)
    following = student.every.select(student.position[last])
    boundary = boundary_logps(following, ids) if with_boundary else logps_N.new_zeros(len(last))
    theirs_logps_M, their_boundary_M = teacher.logps.to(logps_N.dtype), teacher.boundary_logps.to(logps_N.dtype)
    shared_RC = table(torch.ones_like(ours_N), ours_N) > 0
    return Chunks(
        teacher=table(theirs_logps_M, theirs_M).clamp(max=0.0),
        student=table(logps_N, ours_N).clamp(max=0.0),
        teacher_boundary=table(their_boundary_M[their_last], theirs_M[their_last]),
        student_boundary=table(boundary, ours_N[last]),
        num_tokens=table(torch.ones_like(theirs_M), theirs_M) * shared_RC,
    )


def _last_of_each(index_N: Int[Tensor, " N"]) -> Int[Tensor, " L"]:
    """The indices at which a run of equal numbers ends: the last token of each chunk."""
    is_last_N = torch.ones_like(index_N, dtype=torch.bool)
    is_last_N[:-1] = index_N[1:] != index_N[:-1]
    return is_last_N.nonzero()[:, 0]


def _merged(chunks: Chunks, threshold: float) -> tuple[Chunks, Tensor]:
    """Chunks merged with the ones after them until one closes; the second result is each chunk's group.

    Chunk c belongs to group g = the number of chunks before c after which the teacher expects a boundary.
    """
    closes_RC = (chunks.teacher_boundary.exp() > threshold).long()
    group_RC = closes_RC.cumsum(1) - closes_RC
    valid_RC = chunks.num_tokens > 0
    column_RC = torch.arange(chunks.num_tokens.shape[1], device=group_RC.device).expand_as(group_RC)
    last_RC = torch.zeros_like(group_RC).scatter_reduce(1, group_RC, column_RC * valid_RC, "amax")

    def summed(values_RC: Tensor) -> Tensor:
        return torch.zeros_like(values_RC).scatter_add(1, group_RC, values_RC.masked_fill(~valid_RC, 0))

    groups = Chunks(
        teacher=summed(chunks.teacher),
        student=summed(chunks.student),
        teacher_boundary=chunks.teacher_boundary.gather(1, last_RC),
        student_boundary=chunks.student_boundary.gather(1, last_RC),
        num_tokens=summed(chunks.num_tokens),
    )
    return groups, group_RC
