"""NaN and infinity stop the stage, with step, pairs and the last good state; nothing is made of them."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from baselines.dpo import DPO, DPOParams
from ctpd.core.errors import NotFinite, UserError
from ctpd.decoding import greedy_responses
from ctpd.models import load_model, save_model
from ctpd.objectives.base import Sums
from ctpd.ops.finite import non_finite_weight
from ctpd.pipeline.stages.weights import refuse_non_finite_weights
from ctpd.train.batches import UnitBatch
from ctpd.train.collator import ScoredRows
from ctpd.train.config import Schedule
from ctpd.train.scoring import ScoringSettings, scoring_pass, token_logps, top_k
from ctpd.train.trainer import UnitPass
from harness.finite import finite_logits, refuse_non_finite
from harness.formats import FORMATS
from harness.sheet import Table, TableSpec
from harness.statistics import Paired, crossed_bootstrap
from harness.tables import build_tables
from tests.fixtures.data_parallel import train
from tests.fixtures.records import record, remeasured, result
from tests.fixtures.tiny import tiny_model, tiny_rows

SCHEDULE = Schedule(pairs_per_step=4, warmup_ratio=0.0, schedule="constant")


def named_rows(num_items: int, **changes: Any) -> ScoredRows:
    names = tuple(f"pair-{item}" for item in range(num_items))
    return dataclasses.replace(tiny_rows(num_items), names=names, **changes)


class Spoiled:
    """A forward pass that goes wrong in one step, and notes which items each step had."""

    def __init__(self, step: int, spoil: Callable[[Sums, nn.Module], Sums]) -> None:
        self.objective = DPO(DPOParams())
        self.rows = dataclasses.replace(named_rows(24), weights=None)
        self.seen: dict[int, list[str]] = {}
        self._pass, self._step, self._spoil, self._at = UnitPass(self.objective), step, spoil, 1

    def __call__(self, model: nn.Module, batch: UnitBatch) -> Sums:
        for row in batch.tokens.input_ids[: batch.num_pairs].tolist():
            self.seen.setdefault(self._at, []).append(self._name(row))
        sums = self._pass(model, batch)
        return self._spoil(sums, model) if self._at == self._step else sums

    def progress(self, done: int, total: int) -> None:
        self._at = done + 1

    def train(self, folder: Path, **changes: Any) -> Any:
        return train(
            tiny_model(),
            folder,
            **{
                "objective": self.objective,
                "rows": self.rows,
                "forward_pass": self,
                "progress": self.progress,
                "schedule": SCHEDULE,
                **changes,
            },
        )

    def _name(self, ids: list[int]) -> str:
        for item, (row, _) in enumerate(self.rows.items):
            own = self.rows.input_ids[self.rows.row_starts[row] : self.rows.row_starts[row + 1]].tolist()
            if ids[: len(own)] == own and not any(ids[len(own) :]):
                return self.rows.names[item]
        raise AssertionError


def bad_loss(sums: Sums, _model: nn.Module) -> Sums:
    return dataclasses.replace(sums, loss=sums.loss * math.inf)


def bad_gradient(sums: Sums, model: nn.Module) -> Sums:
    """The gradient of a square root at zero is infinite, and times zero it is NaN."""
    zero = 0 * next(model.parameters()).sum()
    return dataclasses.replace(sums, loss=sums.loss + zero.abs().sqrt())


def bad_metric(sums: Sums, _model: nn.Module) -> Sums:
    return dataclasses.replace(sums, metrics={**sums.metrics, "saturation": torch.tensor(math.nan)})


# Trainings


@pytest.mark.parametrize("logged", [200, 2])
@pytest.mark.parametrize(("spoil", "name"), [(bad_loss, "loss"), (bad_gradient, "gradient norm")])
def test_the_first_bad_step_is_named_with_its_pairs_though_few_steps_are_logged(
    spoil: Callable[[Sums, nn.Module], Sums],
    name: str,
    logged: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ctpd.train.fit.LOGGED_STEPS", logged)
    spoiled = Spoiled(2, spoil)
    with pytest.raises(NotFinite, match=f"the {name} is not finite at step 2 of 6") as stopped:
        spoiled.train(tmp_path)
    assert isinstance(stopped.value, UserError)
    assert sorted(part for part in stopped.value.what.split("'") if part.startswith("pair-")) == sorted(spoiled.seen[2])
    assert "No resume state was written" in stopped.value.what
    assert "Lower the learning rate, which is 0.001" in str(stopped.value)
    assert max(spoiled.seen) == (2 if logged == 200 else 3)


def test_the_last_good_state_is_named_and_holds_the_numbers_before(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match="The last good resume state is that of step 2"):
        Spoiled(3, bad_gradient).train(tmp_path, checkpoint_seconds=0)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_metric_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match="the metric saturation is not finite at step 4 of 6"):
        Spoiled(4, bad_metric).train(tmp_path)


def test_a_learning_rate_of_a_billion_stops_in_one_paragraph(tmp_path: Path) -> None:
    rows = dataclasses.replace(named_rows(40), weights=None)
    with pytest.raises(NotFinite) as stopped:
        train(tiny_model(), tmp_path, objective=DPO(DPOParams()), rows=rows, schedule=SCHEDULE, learning_rate=1e9)
    assert "not finite" in str(stopped.value)
    assert "which is 1e+09" in str(stopped.value)
    assert stopped.value.exit_code == 2
    assert "\n" not in str(stopped.value)


def test_weights_that_the_last_step_has_spoiled_are_not_saved(tmp_path: Path) -> None:
    rows = dataclasses.replace(named_rows(4), weights=None)
    with pytest.raises(NotFinite, match=r"the trained weight \S+ is not finite after step 1"):
        train(tiny_model(), tmp_path, objective=DPO(DPOParams()), rows=rows, schedule=SCHEDULE, learning_rate=1e39)


def test_an_evaluation_that_is_not_finite_names_its_pairs(tmp_path: Path) -> None:
    rows, reference = named_rows(3), np.zeros(1, dtype=np.float32)
    assert rows.reference is not None
    reference = rows.reference.copy()
    reference[rows.unit_starts[2]] = 3e38  # finite, so that it passes the check of the rows; its sum is not
    reference[rows.unit_starts[2] + 1] = 3e38
    with pytest.raises(NotFinite, match=r"the metric eval_loss, among the evaluation pairs .*'pair-1'"):
        train(
            tiny_model(),
            tmp_path,
            objective=DPO(DPOParams()),
            rows=dataclasses.replace(named_rows(8), weights=None),
            eval_rows=dataclasses.replace(rows, reference=reference, weights=None),
            schedule=SCHEDULE.model_copy(update={"evaluations_per_epoch": 1}),
        )


@pytest.mark.parametrize("field", ["reference", "weights"])
def test_rows_with_constants_that_are_not_finite_are_refused_by_name(field: str, tmp_path: Path) -> None:
    rows = named_rows(8)
    values = getattr(rows, field).copy()
    values[rows.unit_starts[2 * 5 + 1]] = np.nan  # in the rejected response of pair 5
    with pytest.raises(NotFinite, match="of 'pair-5' are not finite"):
        train(tiny_model(), tmp_path, rows=dataclasses.replace(rows, **{field: values}))


# Models


@pytest.fixture
def broken_folder(tmp_path: Path) -> Path:
    """A model directory with one weight that is NaN."""
    folder = tmp_path / "broken"
    save_model(tiny_model(scorer=False), folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_with_a_weight_that_is_nan_is_refused_where_it_is_loaded(broken_folder: Path, precision: str) -> None:
    with pytest.raises(NotFinite, match=r"broken: the weight model\.norm\.weight of the model holds NaN"):
        load_model(broken_folder, precision=precision, device="cpu")


def test_weights_that_are_large_are_finite() -> None:
    model = tiny_model()
    assert non_finite_weight(model) is None
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    assert non_finite_weight(model) is None
    model.requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = -math.inf
    assert non_finite_weight(model) == "lm_head.weight"
    assert non_finite_weight(model, trainable_only=True) is None


def overflowing(scorer: bool = True) -> Any:
    """A model whose weights are finite and whose logits are not."""
    model: Any = tiny_model(scorer=scorer)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    return model


@pytest.mark.parametrize("measure", [token_logps, top_k(3, 1.0)])
def test_a_scoring_pass_refuses_log_probabilities_that_are_not_finite(measure: Any) -> None:
    settings = ScoringSettings(
        max_tokens=10, progress=lambda done, total: None, model="models/teacher", row_name="pair {}".format
    )
    with pytest.raises(NotFinite, match="models/teacher: the log-probabilities that the model gives to 'pair "):
        scoring_pass(overflowing(), tiny_rows(3).tokens, measure=measure, settings=settings)


def test_importance_weights_that_are_not_finite_are_refused() -> None:
    values = np.array([1, 1, 1, np.inf, 1], dtype=np.float32)
    refuse_non_finite_weights(values[:3], ["a"], np.array([0, 2, 3]))
    with pytest.raises(NotFinite, match="of the pairs 'b' are not finite"):
        refuse_non_finite_weights(values, ["a", "b"], np.array([0, 1, 2, 3, 5]))


@pytest.mark.parametrize("cached", [True, False])
def test_no_token_is_the_likeliest_of_nan(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpd.decoding.takes_padded_prompts", lambda model: cached)
    prompts = [np.array([1, 2, 3], dtype=np.int32)]
    with pytest.raises(NotFinite, match="logits of the model are not finite"):
        greedy_responses(overflowing(), prompts, end_token=0, max_tokens=8, progress=lambda done, total: None)


# Evaluations


class Fixed(nn.Module):
    """Gives the logits that it is given."""

    def forward(self, logits: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=logits)


def test_logits_of_every_pass_are_watched_and_masked_tokens_are_allowed() -> None:
    model, logits = Fixed(), torch.zeros(1, 2, 4)
    masked, wrong, unbounded = (
        logits.index_fill(2, torch.tensor([1]), value) for value in (-math.inf, math.nan, math.inf)
    )
    for bad in (wrong, unbounded):
        with finite_logits(model) as check:
            for good in (logits, masked):
                model(good)
            check()
            model(bad)
            model(logits)
            with pytest.raises(NotFinite, match="logits of the model"):
                check()
    assert not model._forward_hooks


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_likelihoods_and_scores_that_are_not_finite_are_refused(bad: float) -> None:
    good = {"doc_id": 0, "resps": [[(-1.5, True)], [(-2.0, False)]]}
    refuse_non_finite({"task": [good, {"doc_id": 1, "resps": [["text"]]}]}, {"acc,none": 0.5})
    with pytest.raises(NotFinite, match="documents '7' of 'task'"):
        refuse_non_finite({"task": [good, {"doc_id": 7, "resps": [[(-1.0, True)], [(bad, False)]]}]}, {})
    with pytest.raises(NotFinite, match="the score 'acc,none' is not finite"):
        refuse_non_finite({"task": [good]}, {"acc,none": bad})


# Comparisons

SPEC = TableSpec(
    name="main",
    caption="Main",
    rows=(("Base", "base"), ("Good", "good"), ("Bad", "bad"), ("Worse", "worse")),
    base="base",
)


def study(**bad: Any) -> Iterator[Any]:
    scores = {
        "base": [1, 0, 0, 0, 1, 0],
        "good": [1, 1, 0, 0, 1, 0],
        "bad": [1, 1, 1, 0, 1, 1],
        "worse": [0, 0, 0, 0, 1, 0],
    }
    for run, of_run in scores.items():
        for seed in (0, 1):
            one = record(run, seed, result("A", of_run), result("B", of_run[::-1]))
            yield remeasured(one, "A", **bad) if run == "bad" and seed == 1 and bad else one


def table(records: Any, spec: TableSpec = SPEC) -> Table:
    (made,) = build_tables(list(records), [spec])
    return made


@pytest.mark.parametrize("kind", ["score", "document"])
def test_a_row_that_is_not_finite_is_shown_so_and_neither_ranked_nor_compared(kind: str) -> None:
    documents = [one for one in study() if one.run == "bad"][1].evaluation["A"].documents
    spoiled = (documents[0]._replace(score=None), *documents[1:])
    bad = {"value": None} if kind == "score" else {"documents": spoiled}
    made = table(study(**bad))
    without = table(
        (one for one in study() if one.run != "bad"), dataclasses.replace(SPEC, rows=(*SPEC.rows[:2], SPEC.rows[3]))
    )
    base, good, row, worse = made.rows
    assert [cell and cell.mean for cell in row.cells] == [None, pytest.approx(5 / 6), None]
    assert all(cell is not None and cell.rank is None for cell in row.cells)
    assert (row.difference, row.differences, row.p_value, row.mcnemar) == (None, None, None, None)
    assert (base, good, worse) == without.rows  # all other numbers are those of a table without it
    assert "Not finite: bad (seed 1) on A." in " ".join(made.footnotes)
    for form, write in FORMATS.items():
        text = write(made)
        assert not re.search(r"\bnan\b", text, re.IGNORECASE), form
        assert "not finite" in text or form == "csv"


def test_nothing_is_compared_with_a_base_that_is_not_finite() -> None:
    made = table(study(value=None), dataclasses.replace(SPEC, base="bad"))
    assert all(row.difference is None and row.p_value is None for row in made.rows)


def test_the_bootstrap_takes_no_nan() -> None:
    with pytest.raises(ValueError, match="column 'A' is not finite"):
        crossed_bootstrap([Paired((None,), {"A": np.array([[0.5, math.nan]])})])
