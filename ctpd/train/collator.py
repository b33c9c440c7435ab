"""Training rows, the order of the items, and how items become a batch.

Shape legend: R rows of a batch, T tokens of the longest row, U units of the longest row, N scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ctpd.core.errors import NotFinite, UserError, listed
from ctpd.ops.shared_rows import pack_pairs
from ctpd.text.blocks import TokenRows
from ctpd.train.batches import Batch, TokenBatch, UnitBatch
from ctpd.train.config import pairs_of_process

B_co = TypeVar("B_co", bound=Batch, covariant=True)


class TrainingRows(Protocol[B_co]):
    """What the Trainer needs of its data: `ScoredRows` and `DistillRows` have it. An item is a pair, or one response."""

    @property
    def item_lengths(self) -> NDArray[np.int64]:
        """Tokens of each item's longest row."""
        ...

    @property
    def items(self) -> NDArray[np.int64]:
        """[items, rows of an item] the rows of each item."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether the rows of an item may share a sequence."""
        ...

    def __len__(self) -> int: ...

    def collate(self, items: list[int]) -> B_co:
        """A batch of these items."""
        ...

    def names_of(self, items: Sequence[int]) -> list[str]:
        """What these items are called in errors: the ids of pairs."""
        ...

    def check(self) -> None:
        """Refuse rows that cannot be scored."""
        ...


@dataclass(frozen=True)
class ScoredRows:
    """Token rows of one model, with the units that their tokens spell. Flat arrays, rows one after another.

    Attributes:
        input_ids: int32, all rows' tokens.
        row_starts: int64 [rows + 1], first token of each row.
        unit: int32, the unit of each token inside its row; -1 for a token that is not scored.
        unit_starts: int64 [rows + 1], first unit of each row in the flat unit arrays.
        counted: bool, flat units: whether a unit enters the sums (`end_span: false` leaves the end span out).
        items: int64 [items, rows of an item]: (chosen, rejected) rows of a pair, or one row.
        reference: float32, flat units: the reference's log-probabilities, or None.
        weights: float32, flat units, or None.
        shares_prompts: whether the rows of a pair may share a sequence, which moves no number beyond rounding. The
            model must have been prepared by `ctpd.train.sharing.enable_prompt_sharing`.
        names: of the items, for errors (ids of pairs); their numbers where it is empty.
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
    names: tuple[str, ...] = ()

    @cached_property
    def item_lengths(self) -> NDArray[np.int64]:
        """Tokens of each item's longest row."""
        lengths = np.diff(self.row_starts)
        return np.asarray(lengths[self.items].max(axis=1), dtype=np.int64)

    @property
    def tokens(self) -> TokenRows:
        """The rows alone, as a scoring pass takes them."""
        return TokenRows(self.input_ids, self.row_starts, self.unit)

    def __len__(self) -> int:
        return len(self.items)

    def collate(self, items: list[int]) -> UnitBatch:
        """The rows of ``items``, padded on the right: all first rows (chosen), then all second rows (rejected).

        With `shares_prompts`, and where it saves enough, `input_ids` are packed sequences [P, W], one a pair.
        """
        rows = self.items[items].T.reshape(-1)
        starts, ends = self.unit_starts[rows], self.unit_starts[rows + 1]
        return UnitBatch(
            tokens=self.token_batch(rows),
            mask=torch.from_numpy(padded(self.counted, starts, ends)),
            reference=None if self.reference is None else torch.from_numpy(padded(self.reference, starts, ends)),
            weights=None if self.weights is None else torch.from_numpy(padded(self.weights, starts, ends)),
            num_pairs=len(items),
        )

    def token_batch(self, rows: NDArray[np.int64]) -> TokenBatch:
        """The tokens of these rows, padded on the right."""
        starts, ends = self.row_starts[rows], self.row_starts[rows + 1]
        input_ids_RT = padded(self.input_ids, starts, ends).astype(np.int64)
        unit_RT = padded(self.unit, starts, ends, fill=-1).astype(np.int64)
        scored_N = np.flatnonzero(unit_RT >= 0)
        predictors_N = torch.from_numpy(scored_N - 1)
        targets_N = torch.from_numpy(input_ids_RT.reshape(-1)[scored_N])
        packed = pack_pairs(input_ids_RT, ends - starts) if self.shares_prompts else None
        if packed is None:
            return TokenBatch(torch.from_numpy(input_ids_RT), torch.from_numpy(unit_RT), predictors_N, targets_N)
        packed_ids_PW, layout = packed
        predictors_N = layout.unpack.flatten()[predictors_N]
        return TokenBatch(torch.from_numpy(packed_ids_PW), torch.from_numpy(unit_RT), predictors_N, targets_N, layout)

    def names_of(self, items: Sequence[int]) -> list[str]:
        """The names of these items."""
        return [self.names[item] if self.names else f"item {item}" for item in items]

    def check(self) -> None:
        """Refuse rows whose first token is scored, which nothing predicts, and constants that are not finite."""
        if (self.unit[self.row_starts[:-1]] >= 0).any():
            raise UserError(
                "a response begins at the first token of its row, where no token predicts it",
                fix="Give the template a text before the response, or a tokenizer that adds a beginning-of-text token",
            )
        constants = {"the reference's log-probabilities": self.reference, "the importance weights": self.weights}
        for title, values in constants.items():
            if values is not None and len(items := self._items_with_non_finite(values)):
                raise NotFinite(
                    f"{title} of {listed(self.names_of(items))} are not finite",
                    fix="Correct the model that they come from, and remove the artifact (`ctpd store rm`)",
                )

    def _items_with_non_finite(self, values: NDArray[np.float32]) -> list[int]:
        """The items one of whose units has a value that is NaN or infinite."""
        bad = np.concatenate([[0], np.cumsum(~np.isfinite(values))])
        per_row = bad[self.unit_starts[1:]] - bad[self.unit_starts[:-1]]
        found: list[int] = np.flatnonzero(per_row[self.items].sum(axis=1)).tolist()
        return found


def padded(
    values: NDArray[Any], starts_R: NDArray[np.int64], ends_R: NDArray[np.int64], *, fill: int = 0
) -> NDArray[Any]:
    """The stretches of a flat array, one a row of the result, filled up on the right."""
    result = np.full((len(starts_R), int((ends_R - starts_R).max())), fill, dtype=values.dtype)
    for row, (start, end) in enumerate(zip(starts_R, ends_R, strict=True)):
        result[row, : end - start] = values[start:end]
    return result


class Items(Dataset[int]):
    """The item numbers 0 to n - 1: the collate function reads the items from flat arrays."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: int) -> int:
        return index


class StepSampler(BatchSampler):
    """Micro-batches of one process, in an order that depends on (seed, epoch) alone.

    Each epoch's permutation is cut into optimizer steps, and an incomplete last step is dropped. Inside a step the items
    are sorted by length, longest first, cut into micro-batches, and assigned to the ranks in turn.
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

    def items_of(self, step: int) -> NDArray[np.int64]:
        """The items of an optimizer step of the whole training, counted from 0, over all ranks."""
        epoch, step = divmod(step, self.num_steps)
        return self._order(epoch)[step * self._per_step : (step + 1) * self._per_step]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        for step in range(self.num_steps):
            items = order[step * self._per_step : (step + 1) * self._per_step]
            items = items[np.argsort(-self._lengths[items], kind="stable")]
            batches = items.reshape(-1, self._micro_batch)
            yield from (batch.tolist() for batch in batches[self._rank :: self._world_size])


class StepLoader(DataLoader[int]):
    """A DataLoader that forwards the epoch to its sampler: transformers' loop calls `set_epoch` on the DataLoader."""

    def set_epoch(self, epoch: int) -> None:
        """Forward the epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def micro_batch_size(
    lengths: NDArray[np.int64], *, rows: int, per_step: int, world_size: int, max_tokens: int, fixed: int | None = None
) -> int:
    """Items of one forward pass: the largest divisor of a rank's items of a step whose padded rows fit the limit.

    Args:
        lengths: tokens of each item's longest row.
        rows: rows of an item.
        per_step: items of an optimizer step, over all ranks.
        world_size: the number of ranks.
        max_tokens: tokens of one forward pass, padding included.
        fixed: use this size, for an objective whose loss depends on which items are in a micro-batch.

    Raises:
        UserError: a step's items cannot be divided evenly over the ranks, or not in micro-batches of the fixed size.
    """
    share = pairs_of_process(per_step, num_processes=world_size, micro_batch=fixed)
    if fixed is not None:
        return fixed
    longest = int(lengths.max()) * rows
    fitting = [m for m in range(1, share + 1) if share % m == 0 and m * longest <= max_tokens]
    return max(fitting, default=1)
