"""GOLD, TRL's distillation across tokenizers: merged spans, compared sorted or by shared tokens (docs/method.md#gold).

The tokens of a span are merged to one distribution: that of one of them times the probabilities of the others. Both
models' merged distributions are compared as in ULD; in the hybrid form, tokens that both vocabularies have are compared
with each other, and only the rest is sorted.

The teacher has to be in memory: a merged distribution needs whole rows, sorted, and the tokens that both vocabularies
have are most of a vocabulary, so that no few entries of a row bound the hybrid form's error.

Shape legend: N scored tokens of one model, G groups (spans) of a batch, R groups of one tile, V the student's
vocabulary, U the teacher's, M shared tokens.
"""

import math
from typing import Annotated, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor

from ctpd.core.config import Config, NonNegative, Positive, Share, Tunable
from ctpd.core.errors import UserError
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import DistillationObjective, DistillBatch, LogitTokens, ModelFacts, TeacherView
from ctpd.objectives.groups import Grouped, shared_groups
from ctpd.ops.logit_rows import LogitRows

_LOG_EPSILON = math.log(1e-8)  # TRL's lower bound of a probability


class GOLDParams(Config):
    """Defaults: TRL's `GOLDConfig`, but for `merge`, where TRL's is off by one."""

    ce_weight: Annotated[NonNegative, Tunable((0.0, 0.1, 1.0))] = 0.0
    """Factor of the cross-entropy."""
    hybrid: bool = False
    """Compare tokens of equal spelling with each other, and only the rest sorted."""
    beta: Share = 0.5
    """Of the generalised Jensen-Shannon divergence of the shared tokens: 0 is forward KL, 1 reverse KL."""
    matched_weight: NonNegative | None = None
    """Factor of the shared tokens in the hybrid form, given with `unmatched_weight` or not at all; left out, the share of the teacher's vocabulary that is shared."""
    unmatched_weight: NonNegative | None = None
    """Factor of the sorted rest in the hybrid form; left out, the share of the teacher's vocabulary that is not shared."""
    student_temperature: Positive = 1.0
    """Of the student's distributions."""
    teacher_temperature: Positive = 1.0
    """Of the teacher's distributions."""
    skip_end: bool = True
    """Leave out the last token of each side, as TRL does: the end of turn, or, where a response was cut, a token of text."""
    groups: Literal["spans", "positions"] = "spans"
    """Spans of text, or the k-th token with the k-th up to the shorter side (TRL's `use_extended_uld: false`)."""
    merge: Literal["bayesian", "observed"] = "bayesian"
    """`bayesian`: the rows that predict a span's tokens, the last one as the distribution. `observed` is a replication switch: the rows after those, each taken for a prediction of the token it follows, the first one as the distribution; TRL's default."""

    @model_validator(mode="after")
    def _weighs_both_parts_or_none(self) -> "GOLDParams":
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ValueError("`matched_weight` and `unmatched_weight` are given both or not at all")
        return self


class Members(NamedTuple):
    """The tokens of one model in G groups: one of each gives the distribution, the others a factor."""

    base: Int[Tensor, " G"]
    others: Int[Tensor, " O"]
    group_of_others: Int[Tensor, " O"]


@final
class GOLD(DistillationObjective[LogitTokens]):
    """`mean over responses of (ce_weight CE + mean over its groups of the distance)`.

    DEVIATION: TRL's cross-entropy is the mean over the tokens of a micro-batch, and changes with how a batch is cut.
    """

    params_type = GOLDParams
    counts = "pairs"
    sides = ("chosen",)
    matched: Tensor  # [2, M] ids of the shared tokens: the student's, the teacher's
    student_rest: Tensor
    teacher_rest: Tensor

    def __init__(self, params: GOLDParams) -> None:
        super().__init__()
        self.params = params
        self.teacher = TeacherView(pairing="none")
        self._weights = (params.matched_weight or 0.0, params.unmatched_weight or 0.0)  # None: `bind` sets them

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Find the tokens of equal spelling; only the hybrid form uses them."""
        if not self.params.hybrid:
            return
        ours = {token: index for index, token in enumerate(student.tokens) if token}
        pairs = [(ours[token], index) for index, token in enumerate(teacher.tokens) if token in ours]
        if not pairs:
            raise UserError(
                "`hybrid: true` compares tokens of equal spelling, and the two vocabularies share none",
                fix="Use `hybrid: false`",
            )
        matched = torch.tensor(pairs, dtype=torch.long).T
        rests = [
            torch.ones(facts.vocab_size).index_fill(0, ids, 0).nonzero()[:, 0]
            for facts, ids in zip((student, teacher), matched, strict=True)
        ]
        for name, buffer in zip(("matched", "student_rest", "teacher_rest"), (matched, *rests), strict=True):
            self.register_buffer(name, buffer, persistent=False)
        share = len(pairs) / teacher.vocab_size
        if self.params.matched_weight is None:
            self._weights = (share, 1.0 - share)

    def forward(self, batch: DistillBatch[LogitTokens]) -> Sums:
        student, teacher = batch.student, batch.teachers[0]
        row_G, *grouped = shared_groups(
            student, teacher, by_position=self.params.groups == "positions", skip_last=self.params.skip_end
        )
        ours, theirs = (_members(one, first=self.params.merge == "observed") for one in grouped)
        our_rows, their_rows = (_rows_of(tokens, self.params.merge) for tokens in (student, teacher))
        our_factor_G = log_factors(our_rows, student.targets, ours, temperature=self.params.student_temperature)
        with torch.no_grad():
            their_factor_G = log_factors(
                their_rows, teacher.targets, theirs, temperature=self.params.teacher_temperature
            )
        parts_GP = our_rows.select(ours.base).map(
            self._distances, their_rows.select(theirs.base), our_factor_G, their_factor_G
        )
        # A response without any group adds 0 to the mean over responses.
        share_G = 1.0 / torch.bincount(row_G, minlength=batch.num_rows).to(parts_GP.dtype)[row_G]
        parts_P = (parts_GP * share_G[:, None]).sum(0)
        loss, metrics = parts_P[0], {}
        if self.params.hybrid:
            loss = self._weights[0] * parts_P[0] + self._weights[1] * parts_P[1]
            metrics = {"kd/matched": parts_P[0].detach(), "kd/unmatched": parts_P[1].detach()}
        metrics["kd/distance"] = loss.detach()
        if self.params.ce_weight > 0.0:
            nll = _mean_nlls(student, num_rows=batch.num_rows).sum()
            loss = loss + self.params.ce_weight * nll
            metrics["kd/nll"] = nll.detach()
        return Sums(loss, batch.num_pairs, metrics)

    def _distances(
        self, ours_RV: Tensor, theirs_RU: Tensor, our_factor_R: Tensor, their_factor_R: Tensor
    ) -> Float[Tensor, "R P"]:
        """Of each group: one distance, or that of the shared tokens and that of the rest."""
        ours_RV = (ours_RV / self.params.student_temperature).log_softmax(-1) + our_factor_R[:, None]
        theirs_RU = (theirs_RU / self.params.teacher_temperature).log_softmax(-1) + their_factor_R[:, None]
        if not self.params.hybrid:
            return sorted_distance(ours_RV.exp(), theirs_RU.exp())[:, None]
        matched_R = _divergence(ours_RV[:, self.matched[0]], theirs_RU[:, self.matched[1]], self.params.beta)
        rest_R = torch.zeros_like(matched_R)
        if len(self.student_rest) and len(self.teacher_rest):
            rest_R = sorted_distance(ours_RV[:, self.student_rest].exp(), theirs_RU[:, self.teacher_rest].exp())
        return torch.stack([matched_R, rest_R], dim=1)


def sorted_distance(ours_RV: Float[Tensor, "R V"], theirs_RU: Float[Tensor, "R U"]) -> Float[Tensor, " R"]:
    """`sum_j |a_j - b_j|` of both rows sorted, largest first, the shorter one padded with 0."""
    ours_RV, theirs_RU = (row.sort(-1, descending=True).values for row in (ours_RV, theirs_RU))
    missing = ours_RV.shape[1] - theirs_RU.shape[1]
    return (F.pad(ours_RV, (0, max(-missing, 0))) - F.pad(theirs_RU, (0, max(missing, 0)))).abs().sum(-1)


def _divergence(ours_RM: Float[Tensor, "R M"], theirs_RM: Float[Tensor, "R M"], beta: float) -> Float[Tensor, " R"]:
    """Generalised Jensen-Shannon divergence of log-probabilities that need not add up to 1; then it may be negative."""
    ours_RM, theirs_RM = ours_RM.clamp(min=_LOG_EPSILON), theirs_RM.clamp(min=_LOG_EPSILON)
    if beta == 0.0:
        return (theirs_RM.exp() * (theirs_RM - ours_RM)).sum(-1)
    if beta == 1.0:
        return (ours_RM.exp() * (ours_RM - theirs_RM)).sum(-1)
    middle_RM = torch.logaddexp(ours_RM + math.log1p(-beta), theirs_RM + math.log(beta))
    theirs = theirs_RM.exp() * (theirs_RM - middle_RM)
    ours = ours_RM.exp() * (ours_RM - middle_RM)
    return (beta * theirs + (1.0 - beta) * ours).sum(-1)


def log_factors(
    rows: LogitRows, targets_N: Int[Tensor, " N"], members: Members, *, temperature: float
) -> Float[Tensor, " G"]:
    """The log-probability of each group's tokens other than the one that gives the distribution."""

    def logps(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
        return (logits_RV / temperature).log_softmax(-1).gather(-1, targets_R[:, None])[:, 0]

    logps_O = rows.select(members.others).map(logps, targets_N[members.others]).clamp(min=_LOG_EPSILON)
    return logps_O.new_zeros(len(members.base)).index_add(0, members.group_of_others, logps_O)


def _rows_of(tokens: LogitTokens, merge: Literal["bayesian", "observed"]) -> LogitRows:
    return tokens.every.select(tokens.position) if merge == "observed" else tokens.rows


def _members(grouped: Grouped, *, first: bool) -> Members:
    """The first or the last token of each group, and the others."""
    index, group = grouped
    border = torch.ones_like(group, dtype=torch.bool)
    if first:
        border[1:] = group[1:] != group[:-1]
    else:
        border[:-1] = group[1:] != group[:-1]
    return Members(base=index[border], others=index[~border], group_of_others=group[~border])


def _mean_nlls(student: LogitTokens, *, num_rows: int) -> Float[Tensor, " rows"]:
    """The mean cross-entropy of each response's tokens, the end of turn included."""
    logps_N = student.rows.logps(student.targets)
    sums = logps_N.new_zeros(num_rows).index_add(0, student.row, -logps_N)
    return sums / torch.bincount(student.row, minlength=num_rows).clamp(min=1)
