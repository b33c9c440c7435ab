"""Rows that a model scores, their order, and their batches.

Shape legend: R rows of a batch, T tokens of the longest row, U units of the longest row, N scored tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ctpd.core.errors import UserError
from ctpd.ops.shared_rows import SharedRows, share_rows

Batch = dict[str, Tensor]
SHARED = "shared."


@dataclass(frozen=True)
class ScoredRows:
    """Token rows of one model, with the units that their tokens spell. Flat arrays, rows one after another.

    Attributes:
        input_ids: int32, all rows' tokens.
        row_starts: int64 [rows + 1], first token of each row.
        unit: int32, the unit of each token inside its row; -1 for a token that is not scored.
        unit_starts: int64 [rows + 1], first unit of each row in the flat unit arrays.
        counted: bool, flat units: whether a unit enters the sums (`end_span: false` leaves the end span out).
        reference: float32, flat units: the reference's log-probabilities, or None.
        weights: float32, flat units, or None.
        items: int64 [items, rows of an item]: (chosen, rejected) rows of a pair, or one row.
        shares_prompts: whether the rows of a pair may share a sequence: a model must have passed
            `ctpd.train.sharing.can_share_rows`. It moves no number beyond rounding.
    """

    input_ids: NDArray[np.int32]
    row_starts: NDArray[np.int64]
    unit: NDArray[np.int32]
    unit_starts: NDArray[np.int64]
    counted: NDArray[np.bool_]
    items: NDArray[np.int64]
    reference: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None
    shares_prompts: bool = False

    @cached_property
    def item_lengths(self) -> NDArray[np.int64]:
        """Tokens of each item's longest row."""
        lengths = np.diff(self.row_starts)
        return np.asarray(lengths[self.items].max(axis=1), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def collate(self, items: list[int]) -> Batch:
        """Pad the rows of ``items`` on the right; all first rows come first, then all second rows.

        With `shares_prompts`, and where it saves enough, `input_ids` are packed sequences [P, W], one a pair;
        `predictors` count in them, and `shared.*` tell where the rows are.
        """
        rows = self.items[items].T.reshape(-1)
        token_starts, token_ends = self.row_starts[rows], self.row_starts[rows + 1]
        unit_starts, unit_ends = self.unit_starts[rows], self.unit_starts[rows + 1]
        width, units = int((token_ends - token_starts).max()), int((unit_ends - unit_starts).max())
        input_ids_RT = np.zeros((len(rows), width), dtype=np.int64)
        unit_RT = np.full((len(rows), width), -1, dtype=np.int64)
        padded = {name: np.zeros((len(rows), units), dtype=a.dtype) for name, a in self._unit_arrays.items()}
        for r, (t0, t1, u0, u1) in enumerate(zip(token_starts, token_ends, unit_starts, unit_ends, strict=True)):
            input_ids_RT[r, : t1 - t0] = self.input_ids[t0:t1]
            unit_RT[r, : t1 - t0] = self.unit[t0:t1]
            for name, values in self._unit_arrays.items():
                padded[name][r, : u1 - u0] = values[u0:u1]
        scored_N = np.flatnonzero(unit_RT >= 0)
        batch = {
            "input_ids": torch.from_numpy(input_ids_RT),
            "unit": torch.from_numpy(unit_RT),
            "predictors": torch.from_numpy(scored_N - 1),
            "targets": torch.from_numpy(input_ids_RT.reshape(-1)[scored_N]),
        }
        batch |= {name: torch.from_numpy(values) for name, values in padded.items()}
        packed = share_rows(input_ids_RT, token_ends - token_starts) if self.shares_prompts else None
        if packed is not None:
            batch["input_ids"] = torch.from_numpy(packed[0])
            batch["predictors"] = packed[1].unpack.flatten()[batch["predictors"]]
            batch |= {f"{SHARED}{name}": part for name, part in packed[1]._asdict().items()}
        return batch

    @cached_property
    def _unit_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"mask": self.counted, "reference": self.reference, "weights": self.weights}
        return {name: values for name, values in arrays.items() if values is not None}

    def check(self) -> None:
        """Refuse rows whose first token is scored: nothing predicts it."""
        if (self.unit[self.row_starts[:-1]] >= 0).any():
            raise UserError(
                "a response begins at the first token of its row, where no token predicts it",
                fix="Give the template a text before the response, or a tokenizer that adds a beginning-of-text token",
            )


def shared_rows(batch: Batch) -> SharedRows | None:
    """Where the rows of a batch stand, if they share sequences."""
    if f"{SHARED}unpack" not in batch:
        return None
    return SharedRows(*(batch[f"{SHARED}{name}"] for name in SharedRows._fields))


class Items(Dataset[int]):
    """The item numbers 0..n-1; the collator looks the items up in flat arrays."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: int) -> int:
        return index


class StepSampler(BatchSampler):
    """Micro-batches of one process, in an order that depends on (seed, epoch) alone.

    One permutation an epoch is cut into optimizer steps, the incomplete last one dropped; inside a step the items are
    sorted by length, cut into micro-batches and dealt to the processes.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        per_step: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._lengths, self._per_step, self._micro_batch = lengths, per_step, micro_batch
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self.epoch = 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self._lengths) // self._per_step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * (self._per_step // (self._micro_batch * self._world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self._seed, self.epoch]).permutation(len(self._lengths))
        for step in range(self.num_steps):
            items = order[step * self._per_step : (step + 1) * self._per_step]
            items = items[np.argsort(-self._lengths[items], kind="stable")]
            batches = items.reshape(-1, self._micro_batch)
            yield from (batch.tolist() for batch in batches[self._rank :: self._world_size])


class StepLoader(DataLoader[int]):
    """A DataLoader that forwards the epoch to its sampler, as the library's loop expects."""

    def set_epoch(self, epoch: int) -> None:
        """Forward the epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def micro_batch_size(
    lengths: NDArray[np.int64], *, rows: int, per_step: int, world_size: int, max_tokens: int, fixed: int | None = None
) -> int:
    """Items of one forward pass: the largest divisor of a process's share of a step whose padded rows fit.

    With ``fixed`` that many: the objective's loss depends on which items go together.

    Raises:
        UserError: the step cannot be dealt evenly to the processes, or not in micro-batches of the fixed size.
    """
    if per_step % world_size:
        raise UserError(
            f"{per_step} pairs of a step cannot be dealt evenly to {world_size} processes",
            fix="Make `pairs_per_step` a multiple of the number of processes",
        )
    share = per_step // world_size
    if fixed is not None:
        if share % fixed:
            raise UserError(
                f"{share} pairs of a step cannot be cut into micro-batches of {fixed}",
                fix="Make `pairs_per_step` a multiple of the method's `micro_batch`, or change that",
            )
        return fixed
    longest = int(lengths.max()) * rows
    fitting = [m for m in range(1, share + 1) if share % m == 0 and m * longest <= max_tokens]
    return max(fitting, default=1)
