"""A recipe with `tune`, end to end: the trials, the choice, the runs with its values, and what is said of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ctpd.app import Experiment, plan
from ctpd.core.store import Store
from harness.record import Record
from harness.tuning import Tuning
from tests.conftest import Cli, Outcome, SmokeRun, run_cli
from tests.fixtures.tuned import TUNE, tuned_recipe, write_tuned

DIVERGING = 1e30  # a learning rate whose first step makes weights that are not finite


class Tuned(NamedTuple):
    """A store in which the recipe was run, and the outcome of that run; ``before`` is the plan before it."""

    recipe: Path
    store: Path
    before: list[dict[str, Any]]
    outcome: Outcome

    @property
    def tunings(self) -> dict[str, Tuning]:
        read = [Tuning.model_validate_json(path.read_bytes()) for path in self.store.glob("choice/*/tuning.json")]
        return {one.run: one for one in read}


@pytest.fixture(scope="module")
def tuned(smoke: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    """Two runs with two trials of two seeds each, one of which diverges, beside the stages of testbed-smoke."""
    folder = tmp_path_factory.mktemp("tuned")
    store = folder / "store"
    shutil.copytree(smoke.pristine, store)
    runs = tuned_recipe()["runs"]
    runs["DPO"]["space"] = {"learning_rate": [1e-3, DIVERGING]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = write_tuned(folder, runs=runs)
        before = json.loads(run_cli("run", recipe, "--store", store, "--plan", "--json").out)
        yield Tuned(recipe, store, before, run_cli("run", recipe, "--store", store, "--device", "cpu"))


def lines(cli: Cli, recipe: Path, store: Path, *flags: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli("run", recipe, "--store", store, "--plan", "--json", *flags).out)
    return found


def test_one_command_tries_chooses_and_trains(tuned: Tuned) -> None:
    assert tuned.outcome.code == 0, tuned.outcome.err
    assert tuned.outcome.out.startswith("Main\n")
    for found in tuned.tunings.values():
        assert len(found.trials) == TUNE["trials"]
        assert found.seeds == tuple(TUNE["seeds"])
        means = [trial.mean or 0.0 for trial in found.trials]
        assert means[found.chosen] == max(means)
        assert found.start is not None
        assert found.shared_documents == 0
    assert set(tuned.tunings) == {"DPO", "CTPD"}


def test_a_trial_that_is_not_finite_is_the_worst_is_named_and_is_not_tried_again(cli: Cli, tuned: Tuned) -> None:
    found = tuned.tunings["DPO"]
    lost = next(trial for trial in found.trials if trial.values["learning_rate"] == DIVERGING)
    assert lost.scores == (None, None)
    assert found.best.values["learning_rate"] == 1e-3
    assert tuned.outcome.err.count("The trial counts as the worst.") == 2
    assert "Trials that were not finite, and count as the worst: DPO" in tuned.outcome.out
    shown = cli("run", tuned.recipe, "--store", tuned.store, "--plan").out
    assert shown.count("failed") >= 2
    assert not list(tuned.store.glob("train/*.partial"))


def test_a_plan_says_what_follows_before_the_choice_and_has_only_hits_after_it(cli: Cli, tuned: Tuned) -> None:
    later = [line for line in tuned.before if line["key"] is None]
    assert {"DPO, seed 0", "CTPD, seed 0", "record: weights: Uniform, seed 0"} <= {line["label"] for line in later}
    known = [line for line in tuned.before if line["key"] is not None]
    assert {"choice: DPO", "choice: CTPD", "Given, seed 0"} <= {line["label"] for line in known}
    after = lines(cli, tuned.recipe, tuned.store)
    assert all(line["hit"] for line in after)
    assert {line["key"] for line in known} < {line["key"] for line in after}
    labels = {line["label"] for line in after}
    assert {line["label"] for line in later} <= labels


def test_a_second_run_builds_nothing_and_prints_the_same(cli: Cli, tuned: Tuned) -> None:
    second = cli("run", tuned.recipe, "--store", tuned.store)
    assert second.err.startswith("0 stages built")
    assert second.out == tuned.outcome.out


def test_the_runs_are_those_of_a_recipe_in_which_the_values_are_written(cli: Cli, tuned: Tuned) -> None:
    """All stages but the records, which tell of the trials: a search that is widened trains nothing anew."""
    recipe = yaml.safe_load(tuned.recipe.read_text())
    del recipe["tune"]
    for name, found in tuned.tunings.items():
        recipe["runs"][name].pop("space", None)
        recipe["runs"][name]["tuned"] = dict(found.best.values)
    del recipe["runs"]["Given"]["tune"]
    written = tuned.recipe.with_name("written.yaml")
    written.write_text(yaml.safe_dump(recipe))
    missing = {line["stage"] for line in lines(cli, written, tuned.store) if not line["hit"]}
    assert missing == {"record"}


def test_records_and_footnotes_tell_of_the_search(tuned: Tuned) -> None:
    records = [Record.read(path) for path in tuned.store.glob("record/*/record.json")]
    found = {one.run: one.tuning for one in records if one.recipe == "tuned"}
    assert found["weights: Uniform"] == found["CTPD"] == tuned.tunings["CTPD"]
    assert found["Given"] is None
    assert found["Student"] is None
    notes = " ".join(tuned.outcome.out.split())
    assert "DPO, CTPD: 2 trials each." in notes
    assert "Not tuned; the recipe gives their values: Given." in notes
    assert "DPO (learning_rate 0.001, the lowest)" in notes


def test_compare_writes_the_trials_from_the_store_alone(cli: Cli, tuned: Tuned) -> None:
    folder = tuned.store / "tables" / "tuned"
    shutil.rmtree(folder)
    shown = json.loads(cli("compare", tuned.recipe, "--store", tuned.store, "--json").out)["tuning"]
    assert {path.name for path in folder.glob("tuning.*")} == {"tuning.md", "tuning.csv", "tuning.tex", "tuning.html"}
    assert "With the values that were chosen for CTPD" in (folder / "weights.md").read_text()
    assert 'id="tuning"' in (folder / "report.html").read_text()
    assert [(line["run"], line["trial"]) for line in shown] == [(r, n) for r in ("DPO", "CTPD") for n in range(3)]


def test_store_gc_keeps_trials_and_runs(cli: Cli, tuned: Tuned) -> None:
    outcome = cli("store", "gc", tuned.recipe, "testbed-smoke", "--store", tuned.store, "--dry-run")
    assert "Would remove 0 artifacts and 0 partial builds" in outcome.out, outcome.out + outcome.err


def test_limit_and_seeds_change_the_runs_and_not_the_trials(cli: Cli, tuned: Tuned) -> None:
    missing = [line for line in lines(cli, tuned.recipe, tuned.store, "--limit", 2) if not line["hit"]]
    assert {line["stage"] for line in missing} == {"evaluate", "record"}
    assert not any("trial" in line["label"] for line in missing)
    chosen = {line["label"] for line in lines(cli, tuned.recipe, tuned.store, "--only", "DPO", "--seed", 0)}
    assert "choice: DPO" in chosen
    assert "choice: CTPD" not in chosen


def test_other_commands_know_the_chosen_runs(cli: Cli, tuned: Tuned) -> None:
    trained = {
        row["run"]: row["key"]
        for row in json.loads(cli("train", tuned.recipe, "--store", tuned.store, "--json", "--quiet").out)
    }
    assert trained["CTPD"] == trained["weights: Origin"]
    scores = json.loads(cli("eval", tuned.recipe, "--store", tuned.store, "--json", "--quiet").out)
    assert set(scores) > {"DPO, seed 0", "CTPD, seed 0", "Given, seed 0"}
    weights = cli("inspect", "weights", tuned.recipe, "--store", tuned.store, "--json")
    assert "CTPD, seed 0" in weights.out
    assert {stage.key for stage in plan(tuned.recipe, store=tuned.store).stages} == {
        line["key"] for line in lines(cli, tuned.recipe, tuned.store)
    }


def test_a_damaged_choice_is_no_choice_and_is_rebuilt_where_that_is_asked(
    cli: Cli, tuned: Tuned, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tuned.store, store)
    for path in store.glob("choice/*/tuning.json"):
        path.write_text("{}")
    assert {run.name for run in Experiment(tuned.recipe, store=Store(store)).later} > {"DPO", "CTPD"}
    refused = cli("run", tuned.recipe, "--store", store, "--quiet")
    assert refused.code == 2
    assert "--rebuild" in refused.err
    shown = [
        text.partition("Written to")[0]
        for text in (cli("run", tuned.recipe, "--store", store, "--quiet", "--rebuild").out, tuned.outcome.out)
    ]
    assert shown[0] == shown[1]
