"""What `--plan` says of time, memory and disk: from the most similar finished stages of the store, or that it cannot tell."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctpd.app import Experiment
from ctpd.core.store import Store
from ctpd.pipeline.estimates import Cost, Estimates, total
from ctpd.pipeline.references import TRAINING
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.evaluate import RESULT
from ctpd.pipeline.stages.train import TrainStage
from tests.conftest import Cli


@dataclass(frozen=True, eq=False, kw_only=True)
class Made(Stage):
    """A stage with two fields."""

    kind = "made"

    method: str
    size: int
    data: str = "d" * 32

    def build(self, work: Work) -> None:
        (work.folder / "file").write_bytes(b"x" * self.size)


def finish(store: Store, stage: Stage, seconds: float, **files: object) -> None:
    provenance = {"label": stage.label, "seconds": seconds}
    with store.build(stage.kind, stage.key, identity=stage.identity, provenance=provenance) as folder:
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_most_similar_stage_is_taken_and_an_unknown_kind_has_no_estimate(tmp_path: Path) -> None:
    store = Store(tmp_path)
    planned = Made(label="x", method="b", size=3, data="f" * 32)
    assert Estimates(store).of(planned) is None
    finish(store, Made(label="x", method="b", size=3, data="e" * 32), 5000.0)
    assert Estimates(store).of(planned) is None  # it is of other data
    finish(store, Made(label="x", method="a", size=1, data="f" * 32), 1.0)
    finish(store, Made(label="x", method="b", size=2, data="f" * 32), 9.0, file="0123")
    cost = Estimates(store).of(planned)
    assert cost is not None
    assert (cost.seconds, cost.memory_mib) == (9.0, None)
    assert cost.disk > 6


def test_trainings_are_scaled_by_steps_and_evaluations_by_documents(tmp_path: Path) -> None:
    store, experiment = Store(tmp_path), Experiment("testbed-smoke", only=["DPO"])
    (training,) = experiment.training
    assert isinstance(training, TrainStage)
    steps = training.planned_steps()
    assert steps is not None
    finish(store, training, 10.0, training={"steps": 2 * steps.total, "peak_memory_mib": 77.5})
    assert TRAINING == "training.json"
    cost = Estimates(store).of(training)
    assert cost is not None
    assert (cost.seconds, cost.memory_mib) == (pytest.approx(5.0), 77.5)

    whole = next(iter(experiment.evaluations[0].values()))
    part = next(iter(Experiment("testbed-smoke", only=["DPO"], limit=5).evaluations[0].values()))
    finish(store, whole, 20.0, result={"protocol": {"num_docs": 100, "num_total": 100}})
    assert RESULT == "result.json"
    assert Estimates(store).of(part) == (pytest.approx(1.0), None, pytest.approx(0, abs=5000))


def test_a_total_counts_what_it_knows_and_says_what_it_does_not() -> None:
    assert total([Cost(1.0, 5.0, 10), None, Cost(2.0, None, 20)]) == (3.0, 5.0, 30, 1)
    assert total([]) == (0, None, 0, 0)


def test_damaged_or_foreign_files_give_no_estimate(tmp_path: Path) -> None:
    store = Store(tmp_path)
    planned = Made(label="x", method="b", size=3)
    finish(store, planned, 9.0)
    (store.path(planned.kind, planned.key) / "manifest.json").write_text("{", encoding="utf-8")
    (tmp_path / "made" / "notes").mkdir()
    assert Estimates(store).of(planned) is None


def test_a_plan_on_a_new_store_says_that_it_cannot_tell(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("run", "testbed-smoke", "--store", tmp_path / "new", "--plan")
    assert outcome.code == 0, outcome.err
    assert "No estimate of time and memory: this store has built nothing like it" in outcome.out
    lines = json.loads(cli("run", "testbed-smoke", "--store", tmp_path / "new", "--plan", "--json").out)
    assert {line["estimate"] for line in lines} == {None}
