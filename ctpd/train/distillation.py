"""Distillation in the Trainer: the rows of student and teacher, and the forward pass.

A teacher is in memory (its logits are computed tile by tile, like the student's) or stored (some numbers a token, read
from a signal). Objectives get the one or the other as a type.

Shape legend: B pairs, R rows of a batch, N scored tokens of the student, M of the teacher, K stored tokens of a
distribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctpd.models import Outputs
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import (
    BoundaryTokens,
    DistillationObjective,
    DistillBatch,
    LogitTokens,
    Tokens,
    TopTokens,
)
from ctpd.ops.logit_rows import TopRows
from ctpd.train.batches import DistillInputs, StoredBoundary, StoredTop, TokenBatch
from ctpd.train.collator import ScoredRows
from ctpd.train.scoring import BOUNDARY_LOGPS, TOKEN_LOGPS, TOP_IDS, TOP_LOGPS

Stored = Mapping[str, NDArray[np.generic]]
"""The arrays of a stored signal of a teacher, one entry a scored token (`ctpd.train.scoring`)."""


@dataclass(frozen=True)
class DistillRows:
    """The same responses as two models tokenize them.

    Attributes:
        student, teacher: their rows, with the same items.
        aligned: int32, flat like the student's tokens: the index, among the scored tokens of the teacher's row, of the
            aligned token; -1 for none.
        stored: for each teacher that is not in memory its arrays, one entry a scored token of ``teacher``, in order.
    """

    student: ScoredRows
    teacher: ScoredRows
    aligned: NDArray[np.int32]
    stored: tuple[Stored, ...] = ()

    @property
    def items(self) -> NDArray[np.int64]:
        """[items, rows of an item] the rows of each item."""
        return self.student.items

    @property
    def shares_prompts(self) -> bool:
        """Never: rows are not packed in distillation."""
        return False

    @cached_property
    def item_lengths(self) -> NDArray[np.int64]:
        """Tokens of each item's longest row, of either model."""
        return np.maximum(self.student.item_lengths, self.teacher.item_lengths)

    @cached_property
    def _scored_before(self) -> NDArray[np.int64]:
        """How many tokens of the teacher are scored before each token."""
        return np.concatenate([[0], np.cumsum(self.teacher.unit >= 0)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.student)

    def names_of(self, items: Sequence[int]) -> list[str]:
        """The names of these items."""
        return self.student.names_of(items)

    def check(self) -> None:
        """Refuse rows whose first token is scored: nothing predicts it."""
        self.student.check()
        self.teacher.check()

    def collate(self, items: list[int]) -> DistillInputs:
        """Both models' rows of these items, chosen first, and what is stored of their tokens."""
        rows = self.items[items].T.reshape(-1)
        first_R = self._scored_before[self.teacher.row_starts[rows]]
        num_R = self._scored_before[self.teacher.row_starts[rows + 1]] - first_R
        index_M = np.concatenate([np.arange(a, a + n) for a, n in zip(first_R, num_R, strict=True)])
        return DistillInputs(
            student=self.student.token_batch(rows),
            teacher=self.teacher.token_batch(rows),
            aligned=torch.from_numpy(self._aligned_in_batch(rows, num_R)),
            stored=tuple(_stored_batch(stored, index_M) for stored in self.stored),
            num_pairs=len(items),
        )

    def _aligned_in_batch(self, rows: NDArray[np.int64], num_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N] indices into the M scored tokens of the teacher's rows; these have ``num_R`` tokens each."""
        offset_R = np.concatenate([[0], np.cumsum(num_R)[:-1]])
        found = []
        for row, offset in zip(rows, offset_R, strict=True):
            tokens = slice(self.student.row_starts[row], self.student.row_starts[row + 1])
            index = self.aligned[tokens][self.student.unit[tokens] >= 0].astype(np.int64)
            found.append(np.where(index >= 0, index + offset, -1))
        return np.concatenate(found)


def _stored_batch(stored: Stored, index_M: NDArray[np.int64]) -> StoredTop | StoredBoundary:
    arrays = {name: torch.from_numpy(values[index_M]) for name, values in stored.items()}
    if TOP_IDS in arrays:
        return StoredTop(arrays[TOP_IDS], arrays[TOP_LOGPS])
    return StoredBoundary(arrays[TOKEN_LOGPS], arrays[BOUNDARY_LOGPS])


class DistillPass:
    """The forward pass of an objective over distributions: `(model, batch) -> Sums`.

    Args:
        objective: already bound to both models.
        teachers: the teachers in memory, frozen, on the training's device; none if all are stored.
    """

    def __init__(self, objective: DistillationObjective[Any], teachers: Sequence[nn.Module]) -> None:
        self.objective, self._teachers = objective, tuple(teachers)

    def __call__(self, model: nn.Module, batch: DistillInputs) -> Sums:
        """One micro-batch; the objective is called inside the student's own `forward`."""
        teachers: list[Tokens] = [_constant_tokens(teacher, batch.teacher) for teacher in self._teachers]
        teachers += [_stored_tokens(batch.teacher, stored) for stored in batch.stored]

        def use(outputs: Outputs) -> Sums:
            made = DistillBatch(
                student=_logit_tokens(batch.student, outputs),
                teachers=tuple(teachers),
                aligned=batch.aligned,
                num_pairs=batch.num_pairs,
                num_rows=len(batch.student.input_ids),
            )
            sums: Sums = self.objective(made)
            return sums

        sums: Sums = model(input_ids=batch.student.input_ids, score=use)
        return sums


@torch.no_grad()
def _constant_tokens(teacher: nn.Module, batch: TokenBatch) -> LogitTokens:
    def use(outputs: Outputs) -> LogitTokens:
        return _logit_tokens(batch, Outputs(outputs.every.constant(), outputs.embed))

    tokens: LogitTokens = teacher(input_ids=batch.input_ids, score=use)
    return tokens


def _logit_tokens(batch: TokenBatch, outputs: Outputs) -> LogitTokens:
    return LogitTokens(
        **_facts(batch),
        rows=outputs.every.select(batch.predictors),
        every=outputs.every,
        position=batch.predictors + 1,
        embed=outputs.embed,
    )


def _stored_tokens(batch: TokenBatch, stored: StoredTop | StoredBoundary) -> TopTokens | BoundaryTokens:
    if isinstance(stored, StoredTop):
        return TopTokens(**_facts(batch), rows=TopRows(stored.ids, stored.logps))
    return BoundaryTokens(**_facts(batch), logps=stored.logps, boundary_logps=stored.boundary_logps)


def _facts(batch: TokenBatch) -> dict[str, Tensor]:
    """The fields of `Tokens`."""
    return {
        "targets": batch.targets,
        "inputs": batch.input_ids.flatten()[batch.predictors],
        "row": batch.predictors // batch.input_ids.shape[1],
        "unit": batch.unit[batch.unit >= 0],
    }
