"""The trainer: accumulation, resume, identity at the start, metrics, adapters."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baselines.dpo import DPO, DPOParams
from baselines.sft import SFT, SFTParams
from ctpd.core.errors import UserError
from ctpd.models import add_lora
from ctpd.objectives.base import PairObjective
from ctpd.objectives.preference import Preference, PreferenceParams
from ctpd.ops.spans import flat_unit_sums
from ctpd.train.collator import ScoredRows
from ctpd.train.config import Schedule
from ctpd.train.fit import Fit, FitSettings, Optimization, fit
from ctpd.train.scoring import TOKEN_LOGPS, ScoringSettings, scoring_pass, token_logps
from ctpd.train.trainer import Training, UnitPass
from tests.fixtures.tiny import tiny_model, tiny_rows

OBJECTIVES: dict[str, Callable[[], PairObjective]] = {
    "ctpd": lambda: Preference(PreferenceParams()),
    "dpo": lambda: DPO(DPOParams()),
    "sft": lambda: SFT(SFTParams()),
}
SCHEDULE = Schedule(epochs=2, pairs_per_step=8, evaluations_per_epoch=1)


def rows_for(objective: PairObjective, num_items: int, *, seed: int = 0) -> ScoredRows:
    rows = tiny_rows(num_items, sides=len(objective.sides), seed=seed)
    layout = objective.layout
    unused = [name for name, kept in (("reference", layout.reference), ("weights", layout.weighting)) if kept is None]
    return dataclasses.replace(rows, **dict.fromkeys(unused))


def train(
    model: nn.Module,
    folder: Path,
    *,
    method: str = "ctpd",
    rows: ScoredRows | None = None,
    eval_rows: ScoredRows | None = None,
    micro_batch_tokens: int = 10**6,
    checkpoint_seconds: float = 1e9,
    schedule: Schedule = SCHEDULE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    objective = OBJECTIVES[method]()
    settings = FitSettings(
        device="cpu",
        micro_batch_tokens=micro_batch_tokens,
        checkpoint_seconds=checkpoint_seconds,
        report_to=(),
        progress=progress,
    )
    training = Training(
        model=model,
        objective=objective,
        rows=rows if rows is not None else rows_for(objective, 35),
        forward_pass=UnitPass(objective),
        eval_rows=eval_rows,
        constants={"weights/mean": 1.5},
    )
    optimization = Optimization(schedule=schedule, learning_rate=1e-3, seed=3, precision="float32")
    return fit(training, optimization, folder=folder, settings=settings)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def steps_of(done: Fit) -> list[dict[str, float]]:
    return [entry for entry in done.history if "loss" in entry]


@pytest.mark.parametrize("method", OBJECTIVES)
def test_one_micro_batch_of_eight_equals_eight_of_one(method: str, tmp_path: Path) -> None:
    """Sums are divided once: rows of unequal length do not make the loss depend on how a step is cut."""
    whole, cut = tiny_model(), tiny_model()
    one = train(whole, tmp_path / "a", method=method)
    eight = train(cut, tmp_path / "b", method=method, micro_batch_tokens=1)
    assert (one.micro_batch, eight.micro_batch) == (8, 1)
    for a, b in zip(steps_of(one), steps_of(eight), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(cut)[name], rtol=1e-3, atol=2e-5, msg=name)


class Interrupted(Exception):
    """Raised to simulate an interruption."""


def interrupt_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Interrupted

    return progress


def fresh(lora: bool) -> Any:
    model = tiny_model()
    return add_lora(model, r=2, alpha=4, targets="all-linear", seed=0) if lora else model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stop", [2, 5, 8])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(lora: bool, stop: int, tmp_path: Path) -> None:
    """Weights and the whole history, evaluations included; a state is written after each step, the last one excepted."""
    eval_rows = rows_for(OBJECTIVES["ctpd"](), 6, seed=9)
    straight = fresh(lora)
    expected = train(straight, tmp_path / "a", eval_rows=eval_rows, micro_batch_tokens=50)
    assert not list((tmp_path / "a").glob("checkpoint-*"))

    def again(model: Any, **changes: Any) -> Fit:
        return train(model, tmp_path / "b", eval_rows=eval_rows, micro_batch_tokens=50, checkpoint_seconds=0, **changes)

    with pytest.raises(Interrupted):
        again(fresh(lora), progress=interrupt_at(stop))
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == [f"checkpoint-{stop - 1}"]
    seen: list[int] = []
    resumed = fresh(lora)
    found = again(resumed, progress=lambda done, total: seen.append(done))
    assert seen == list(range(stop, 9))
    assert found.history == expected.history
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_same_seed_gives_the_same_training_bit_for_bit(tmp_path: Path) -> None:
    first, second = tiny_model(), tiny_model()
    assert train(first, tmp_path / "a").history == train(second, tmp_path / "b").history
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def own_reference(model: Any, rows: ScoredRows) -> ScoredRows:
    """The model's own unit log-probabilities as its reference."""
    logps = np.zeros(len(rows.input_ids), dtype=np.float32)
    settings = ScoringSettings(max_tokens=64, progress=lambda done, total: None)
    logps[rows.unit >= 0] = scoring_pass(model, rows.tokens, measure=token_logps, settings=settings)[TOKEN_LOGPS]
    sums = flat_unit_sums(
        torch.from_numpy(logps),
        torch.from_numpy(rows.unit),
        token_starts=torch.from_numpy(rows.row_starts),
        unit_starts=torch.from_numpy(rows.unit_starts),
    )
    return dataclasses.replace(rows, reference=sums.numpy().astype(np.float32))


@pytest.mark.parametrize("method", ["ctpd", "dpo"])
def test_a_model_that_is_its_own_reference_starts_at_margin_zero_and_loss_log_two(method: str, tmp_path: Path) -> None:
    """docs/method.md#identities: the ratios are 0, so is the margin, whatever the weights; -log sigmoid(0) = log 2."""
    model = tiny_model()
    rows = own_reference(model, rows_for(OBJECTIVES[method](), 16))
    first = steps_of(train(model, tmp_path, method=method, rows=rows))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["saturation"] == pytest.approx(0.5, abs=1e-6)


def test_training_lowers_the_loss_of_the_pairs(tmp_path: Path) -> None:
    model = tiny_model()
    rows = own_reference(model, rows_for(OBJECTIVES["dpo"](), 16))
    schedule = Schedule(epochs=20, pairs_per_step=16, schedule="constant", warmup_ratio=0.0)
    steps = steps_of(train(model, tmp_path, method="dpo", rows=rows, schedule=schedule))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert steps[-1]["rewards/accuracies"] > 0.9


def test_metrics_of_a_step_are_those_of_its_pairs(tmp_path: Path) -> None:
    """The first step's metrics against the objective on the same eight pairs, computed by hand."""
    model, objective = tiny_model(), OBJECTIVES["ctpd"]()
    rows = rows_for(objective, 8)
    first = steps_of(train(model, tmp_path, rows=rows, schedule=Schedule(pairs_per_step=8, warmup_ratio=0.0)))[0]
    unit_logps = own_reference(tiny_model(), rows).reference
    assert unit_logps is not None
    assert rows.reference is not None
    assert rows.weights is not None
    ratio = rows.weights * (unit_logps - rows.reference)
    per_row, logp_row = (np.add.reduceat(values, rows.unit_starts[:-1]).reshape(8, 2) for values in (ratio, unit_logps))
    margins = 0.1 * (per_row[:, 0] - per_row[:, 1])
    assert first["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    assert first["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert first["rewards/accuracies"] == pytest.approx((margins > 0).mean())
    assert first["logps/chosen"] == pytest.approx(logp_row[:, 0].mean(), rel=1e-4)
    assert first["logps/rejected"] == pytest.approx(logp_row[:, 1].mean(), rel=1e-4)
    assert first["weights/mean"] == 1.5


def test_evaluation_comes_at_equal_distances_with_the_metrics_of_all_pairs(tmp_path: Path) -> None:
    """Micro-batches of an evaluation are of unequal size; the loss is still the mean over all pairs."""
    objective = OBJECTIVES["ctpd"]()
    eval_rows = rows_for(objective, 7, seed=9)
    schedule = SCHEDULE.model_copy(update={"evaluations_per_epoch": 2})
    whole, cut = (
        train(tiny_model(), tmp_path / str(size), eval_rows=eval_rows, schedule=schedule, micro_batch_tokens=size)
        for size in (10**6, 50)
    )
    for done in (whole, cut):
        assert [entry["step"] for entry in done.history if "eval_loss" in entry] == [2, 4, 6, 8]
    for a, b in zip(whole.history, cut.history, strict=True):
        if "eval_loss" in a:
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-4)
            assert a["eval_rewards/margins"] == pytest.approx(b["eval_rewards/margins"], rel=1e-4, abs=1e-5)
            assert not any(name.startswith(("rewards/", "loss")) for name in a)


def test_lora_trains_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    model = fresh(lora=True)
    before = weights(model)
    done = train(model, tmp_path)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert changed == {name for name in before if "lora_" in name}
    assert done.trainable_parameters == sum(before[name].numel() for name in changed) < done.parameters


def test_activation_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain, saving = (
        train(
            fresh(lora=True), tmp_path / str(on), schedule=SCHEDULE.model_copy(update={"activation_checkpointing": on})
        )
        for on in (False, True)
    )
    for a, b in zip(steps_of(plain), steps_of(saving), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_fewer_items_than_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="7 training items, fewer than the 8"):
        train(tiny_model(), tmp_path, rows=rows_for(OBJECTIVES["ctpd"](), 7))


def test_a_response_at_the_first_token_is_refused(tmp_path: Path) -> None:
    rows = rows_for(OBJECTIVES["ctpd"](), 8)
    unit = rows.unit.copy()
    unit[0] = 0
    with pytest.raises(UserError, match="first token of its row"):
        train(tiny_model(), tmp_path, rows=dataclasses.replace(rows, unit=unit))
