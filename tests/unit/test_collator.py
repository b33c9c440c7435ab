"""The order of the items and the layout of a batch."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctpd.core.errors import UserError
from ctpd.train.collator import Items, StepLoader, StepSampler, micro_batch_size
from tests.fixtures.tiny import tiny_rows

LENGTHS = np.random.default_rng(0).integers(5, 60, 70)


def steps(
    lengths: Any = LENGTHS, *, micro_batch: int, world_size: int = 1, epoch: int = 0, seed: int = 4
) -> list[set[int]]:
    """The items of each step of 16, over all processes."""
    total: list[set[int]] = []
    for rank in range(world_size):
        sampler = StepSampler(
            lengths, per_step=16, micro_batch=micro_batch, seed=seed, rank=rank, world_size=world_size
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        accumulation = 16 // (micro_batch * world_size)
        for step in range(sampler.num_steps):
            mine = [item for batch in batches[step * accumulation : (step + 1) * accumulation] for item in batch]
            if rank == 0:
                total.append(set())
            assert not total[step] & set(mine)
            total[step] |= set(mine)
    return total


@pytest.mark.parametrize(("micro_batch", "world_size"), [(1, 1), (4, 1), (16, 1), (1, 2), (4, 2), (8, 2), (2, 4)])
def test_items_of_a_step_depend_on_seed_and_epoch_alone(micro_batch: int, world_size: int) -> None:
    for epoch in (0, 1):
        found = steps(micro_batch=micro_batch, world_size=world_size, epoch=epoch)
        assert found == steps(micro_batch=2, epoch=epoch)
        assert all(len(items) == 16 for items in found)


def test_lengths_do_not_move_an_item_to_another_step() -> None:
    """Methods with rows of different lengths (spans or tokens, teacher or student) train on the same pairs in the same order."""
    assert steps(LENGTHS[::-1].copy(), micro_batch=4) == steps(micro_batch=4)


def test_seed_and_epoch_change_the_order() -> None:
    assert steps(micro_batch=4) != steps(micro_batch=4, seed=5)
    assert steps(micro_batch=4) != steps(micro_batch=4, epoch=1)


@given(st.integers(16, 200), st.sampled_from([1, 2, 4, 8, 16]))
def test_incomplete_last_step_is_dropped_and_nothing_comes_twice(num_items: int, micro_batch: int) -> None:
    sampler = StepSampler(np.arange(num_items), per_step=16, micro_batch=micro_batch, seed=0)
    items = [item for batch in sampler for item in batch]
    assert sampler.num_steps == num_items // 16
    assert len(items) == len(set(items)) == sampler.num_steps * 16


def test_inside_a_step_the_longest_come_first() -> None:
    for batch in StepSampler(LENGTHS, per_step=16, micro_batch=16, seed=0):
        assert list(LENGTHS[batch]) == sorted(LENGTHS[batch], reverse=True)


def test_loader_passes_the_epoch_on() -> None:
    sampler = StepSampler(LENGTHS, per_step=16, micro_batch=16, seed=0)
    loader = StepLoader(Items(len(LENGTHS)), batch_sampler=sampler, collate_fn=lambda items: items)
    first = list(loader)
    loader.set_epoch(1)
    assert sampler.epoch == 1
    assert list(loader) != first


def test_batch_holds_chosen_rows_then_rejected_rows_padded_on_the_right() -> None:
    rows = tiny_rows(6)
    items = [4, 1, 3]
    batch = rows.collate(items)
    tokens = batch.tokens
    order = [2 * i for i in items] + [2 * i + 1 for i in items]
    lengths, units = np.diff(rows.row_starts), np.diff(rows.unit_starts)
    assert tokens.input_ids.shape == (6, max(lengths[order]))
    assert batch.mask.shape == (6, max(units[order]))
    assert rows.reference is not None
    for r, row in enumerate(order):
        of_tokens = slice(rows.row_starts[row], rows.row_starts[row + 1])
        assert tokens.input_ids[r, : lengths[row]].tolist() == rows.input_ids[of_tokens].tolist()
        assert tokens.unit[r, : lengths[row]].tolist() == rows.unit[of_tokens].tolist()
        assert (tokens.input_ids[r, lengths[row] :] == 0).all()
        assert (tokens.unit[r, lengths[row] :] == -1).all()
        assert batch.mask[r].tolist() == [True] * units[row] + [False] * (batch.mask.shape[1] - units[row])
        of_row = slice(rows.unit_starts[row], rows.unit_starts[row + 1])
        assert batch.reference is not None
        assert batch.weights is not None
        np.testing.assert_array_equal(batch.reference[r, : units[row]], rows.reference[of_row])
        assert (batch.weights[r, units[row] :] == 0).all()


def test_each_scored_token_is_predicted_from_the_position_before_it() -> None:
    batch = tiny_rows(3).collate([0, 1, 2]).tokens
    flat, width = batch.input_ids.flatten(), batch.input_ids.shape[1]
    assert torch.equal(flat[batch.predictors + 1], batch.targets)
    assert torch.equal(batch.predictors + 1, torch.nonzero(batch.unit.flatten() >= 0)[:, 0])
    assert (batch.predictors % width != width - 1).all()


def test_only_what_an_objective_needs_is_in_the_batch() -> None:
    rows = dataclasses.replace(tiny_rows(2, sides=1), reference=None, weights=None)
    batch = rows.collate([0, 1])
    assert (batch.reference, batch.weights, batch.tokens.layout) == (None, None, None)
    assert rows.collate([1]).tokens.input_ids.shape[0] == 1


@pytest.mark.parametrize(
    ("max_tokens", "world_size", "expected"),
    [(10**6, 1, 16), (10**6, 2, 8), (800, 1, 8), (799, 1, 4), (1, 1, 1), (800, 4, 4)],
)
def test_micro_batch_is_the_largest_divisor_that_fits(max_tokens: int, world_size: int, expected: int) -> None:
    """Two rows of 50 tokens a pair: 100 tokens."""
    lengths = np.array([50, 20])
    assert micro_batch_size(lengths, rows=2, per_step=16, world_size=world_size, max_tokens=max_tokens) == expected


def test_step_that_cannot_be_dealt_evenly_is_refused() -> None:
    with pytest.raises(UserError, match="16 pairs of a step cannot be divided evenly over 3 processes"):
        micro_batch_size(LENGTHS, rows=2, per_step=16, world_size=3, max_tokens=1)


def test_an_objective_that_depends_on_its_batch_mates_fixes_the_micro_batch() -> None:
    lengths = np.full(16, 10)
    assert micro_batch_size(lengths, rows=1, per_step=8, world_size=1, max_tokens=20, fixed=4) == 4
    with pytest.raises(UserError, match="micro-batches of 3"):
        micro_batch_size(lengths, rows=1, per_step=8, world_size=1, max_tokens=20, fixed=3)
