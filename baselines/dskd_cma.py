"""Dual-space distillation with cross-model attention (Zhang et al., EMNLP 2024, arXiv 2406.17328; docs/method.md#dskd-with-cross-model-attention).

Where the tokenizers differ, tokens of the two models are not aligned one to one. Attention over the tokens of one
response, with the embeddings of (input, target) as queries and keys, mixes the teacher's hidden states for each token
of the student, and the student's for each token of the teacher. The rest is `baselines.dskd`.

Shape legend: R responses, S scored tokens of the student's longest response, U of the teacher's, N and M all scored
tokens of the student and the teacher, H hidden size of the student, K of the teacher, P positions.
"""

import math
from typing import Annotated, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from baselines.divergences import DivergenceName, find_divergence
from baselines.dskd import check_states, student_space, teacher_space
from ctpd.core.config import Config, Positive, PositiveInt, Share, Tunable
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import (
    DistillationObjective,
    DistillBatch,
    LogitTokens,
    ModelFacts,
    TeacherView,
    Tokens,
    mixed,
)
from ctpd.ops.logit_rows import LogitRows

# Finite, so that a padded row of the attention, which is not used, has no NaN in its gradient.
_MASKED = -1e5


class DSKDCMAParams(Config):
    """Defaults: the scripts of DSKD and of CTPD's authors, but for `std_scope`."""

    divergence: DivergenceName = "forward_kl"
    """In the student's space; in the teacher's space it is always forward KL, as published."""
    kd_rate: Annotated[Share, Tunable((0.1, 0.5, 0.9))] = 0.5
    """Share of the three distillation terms; the rest is cross-entropy."""
    temperature: Annotated[Positive, Tunable((1.0, 2.0, 4.0))] = 2.0
    """Divides the logits of both divergences."""
    projector_learning_rate: Positive = 1e-3
    """Learning rate of the projectors."""
    std_scope: Literal["valid", "all"] = "valid"
    """What the teacher's embeddings and hidden states are normalised by. `valid`: the standard deviation over the scored tokens of each response. `all`: over all positions of the batch, prompt and padding included, as the public code does; the loss of a response then depends on its batch mates."""
    micro_batch: PositiveInt = 8
    """Responses that share the deviations of `std_scope: all`. It must divide `pairs_per_step`."""


class _Normalised(NamedTuple):
    """The teacher's side of the attention: what is attended to, and what is mixed."""

    keys: Tensor  # [M, 2K]
    values: Tensor  # [M, K]


@final
class DSKDCMA(DistillationObjective[LogitTokens]):
    """`(1 - kd_rate) CE(z) + kd_rate (CE(q) + 1[argmax q = target] D(z, sg(q)) + sum_teacher KL(u || r))`.

    All terms are sums, the last one over the teacher's scored tokens; all are divided by the student's. Embeddings get
    no gradient; the query's projector gets it from CE(q) and from the last term.

    DEVIATION: with `std_scope: valid`, the default, a response's loss does not depend on its batch mates.
    """

    params_type = DSKDCMAParams
    counts = "tokens"
    sides = ("chosen",)
    query: nn.Linear
    t2s: nn.Linear
    s2t: nn.Linear

    def __init__(self, params: DSKDCMAParams) -> None:
        super().__init__()
        self._divergence = find_divergence(params.divergence, temperature=params.temperature)
        self.params, self.objective_learning_rate = params, params.projector_learning_rate
        self.micro_batch = params.micro_batch if params.std_scope == "all" else None
        self.teacher = TeacherView(pairing="none")

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        self.query = nn.Linear(2 * student.hidden_size, 2 * teacher.hidden_size)
        self.t2s = nn.Linear(teacher.hidden_size, student.hidden_size)
        self.s2t = nn.Linear(student.hidden_size, teacher.hidden_size)

    def forward(self, batch: DistillBatch[LogitTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0]
        check_states((student.rows, self.t2s.out_features), (teacher.rows, self.s2t.out_features))
        theirs = teacher.rows.constant()
        t2s_NH, s2t_MK = self._attend(student, teacher, batch.num_rows)
        mapped = LogitRows(t2s_NH.to(student.rows.hidden.dtype), student.rows.head.constant())
        ours = student_space(student.rows, student.targets, mapped, self._divergence)
        t2s_ce, t2s_kd = ours.t2s_ce.sum(), (ours.hit * ours.t2s_kd).sum()
        s2t_kd = teacher_space(s2t_MK.to(theirs.hidden.dtype), theirs, self.params.temperature).sum()
        parts = {"t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd, "t2s_accuracy": ours.hit.sum()}
        kd = t2s_ce + t2s_kd + s2t_kd
        return mixed(ours.nll.sum(), kd, kd_rate=self.params.kd_rate, batch=batch, **parts)

    def _attend(self, student: LogitTokens, teacher: LogitTokens, num_rows: int) -> tuple[Tensor, Tensor]:
        """[N, H] and [M, K]: the other model's states for each token. In float32: 16 bits cannot hold the mask."""
        ours, theirs = _Grid(student, num_rows), _Grid(teacher, num_rows)
        with torch.autocast(student.row.device.type, enabled=False):
            normal = self._normalised(teacher, num_rows)
            query_NE, value_NK = self.query(_pair(student)), self.s2t(_wide(student.rows.hidden))
            scores_RSU = ours.padded(query_NE) @ theirs.padded(normal.keys).mT / math.sqrt(normal.keys.shape[-1])
            scores_RSU = scores_RSU.masked_fill(~(ours.used[:, :, None] & theirs.used[:, None, :]), _MASKED)
            t2s_RSH = scores_RSU.softmax(-1) @ theirs.padded(self.t2s(normal.values))
            s2t_RUK = scores_RSU.mT.softmax(-1) @ ours.padded(value_NK)
        return ours.flat(t2s_RSH), theirs.flat(s2t_RUK)

    @torch.no_grad()
    def _normalised(self, teacher: LogitTokens, num_rows: int) -> _Normalised:
        keys_ME, hidden_MK = _pair(teacher), _wide(teacher.rows.hidden)
        targets_MK = keys_ME[:, keys_ME.shape[1] // 2 :]
        if self.params.std_scope == "valid":
            scales = [response_std(x, teacher.row, num_rows) for x in (keys_ME, targets_MK, hidden_MK)]
        else:
            scales = _public_std(teacher, keys_ME)
        return _Normalised(keys_ME / scales[0], hidden_MK / scales[2] + targets_MK / scales[1])


class _Grid:
    """The scored tokens of one model as a padded table `[R, S]`."""

    def __init__(self, tokens: Tokens, num_rows: int) -> None:
        self._at = (tokens.row, tokens.index)
        self._shape = (num_rows, int(tokens.index.max()) + 1)
        self.used = torch.zeros(self._shape, dtype=torch.bool, device=tokens.row.device)
        self.used[self._at] = True

    def padded(self, values_NX: Tensor) -> Tensor:
        return values_NX.new_zeros(*self._shape, values_NX.shape[-1]).index_put(self._at, values_NX)

    def flat(self, values_RSX: Tensor) -> Tensor:
        return values_RSX[self._at]


def response_std(values_NX: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
    """[N, 1]: of each token's response, the unbiased standard deviation over all elements of its tokens."""
    size_R = row_N.bincount(minlength=num_rows).to(values_NX.dtype) * values_NX.shape[1]
    zeros_R = values_NX.new_zeros(num_rows)
    mean_N = (zeros_R.index_add(0, row_N, values_NX.sum(1)) / size_R)[row_N]
    squares_R = zeros_R.index_add(0, row_N, (values_NX - mean_N[:, None]).square().sum(1))
    return (squares_R / (size_R - 1.0)).sqrt()[row_N, None]


def _public_std(teacher: LogitTokens, keys_ME: Tensor) -> list[Tensor]:
    """Of keys, targets, hidden states: the standard deviation over all positions; one that is not scored has id 0."""
    rest = len(teacher.every) - len(keys_ME)
    pad_K = _wide(teacher.embed(torch.zeros_like(teacher.targets[:1])))[0]
    keys_PE = torch.cat([keys_ME, torch.cat([pad_K, pad_K]).expand(rest, -1)])
    return [x.std() for x in (keys_PE, keys_PE[:, len(pad_K) :], _wide(teacher.every.hidden))]


def _pair(tokens: LogitTokens) -> Tensor:
    """[N, 2H] constant embeddings of each token's predecessor and of itself."""
    return _wide(torch.cat([tokens.embed(tokens.inputs), tokens.embed(tokens.targets)], dim=-1)).detach()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
