"""X-Token, NeMo-RL's distillation across tokenizers (arXiv 2605.21699; docs/method.md#x-token): means over the rows of a span.

A span's distribution is the mean over its tokens' rows. P-KL projects the student's into the teacher's vocabulary by a
sparse matrix and compares there; the other two forms compare shared tokens by KL and the sorted rest by L1.

The teacher has to be in memory: the columns that are compared are chosen per batch, the rest is sorted.

Shape legend: G spans of a batch, R spans of one tile, V the student's vocabulary, U the teacher's, K pieces of a token,
E entries of the matrix.
"""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctpd.core.config import Config, NonNegative, Positive, PositiveInt, Tunable
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import DistillationObjective, DistillBatch, LogitTokens, ModelFacts, TeacherView
from ctpd.objectives.groups import shared_groups
from ctpd.objectives.projection import projection, shared_tokens
from ctpd.ops.logit_rows import LogitRows

_EPSILON = 1e-10
_TILE = 32  # spans formed at once


class XTokenParams(Config):
    """Defaults: NeMo-RL's."""

    form: Literal["p_kl", "h_kl", "relaxed_h_kl"] = "p_kl"
    """`p_kl`: the student's distribution is projected into the teacher's vocabulary; `h_kl`: tokens of equal spelling are shared; `relaxed_h_kl`: also those whose first piece is. NeMo calls these two `gold` and `xtoken`."""
    kl_weight: NonNegative = 1.0
    """Factor of the distance, a mean over spans, times the squared temperature."""
    ce_weight: Annotated[NonNegative, Tunable((0.0, 0.1, 1.0))] = 0.1
    """Factor of the cross-entropy."""
    temperature: Annotated[Positive, Tunable((1.0, 2.0, 4.0))] = 1.0
    """Of both distributions."""
    reverse_kl: bool = False
    """The student's distribution comes first."""
    top_k: PositiveInt = 8192
    """Columns that `p_kl` compares: those of the largest teacher logits in the micro-batch."""
    uncommon_top_k: PositiveInt = 8192
    """The other two forms' bound on the length of the sorted rest."""
    micro_batch: PositiveInt = 8
    """Responses that share the columns of `p_kl`. It must divide `pairs_per_step`."""


class _Tile(NamedTuple):
    """The logits of some tokens, and the group of each, counted from the tile's first."""

    logits: Tensor
    group: Tensor


@final
class XToken(DistillationObjective[LogitTokens]):
    """`sum_r S_r (kl_weight KD_r + ce_weight CE_r) / sum_r S_r`; response r has `S_r` spans and `KD_r` is their mean.

    `p_kl` depends on how a batch is cut, by the choice of its columns.
    """

    params_type = XTokenParams
    counts = "units"
    sides = ("chosen",)
    teacher_size: int  # columns of the teacher that are tokens
    entries: Tensor  # [2, E] student's and teacher's id of each entry of the matrix
    weights: Tensor  # [E]
    common: Tensor  # [2, C] shared tokens
    student_rest: Tensor
    teacher_rest: Tensor

    def __init__(self, params: XTokenParams) -> None:
        super().__init__()
        self.params = params
        self.micro_batch = params.micro_batch if params.form == "p_kl" else None
        self.teacher = TeacherView(pairing="none")

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Build the matrix from the spellings of both vocabularies."""
        size = max(index for index, token in enumerate(teacher.tokens) if token) + 1
        self.project(*projection(student, teacher), teacher_size=size)

    def project(self, pieces_VK: Int[Tensor, "V K"], weights_VK: Float[Tensor, "V K"], *, teacher_size: int) -> None:
        """Use this matrix, given by rows: the teacher's ids and their weights, -1 for none."""
        self.teacher_size = teacher_size
        used_VK = pieces_VK >= 0
        self.register_buffer("entries", torch.stack([used_VK.nonzero()[:, 0], pieces_VK[used_VK]]), persistent=False)
        self.register_buffer("weights", weights_VK[used_VK], persistent=False)
        common = shared_tokens(pieces_VK, weights_VK, relaxed=self.params.form == "relaxed_h_kl")
        rests = [
            torch.ones(size).index_fill(0, ids, 0.0).nonzero()[:, 0]
            for size, ids in zip((len(pieces_VK), teacher_size), common, strict=True)
        ]
        for name, buffer in zip(("common", "student_rest", "teacher_rest"), (common, *rests), strict=True):
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, batch: DistillBatch[LogitTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0]
        row_G, ours, theirs = shared_groups(student, teacher)
        columns = self._columns(teacher.rows) if self.params.form == "p_kl" else None
        our_tile = _tiles_of(student.rows.select(ours.token), ours.group, len(row_G))
        their_tile = _tiles_of(teacher.rows.select(theirs.token), theirs.group, len(row_G))

        def of_tile(first: int, last: int) -> Tensor:
            if columns is not None:
                return self._projected(our_tile(first, last), their_tile(first, last), columns, last - first)[:, None]
            return self._shared(our_tile(first, last), their_tile(first, last), last - first)

        tiles = [
            checkpoint(of_tile, first, min(first + _TILE, len(row_G)), use_reentrant=False)
            for first in range(0, len(row_G), _TILE)
        ]
        parts_P = torch.cat(tiles).sum(0) * self.params.temperature**2
        kd = parts_P.sum()
        logps_N = student.rows.logps(student.targets)
        spans_R = torch.bincount(row_G, minlength=batch.num_rows)
        tokens_R = torch.bincount(student.row, minlength=batch.num_rows)
        nll = -(logps_N * (spans_R.to(logps_N.dtype) / tokens_R.clamp(min=1))[student.row]).sum()
        scale = batch.num_pairs / max(len(row_G), 1)
        names = ("kl",) if columns is not None else ("common", "uncommon")
        metrics = {f"kd/{name}": part.detach() * scale for name, part in zip(names, parts_P, strict=True)}
        metrics["kd/nll"] = nll.detach() * scale
        return Sums(self.params.kl_weight * kd + self.params.ce_weight * nll, len(row_G), metrics)

    @torch.no_grad()
    def _columns(self, teacher: LogitRows) -> Int[Tensor, " top_k"]:
        """The columns of the teacher's largest logits in any row."""
        tiles = (teacher[slice(start, start + _TILE)] for start in range(0, len(teacher), _TILE))
        largest = torch.stack([tile[:, : self.teacher_size].amax(0) for tile in tiles]).amax(0)
        return largest.topk(min(self.params.top_k, self.teacher_size)).indices.sort().values

    def _projected(self, ours: _Tile, theirs: _Tile, columns: Tensor, count: int) -> Float[Tensor, " R"]:
        index_U = columns.new_full((self.teacher_size,), -1)
        index_U[columns] = torch.arange(len(columns), device=columns.device)
        kept = index_U[self.entries[1]] >= 0
        source, target = self.entries[0][kept], index_U[self.entries[1][kept]]
        probs = (ours.logits / self.params.temperature).softmax(-1)
        projected = probs.new_zeros(len(probs), len(columns)).index_add(
            1, target, probs[:, source] * self.weights[kept].to(probs.dtype)
        )
        mean = _means(projected, ours.group, count)
        student = (mean / (mean.sum(-1, keepdim=True) + _EPSILON) + _EPSILON).log()
        teacher = _means((theirs.logits[:, columns] / self.params.temperature).log_softmax(-1), theirs.group, count)
        return self._kl(student, teacher)

    def _shared(self, ours: _Tile, theirs: _Tile, count: int) -> Float[Tensor, "R 2"]:
        temperature, size = self.params.temperature, self.teacher_size
        student = _means((ours.logits / temperature).log_softmax(-1), ours.group, count)
        teacher = _means((theirs.logits[:, :size] / temperature).log_softmax(-1), theirs.group, count)
        kl = self._kl(student[:, self.common[0]], teacher[:, self.common[1]])
        length = min(len(self.student_rest), len(self.teacher_rest), self.params.uncommon_top_k)
        rests = (student[:, self.student_rest], teacher[:, self.teacher_rest])
        one, other = (rest.exp().topk(length, dim=-1).values for rest in rests)
        return torch.stack([kl, (one - other).abs().sum(-1)], dim=1)

    def _kl(self, student: Float[Tensor, "R C"], teacher: Float[Tensor, "R C"]) -> Float[Tensor, " R"]:
        first, second = (student, teacher) if self.params.reverse_kl else (teacher, student)
        return (first.exp() * (first - second)).sum(-1)


def _tiles_of(rows: LogitRows, group_K: Int[Tensor, " K"], num_groups: int) -> Callable[[int, int], _Tile]:
    """`(first, last) ->` the logits of the tokens of the groups first, ..., last - 1."""
    bounds = [0, *torch.bincount(group_K, minlength=num_groups).cumsum(0).tolist()]  # tokens before each group

    def tile(first: int, last: int) -> _Tile:
        tokens = slice(bounds[first], bounds[last])
        return _Tile(rows[tokens], group_K[tokens] - first)

    return tile


def _means(rows_KW: Float[Tensor, "K W"], group_K: Int[Tensor, " K"], count: int) -> Float[Tensor, "R W"]:
    sums = rows_KW.new_zeros(count, rows_KW.shape[1]).index_add(0, group_K, rows_KW)
    return sums / torch.bincount(group_K, minlength=count)[:, None]
