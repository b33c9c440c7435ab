"""Batches of every method: their counts equal the objective's, and torch and the Trainer can handle them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from ctpd.objectives.base import Objective
from ctpd.objectives.distillation import DistillationObjective, ModelFacts
from ctpd.pipeline.methods import METHODS, Method
from ctpd.train.batches import DistillInputs, UnitBatch, count_units, to_device
from ctpd.train.collator import ScoredRows
from ctpd.train.distillation import DistillPass, DistillRows, Stored
from ctpd.train.scoring import ScoringSettings, logps_with_boundary, scoring_pass, top_k
from ctpd.train.trainer import UnitPass
from tests.fixtures.tiny import VOCABULARY, pairs_with_prompts, tiny_model, tiny_rows

FACTS = ModelFacts(
    tokens=tuple(f"Ġ{i}" if i % 3 else f"t{i}" for i in range(VOCABULARY)),
    special_ids=frozenset({0}),
    vocab_size=VOCABULARY,
    hidden_size=16,
)
ITEMS = [4, 1, 3]


def distill_rows(objective: DistillationObjective[Any]) -> DistillRows:
    """Rows of two models with the same spans, and the stored teacher arrays that the objective needs."""
    rows = tiny_rows(6, sides=len(objective.sides))
    student = dataclasses.replace(rows, reference=None, weights=None)
    teacher = dataclasses.replace(student, input_ids=student.input_ids[::-1].copy())
    starts = np.repeat(student.row_starts[:-1], np.diff(student.row_starts))
    aligned = np.where(student.unit >= 0, np.arange(len(student.unit)) - starts - 2, -1).astype(np.int32)
    view = objective.teacher
    assert view is not None
    stored: tuple[Stored, ...] = ()
    if view.is_stored:
        measure = logps_with_boundary([1, 2]) if view.boundary else top_k(view.top_k or 1, view.temperature)
        settings = ScoringSettings(max_tokens=64, progress=lambda done, total: None)
        model = tiny_model(seed=7)
        stored = tuple(scoring_pass(model, teacher.tokens, measure=measure, settings=settings) for _ in view.models)
    return DistillRows(student, teacher, aligned, stored)


def run(objective: Objective) -> tuple[Any, Any]:
    """The sums of one batch, and the batch."""
    model = tiny_model()
    if isinstance(objective, DistillationObjective):
        objective.bind(FACTS, FACTS)
        rows = distill_rows(objective)
        batch = rows.collate(ITEMS)
        teachers = [] if rows.stored else [tiny_model(seed=7).requires_grad_(False)]
        return DistillPass(objective, teachers)(model, batch), batch
    sides = len(objective.sides)
    spans, tokens = tiny_rows(6, sides=sides), pairs_with_prompts(6)
    tokens = dataclasses.replace(tokens, items=tokens.items[:, :sides])  # each token is a unit
    units = (tokens if objective.layout.granularity == "tokens" else spans).collate(ITEMS)
    return UnitPass(objective)(model, units), units


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_divided_by_what_the_objective_counts(method: str) -> None:
    objective = Method.make(method, {}, source="test").objective()
    sums, batch = run(objective)
    assert int(sums.count) == count_units(batch, objective.counts) > 0


def test_a_count_is_that_of_the_chosen_responses() -> None:
    rows = tiny_rows(6)
    batch = rows.collate(ITEMS)
    chosen = rows.items[ITEMS, 0]
    tokens = sum(int((rows.unit[rows.row_starts[r] : rows.row_starts[r + 1]] >= 0).sum()) for r in chosen)
    units = sum(int(rows.unit_starts[r + 1] - rows.unit_starts[r]) for r in chosen)
    assert [count_units(batch, unit) for unit in ("pairs", "tokens", "units")] == [3, tokens, units]


def batches() -> list[UnitBatch | DistillInputs]:
    packed: ScoredRows = dataclasses.replace(pairs_with_prompts(6), shares_prompts=True)
    kd = Method.make("token_kd", {"top_k": 5}, source="test").objective()
    assert isinstance(kd, DistillationObjective)
    return [packed.collate(ITEMS), distill_rows(kd).collate(ITEMS)]


@pytest.mark.parametrize("number", [0, 1], ids=["units, packed", "distillation, stored"])
def test_a_batch_is_moved_as_a_whole_and_keeps_its_type(number: int) -> None:
    batch = batches()[number]
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert moved.num_pairs == 3
    assert moved.tokens.input_ids.is_meta
    if isinstance(moved, DistillInputs):
        assert moved.stored[0].logps.is_meta
        assert isinstance(moved.stored, tuple)
    else:
        assert moved.tokens.layout is not None
        assert moved.tokens.layout.unpack.is_meta


@pytest.mark.parametrize("number", [0, 1], ids=["units, packed", "distillation, stored"])
def test_a_data_loader_pins_every_tensor_of_a_batch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own traversal of a batch; pinning is patched, since there may be no GPU."""
    pinned: list[int] = []

    def pin(tensor: torch.Tensor, _device: Any = None) -> torch.Tensor:
        pinned.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = batches()[number]
    found = pin_memory(batch)
    assert type(found) is type(batch)
    assert len(pinned) == (4 + 8 + 2 if number == 0 else 4 + 4 + 1 + 2)
    moved = to_device(found, torch.device("cpu"))
    assert type(moved) is type(batch)
    assert moved.tokens.input_ids is batch.tokens.input_ids
