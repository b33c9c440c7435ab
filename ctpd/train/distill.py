"""Batches for objectives over distributions: the student's rows beside the teacher's, and where those come from.

A teacher is in memory (its rows of logits are formed tile by tile, like the student's) or stored (some numbers a
token, read from a signal). This is the only place that knows which.

Shape legend: R rows of a batch, T tokens of the longest row, N scored tokens of the student, M of the teacher, K stored
numbers a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctpd.models import Outputs
from ctpd.objectives.base import Sums
from ctpd.objectives.distillation import DistillationObjective, DistillBatch, Tokens
from ctpd.ops.rows import TopRows
from ctpd.train.collator import Batch, ScoredRows
from ctpd.train.sweep import COLUMNS, TOP_IDS, TOP_LOGPS

Stored = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class DistillRows:
    """The same responses as two models read them.

    Attributes:
        student, teacher: their rows, with the same items.
        partner: int32, flat like the student's tokens: the place, among the scored tokens of the teacher's row, of the
            token that is the partner; -1 for none.
        stored: for each teacher that is not in memory its arrays, one entry a scored token of `teacher`, in order.
    """

    student: ScoredRows
    teacher: ScoredRows
    partner: NDArray[np.int32]
    stored: tuple[Stored, ...] = ()

    @property
    def items(self) -> NDArray[np.int64]:
        """The rows of each item."""
        return self.student.items

    @property
    def shares_prompts(self) -> bool:
        """Never: each model reads its own rows."""
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

    def check(self) -> None:
        """Refuse rows whose first token is scored: nothing predicts it."""
        self.student.check()
        self.teacher.check()

    def collate(self, items: list[int]) -> Batch:
        """The student's batch, the teacher's under `teacher.*`, and partners as indices into its scored tokens."""
        batch, teacher = self.student.collate(items), self.teacher.collate(items)
        rows = self.items[items].T.reshape(-1)
        first_R = self._scored_before[self.teacher.row_starts[rows]]
        num_R = self._scored_before[self.teacher.row_starts[rows + 1]] - first_R
        offset_R = np.concatenate([[0], np.cumsum(num_R)[:-1]])
        partners = []
        for row, offset in zip(rows, offset_R, strict=True):
            tokens = slice(self.student.row_starts[row], self.student.row_starts[row + 1])
            place = self.partner[tokens][self.student.unit[tokens] >= 0].astype(np.int64)
            partners.append(np.where(place >= 0, place + offset, -1))
        batch["partner"] = torch.from_numpy(np.concatenate(partners))
        batch |= {f"teacher.{name}": values for name, values in teacher.items()}
        index_M = np.concatenate([np.arange(a, a + n) for a, n in zip(first_R, num_R, strict=True)])
        for number, stored in enumerate(self.stored):
            batch |= {f"stored{number}.{name}": torch.from_numpy(values[index_M]) for name, values in stored.items()}
        return batch


class DistillPass:
    """The forward pass of an objective over distributions: `(model, batch) -> Sums`.

    Args:
        objective: already bound to both models.
        teachers: the teachers in memory, frozen, on the training's device; none if all are stored.
    """

    def __init__(self, objective: DistillationObjective, teachers: Sequence[nn.Module]) -> None:
        self.objective, self._teachers = objective, tuple(teachers)

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        """One micro-batch; the objective is called inside the student's own `forward`."""
        teachers = [self._in_memory(teacher, batch) for teacher in self._teachers] or self._stored(batch)
        num_rows = len(batch["input_ids"])

        def use(outputs: Outputs) -> Sums:
            student = _tokens(batch, "", outputs)
            made = DistillBatch(
                student, tuple(teachers), batch["partner"], num_rows // len(self.objective.sides), num_rows
            )
            sums: Sums = self.objective(made)
            return sums

        sums: Sums = model(input_ids=batch["input_ids"], score=use)
        return sums

    def _in_memory(self, teacher: nn.Module, batch: Batch) -> Tokens:
        def use(outputs: Outputs) -> Outputs:
            return Outputs(outputs.every.constant(), outputs.embed)

        with torch.no_grad():
            outputs: Outputs = teacher(input_ids=batch["teacher.input_ids"], score=use)
        return _tokens(batch, "teacher.", outputs)

    def _stored(self, batch: Batch) -> list[Tokens]:
        names = sorted({name.partition(".")[0] for name in batch if name.startswith("stored")})
        tokens = _tokens(batch, "teacher.", None)
        return [
            tokens._replace(
                rows=TopRows(batch[f"{name}.{TOP_IDS}"], batch[f"{name}.{TOP_LOGPS}"])
                if f"{name}.{TOP_IDS}" in batch
                else None,
                columns=batch.get(f"{name}.{COLUMNS}"),
            )
            for name in names
        ]


def _tokens(batch: Batch, prefix: str, outputs: Outputs | None) -> Tokens:
    ids_RT: Tensor = batch[f"{prefix}input_ids"]
    predictors_N = batch[f"{prefix}predictors"]
    unit_RT = batch[f"{prefix}unit"]
    return Tokens(
        rows=None if outputs is None else outputs.every.select(predictors_N),
        targets=batch[f"{prefix}targets"],
        inputs=ids_RT.flatten()[predictors_N],
        row=predictors_N // ids_RT.shape[1],
        unit=unit_RT[unit_RT >= 0],
        every=None if outputs is None else outputs.every,
        input_ids=ids_RT,
        embed=None if outputs is None else outputs.embed,
        position=predictors_N + 1,
    )
