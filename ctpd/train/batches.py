"""What the DataLoader yields: named tuples of tensors, which torch can pin and the Trainer moves to its device.

Shape legend: B pairs of a batch, R rows (B chosen responses, then B rejected ones if both sides are scored), T tokens of
the longest row, U units of the longest row, N scored tokens of the student, M of the teacher, P packed sequences, W
their width, K stored tokens of a distribution.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ctpd.objectives.base import Counted
from ctpd.ops.shared_rows import PackedLayout


class TokenBatch(NamedTuple):
    """The rows of one model, padded on the right.

    Attributes:
        input_ids: int64 [R, T]; [P, W] where the rows of a pair share a sequence.
        unit: int64 [R, T], the unit of each token in its row; -1 for prompt and padding, which are not scored.
        predictors: int64 [N], the flat index into `input_ids` of the position that predicts each scored token.
        targets: int64 [N], the scored tokens.
        layout: where the rows are in packed sequences; None for one sequence a row.
    """

    input_ids: Tensor
    unit: Tensor
    predictors: Tensor
    targets: Tensor
    layout: PackedLayout | None = None


class UnitBatch(NamedTuple):
    """The batch of an objective of the log-probabilities of units (`ctpd.objectives.base.PairObjective`).

    Attributes:
        tokens: the rows of the trained model.
        mask: bool [R, U], the units that are counted.
        reference: float32 [R, U], log-probabilities under the reference model; None without a reference.
        weights: float32 [R, U], importance weights; None for weight 1.
        num_pairs: B.
    """

    tokens: TokenBatch
    mask: Tensor
    reference: Tensor | None
    weights: Tensor | None
    num_pairs: int


class StoredTop(NamedTuple):
    """The likeliest tokens at each scored token of a teacher: ids and log-probabilities, [M, K]."""

    ids: Tensor
    logps: Tensor


class StoredBoundary(NamedTuple):
    """The log-probability of each scored token of a teacher, and that of a word boundary after it, [M]."""

    logps: Tensor
    boundary_logps: Tensor


class DistillInputs(NamedTuple):
    """The batch of an objective over distributions, from which `DistillPass` makes a `DistillBatch`.

    Attributes:
        student, teacher: the same responses as both models tokenize them.
        aligned: int64 [N], the index of the student's token's aligned token among the M of the teacher; -1 for none.
        stored: what was stored of each teacher that is not in memory.
        num_pairs: B.
    """

    student: TokenBatch
    teacher: TokenBatch
    aligned: Tensor
    stored: tuple[StoredTop | StoredBoundary, ...]
    num_pairs: int

    @property
    def tokens(self) -> TokenBatch:
        """The rows of the trained model."""
        return self.student


Batch = UnitBatch | DistillInputs
_T = TypeVar("_T")


def to_device(batch: _T, device: torch.device) -> _T:
    """A batch, or another nested tuple of tensors, on a device, without waiting for copies from pinned memory."""
    moved: _T = _moved(batch, device)
    return moved


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, tuple | list):  # torch pins a plain tuple as a list
        parts = [_moved(one, device) for one in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part


def count_units(batch: Batch, counted: Counted) -> int:
    """The number that a step's loss is divided by: pairs, or scored tokens or units of the chosen responses.

    It is the `count` of the `Sums` that the objective returns for this batch. The Trainer needs it before the forward
    pass: the first micro-batch's gradient is already divided by the total of the step.
    """
    unit_BT = batch.tokens.unit[: batch.num_pairs]
    if counted == "pairs":
        return batch.num_pairs
    return int((unit_BT >= 0).sum()) if counted == "tokens" else int((unit_BT.amax(1) + 1).sum())
