"""What a user is told of trainings that do little, of cut data, and of weights that weigh nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpd.app import Experiment
from ctpd.core.errors import UserError
from ctpd.ops.weights import WeightParameters, WeightsResult
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.notes import plan_notes, refuse_trainings
from ctpd.pipeline.sources import count_rows
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.summaries import Units, weight_summary
from ctpd.text.prepare import PreparedPairs
from ctpd.train.config import Schedule, Steps, pairs_of_process
from harness.cautions import cautions, cut_text, pairs_text
from harness.provenance import provenance_of
from harness.record import DataSummary
from tests.fixtures.prepared import two_prepared_pairs
from tests.fixtures.records import demo, record


@pytest.fixture
def prepared() -> PreparedPairs:
    return two_prepared_pairs()


def test_a_training_whose_learning_rate_is_always_0_is_refused() -> None:
    """Issue 12: 200 pairs at 128 a step were one step of warm-up, and no weight changed."""
    with pytest.raises(UserError, match="would change nothing: 200 items make one step of 128"):
        Steps.of(200, Schedule(pairs_per_step=128))
    with pytest.raises(UserError, match="fewer than the 128 of one step"):
        Steps.of(100, Schedule(pairs_per_step=128))
    assert Steps.of(200, Schedule(pairs_per_step=128, warmup_ratio=0.0)).total == 1
    assert Steps.of(200, Schedule(pairs_per_step=128, epochs=2)).total == 2


def test_the_steps_are_those_that_the_library_gives_a_learning_rate() -> None:
    """The largest learning rate of a training is 0 in just the cases that are refused."""
    from transformers import get_scheduler

    names = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    for shape, name in names.items():
        for total in range(1, 6):
            for ratio in (0.0, 0.1, 0.5, 1.0):
                schedule = Schedule(pairs_per_step=1, schedule=shape, warmup_ratio=ratio)
                optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
                warmup = int(np.ceil(ratio * total))
                scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
                rates = []
                for _ in range(total):
                    rates.append(scheduler.get_last_lr()[0])
                    optimizer.step()
                    scheduler.step()
                try:
                    found = Steps.of(total, schedule)
                except UserError:
                    assert max(rates) == 0
                else:
                    assert (found.total, found.warmup) == (total, warmup)
                    assert max(rates) > 0


@pytest.mark.parametrize(
    ("items", "note"),
    [
        (320, None),
        (325, None),
        (100, "only 6 optimizer steps, which can hardly train a model; 4 of 100 pairs do not fill a step of 16"),
        (175, "15 of 175 pairs do not fill a step of 16 and are left out of each epoch"),
    ],
)
def test_few_steps_and_many_pairs_left_out_are_said(items: int, note: str | None) -> None:
    found = Steps.of(items, Schedule(pairs_per_step=16)).note
    assert found is None if note is None else str(found).startswith(note)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n'), ("a.json", '[{"a": 1}, {"a": 2}]'), ("a.csv", 'a,b\n1,"2\n3"\n4,5\n'),
    ],
)  # fmt: skip
def test_rows_of_a_file_are_counted(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert count_rows(tmp_path / name) == 2
    assert count_rows(tmp_path / "none.jsonl") is None


def edited(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    import ctpd

    text = (Path(str(ctpd.__file__)).parent / "recipes" / "testbed-smoke.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def planned(folder: Path, size: str) -> tuple[Stage, ...]:
    return Graph(Experiment(edited(folder, ("pairs_per_step: 16", size))).records).stages


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ((16, 8, 2), 2),
        ((16, 1, 8), 16),
        ((16, 3, None), "over 3 processes"),
        ((16, 8, 8), "2 pairs .* of 8 processes, .* of 8"),
    ],
)
def test_a_step_is_divided_over_processes_and_micro_batches(
    given: tuple[int, int, int | None], share: int | str
) -> None:
    def divided() -> int:
        return pairs_of_process(given[0], num_processes=given[1], micro_batch=given[2])

    if isinstance(share, int):
        assert divided() == share
    else:
        with pytest.raises(UserError, match=share):
            divided()


def test_a_plan_refuses_and_says_what_is_known_before_anything_runs(tmp_path: Path) -> None:
    notes = plan_notes(Graph(Experiment("testbed-smoke").records))
    assert "only 4 optimizer steps" in notes[0]
    with pytest.raises(UserError, match=r"teacher: SFT: .*would change nothing"):
        refuse_trainings(planned(tmp_path, "pairs_per_step: 64"), num_processes=1)
    with pytest.raises(UserError, match="SFT: 16 pairs of a step cannot be divided evenly over 3 processes"):
        refuse_trainings(planned(tmp_path, "pairs_per_step: 16"), num_processes=3)
    refuse_trainings(planned(tmp_path, "pairs_per_step: 16"), num_processes=8)


def summary(prepared: Any, ratio: float, **parameters: float) -> Any:
    starts = np.concatenate([[0], np.cumsum(prepared.num_spans)]).astype(np.int64)
    given = WeightParameters(**parameters)
    log_ratio = torch.linspace(-ratio, ratio, int(starts[-1]), dtype=torch.float64)
    weights = given.k * torch.exp(given.mu * log_ratio.clamp(given.lower, given.upper)).float()
    result = WeightsResult(weights, log_ratio, 0.0, 0.0)
    return weight_summary(result, prepared, Units(starts, None), parameters=given, examples=())


def test_weights_that_are_all_equal_are_said_with_the_cause(prepared: Any) -> None:
    assert "the two contrastive models give nearly the same probabilities" in summary(prepared, 1e-4).note
    assert summary(prepared, 1.0).note is None
    assert summary(prepared, 1.0, mu=0.0).note is None, "asked for"


def test_a_report_says_what_was_cut_left_out_and_weighs_nothing() -> None:
    counts = {"responses_cut": 15, "cut_prompts": 1, "train_pairs": 12, "train_responses_cut": 12, "train_cut_prompts": 1,
              "eval_pairs": 4, "eval_responses_cut": 3, "eval_cut_prompts": 0}  # fmt: skip
    assert cut_text(16, counts) == (
        "15 of 32 responses and 1 of 16 prompts (train: 12 of 24 responses and 1 of 12 prompts; eval: 3 of 8 responses)"
    )
    assert pairs_text(16, {"equal": 2}, {}) == "16, dropped: 2 equal, cut: none"
    cut = record("A", None, data=DataSummary(pairs=16, dropped={}, counts=counts))
    assert any("cut: 15 of 32 responses" in text for text in cautions([cut]))
    assert any("cut: 15 of 32 responses" in value for _, values in provenance_of([cut]).facts for value in values)
    one, other = demo(["CTPD", "DPO"])
    assert one.training is not None
    assert one.weights is not None
    assert list(cautions([one, other])) == []
    short = {"note": "only 3 optimizer steps", "items": 100, "left_out": 4}
    one = one.model_copy(
        update={
            "training": one.training.model_copy(update=short),
            "weights": one.weights.model_copy(update={"note": "all importance weights are equal"}),
        }
    )
    assert list(cautions([one, other])) == ["CTPD: only 3 optimizer steps.", "CTPD: all importance weights are equal."]
    assert any("4 of 100" in values for _, values in provenance_of([one]).facts)
