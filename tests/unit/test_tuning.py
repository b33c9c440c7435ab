"""Hyper-parameter search: the points that are tried, the choice, what a recipe may say of it, and the stages of a plan."""

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ctpd.app import Experiment, plan
from ctpd.core.config import Tunable
from ctpd.core.errors import UserError
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.methods import METHODS, Method, params_type
from ctpd.pipeline.search import declared, points
from ctpd.pipeline.stages.train import TrainStage
from harness.search_notes import tuning_notes
from harness.search_table import tuning_frame, tuning_view
from harness.tuning import Trial, Tuning, choose
from tests.fixtures.records import record, result
from tests.fixtures.tuned import TUNE, tuned_recipe, write_tuned

SPACE = {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-3), "beta": (0.03, 0.1, 0.3, 1.0), "mu": (0.5, 1.0, 2.0)}


@pytest.mark.parametrize("trials", [2, 5, 8, 12, 16])
def test_every_learning_rate_is_tried_equally_often_and_every_value_when_there_are_enough_trials(trials: int) -> None:
    found = points(SPACE, trials)
    assert len({tuple(point.items()) for point in found}) == trials
    for name, levels in SPACE.items():
        counts = Counter(point[name] for point in found)
        assert max(counts.values()) - min(counts[level] for level in levels) <= 1, name
        assert list(found[0]) == list(SPACE)


def test_points_are_the_same_each_time_and_more_trials_keep_the_first_ones() -> None:
    assert points(SPACE, 12)[:8] == points(SPACE, 8) == points(dict(SPACE), 8)


def test_pairs_of_values_are_spread() -> None:
    """With as many trials as pairs of a learning rate and a beta, each pair is tried once."""
    found = points({name: SPACE[name] for name in ("learning_rate", "beta")}, 16)
    assert len({(point["learning_rate"], point["beta"]) for point in found}) == 16
    wider = points(SPACE, 16)
    assert len({(point["learning_rate"], point["beta"]) for point in wider}) == 16


def test_a_space_with_fewer_points_than_trials_is_tried_as_a_whole() -> None:
    assert len(points({"learning_rate": (1e-3, 3e-3), "k": (1, 2)}, 8)) == 4
    assert all(isinstance(point["k"], int) for point in points({"learning_rate": (1e-3,), "k": (1, 2)}, 8))


@pytest.mark.parametrize("name", METHODS)
def test_declared_values_ascend_are_in_range_and_hold_the_default(name: str) -> None:
    defaults = params_type(name)()
    for field, values in declared(name).items():
        assert list(values) == sorted(set(values)), field
        assert len(values) > 1
        assert getattr(defaults, field) in values, field
        for value in values:
            Method.make(name, {field: value}, source="test")


def test_most_methods_declare_a_parameter_and_the_mark_is_no_part_of_a_key() -> None:
    assert {name for name in METHODS if not declared(name)} == {"sft", "sequence_kd"}
    assert "Tunable" not in str(Method.make("dpo", {"beta": 0.2}, source="test").identity)
    assert Tunable((1.0,)) == Tunable((1.0,))


def trial(*scores: float | None, rate: float = 1e-3) -> Trial:
    return Trial(values={"learning_rate": rate}, scores=scores)


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([trial(0.5, 0.6), trial(0.7, 0.5), trial(0.1, 0.9)], 1),
        ([trial(0.1, 0.2, 0.3), trial(0.3, 0.1, 0.2)], 0),  # the same scores in another order are equal: the first
        ([trial(0.9, None), trial(0.1, 0.1)], 1),
        ([trial(None, None), trial(0.0, 0.0)], 1),
    ],
    ids=["mean", "tie", "one seed not finite", "zero beats not finite"],
)
def test_the_highest_mean_is_chosen_of_equal_ones_the_first_and_never_one_that_is_not_finite(
    trials: list[Trial], chosen: int
) -> None:
    assert choose(trials, run="X") == chosen


def test_a_run_none_of_whose_trials_is_finite_is_refused() -> None:
    with pytest.raises(UserError, match=r"none of the 2 trials of 'X' has a finite score\. Give lower learning rates"):
        choose([trial(None, None), trial(0.2, None)], run="X")


def tuning(run: str, *scores: float, start: float | None = 0.5, **changes: Any) -> Tuning:
    rates = (1e-4, 1e-3, 1e-2)[: len(scores)]
    trials = tuple(trial(score, score, rate=rate) for score, rate in zip(scores, rates, strict=True))
    fields: dict[str, Any] = {
        "run": run, "suite": "dev", "seeds": (8, 9), "asked": 3, "space": {"learning_rate": rates}, "trials": trials,
        "chosen": choose(trials, run=run), "start": start,
    }  # fmt: skip
    return Tuning(**(fields | changes))


def notes(found: Mapping[str, Tuning | None]) -> str:
    records = [record(run, 0, result("A", [1, 0]), kind="trained", tuning=tuned) for run, tuned in found.items()]
    return "\n".join(tuning_notes({run: run.upper() for run in found}, records))


def test_footnotes_name_ends_runs_without_gain_unequal_trials_and_untuned_rows() -> None:
    text = notes({
        "a": tuning("a", 0.4, 0.7, 0.6),
        "b": tuning("b", 0.4, 0.45, 0.5),
        "c": tuning("c", 0.6, 0.7, start=None),
        "d": tuning("a", 0.4, 0.7, 0.6),
        "e": None,
    })  # fmt: skip
    assert "(suite `dev`) over the training seeds 8, 9" in text
    assert "The number of trials is not equal: A 3, B 3, C 2." in text
    assert (
        "end of what was tried, so that a wider space could give more: B (learning_rate 0.01, the highest), C (" in text
    )
    assert "No gain at any setting, on development documents: B (best trial 50.00, start 50.00)." in text
    assert "With the values that were chosen for a, without trials of their own: D." in text
    assert "Not tuned; the recipe gives their values: E." in text
    assert "not finite" not in text


def test_footnotes_name_trials_that_were_not_finite_and_documents_that_the_choice_has_seen() -> None:
    lost = tuning("a", 0.6, 0.7)
    lost = lost.model_copy(update={"trials": (trial(0.6, None), lost.trials[1]), "shared_documents": 7})
    text = notes({"a": lost})
    assert "Trials that were not finite, and count as the worst: A ('learning_rate 0.001')." in text
    assert "7 documents of the tables are development documents, too" in text


def test_a_table_of_untuned_rows_says_nothing_of_a_search() -> None:
    assert notes({"a": None}) == ""
    assert tuning_view([record("a", 0, result("A", [1]))]) is None


def test_the_table_of_trials_has_the_start_every_trial_and_the_chosen_one() -> None:
    records = [record("a", 0, result("A", [1]), kind="trained", tuning=tuning("a", 0.4, 0.7))]
    frame = tuning_frame([*records, *records])
    assert frame["trial"].tolist() == [0, 1, 2]
    assert frame["chosen"].tolist() == [False, False, True]
    assert frame["average"].tolist() == pytest.approx([50, 40, 70])
    assert frame["learning_rate"].tolist()[1:] == [1e-4, 1e-3]
    view = tuning_view(records)
    assert view is not None
    assert [row[3].text for row in view.rows] == ["50.00", "40.00", "70.00"]


def test_a_record_keeps_its_search_and_an_older_record_has_none(tmp_path: Path) -> None:
    one = record("a", 0, result("A", [1]), kind="trained", tuning=tuning("a", 0.4, 0.7))
    one.write(tmp_path / "a.json")
    assert type(one).read(tmp_path / "a.json") == one
    older = record("a", 0, result("A", [1])).model_dump(mode="json", by_alias=True)
    del older["tuning"]
    assert type(one).model_validate(older, strict=False).tuning is None


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one trial": ({"tune.trials": 1}, ("'tune.trials' must be a whole number of at least 2, and is 1",)),
    "one seed": ({"tune.seeds": [100]}, ("'tune.seeds': at least two seeds are needed",)),
    "seed twice": ({"tune.seeds": [100, 100]}, ("'tune.seeds': the seed 100 is given twice",)),
    "seeds of the study": ({"tune.seeds": [0, 100]}, ("the seed 0 is in `tune.seeds` and in `shared.seeds`",)),
    "no learning rate": ({"tune.space": {"beta": [0.1]}}, ("'tune.space' lacks `learning_rate`",)),
    "empty space": ({"tune.space.beta": []}, ("'tune.space.beta' must be a list that is not empty",)),
    "negative rate": ({"tune.space.learning_rate": [1e-3, -1]}, ("must be a number above 0, and is -1",)),
    "value twice": ({"tune.space.beta": [1, 1.0]}, ("'tune.space.beta' holds a value twice",)),
    "unknown key": ({"tune.seed": [1]}, ("unknown key 'tune.seed'. Did you mean 'seeds'?",)),
    "tuned and given": ({"runs.DPO.tuned": {"learning_rate": 1e-3}}, ("'runs.DPO' gives `tuned`", "`tune: false`")),
    "fixed and varied": ({"runs.CTPD.space": {"mu": [1.0, 2.0]}}, ("fixes `mu` in `params`, and `space` varies it",)),
    "space of nothing": ({"runs.Given.space": {"beta": [0.1]}}, ("'runs.Given.space' does nothing",)),
    "nothing given": ({"runs.Given.tuned": {}}, ("'runs.Given.tuned' lacks `learning_rate`",)),
    "nothing tuned": ({"runs.DPO": {"method": "dpo", "tune": False, "tuned": {"learning_rate": 1.0}}, "runs.CTPD": {"method": "ctpd", "tune": False, "tuned": {"learning_rate": 1.0}}}, ("nothing is tuned",)),
    "ablation of an untuned run": ({"ablations.weights": {"base": "Given", "field": "beta", "values": {"Origin": 0.1}, "tune": True}}, ("'ablations.weights.tune' does nothing",)),
    "table's name": ({"tables.tuning": {"caption": "x", "rows": ["DPO"]}}, ("may not be named `tuning`",)),
    "no method's parameter": ({"tune.space.betta": [0.1]}, ("no method of a tuned run declares 'betta' to be tuned. Did you mean 'beta'?",)),
    "not to be tuned": ({"tune.space.k": [1.0]}, ("declares 'k' to be tuned", "in the `space` of its run")),
    "out of range": ({"tune.space.beta": [0.1, -1.0]}, ("'beta' must be a number above 0, and is -1.0",)),
    "unknown to the method": ({"runs.DPO.space": {"mu": [1.0]}}, ("the method 'dpo' has no parameter 'mu'",)),
    "out of the run's range": ({"runs.DPO.space": {"beta": [0.0, 0.1]}}, ("'beta' must be a number above 0, and is 0.0",)),
    "too large": ({"runs.DPO.space": {"beta": [n / 1e4 for n in range(1, 6000)]}}, ("has 11,998 points; 10,000 are the most",)),
    "the study's task": ({"tune.suite": "study.yaml"}, ("is in the suite 'study' of the search and in the study's",)),
    "no suite": ({"tune.suite": "nowhere"}, ("there is no suite 'nowhere'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_tuned_is_refused_by_key_and_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, parts = WRONG[name]
    recipe = tuned_recipe()
    for key, value in changes.items():
        *parents, last = key.split(".")
        block = recipe
        for parent in parents:
            block = block[parent]
        block[last] = value
    path = write_tuned(tmp_path, **recipe)
    with pytest.raises(UserError) as error:
        _ = Experiment(path).choices
    for part in parts:
        assert part in str(error.value)
    assert name == "no suite" or "tuned.yaml, line " in str(error.value)


def test_a_recipe_without_tune_refuses_what_belongs_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tuned(tmp_path, tune=None, runs={"DPO": {"method": "dpo", "tuned": {"learning_rate": 1.0}, "space": {"beta": [1]}}}, ablations={}, tables={"main": {"caption": "x", "rows": ["DPO"]}})  # fmt: skip
    with pytest.raises(UserError, match=r"line \d+: 'runs\.DPO\.space' does nothing: the run is not tuned"):
        Experiment(path)


def test_before_the_trials_have_chosen_a_plan_has_the_trials_and_what_needs_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tuned(tmp_path)
    experiment = Experiment(path)
    assert {run.name for run in experiment.runs} == {"Teacher", "Student", "Given"}
    assert {run.name for run in experiment.later} == {"DPO", "CTPD", "weights: Origin", "weights: Uniform"}
    assert [choice.label for choice in experiment.choices] == ["choice: DPO", "choice: CTPD"]
    trained = [stage.label for stage in plan(path).stages if stage.kind == "train" and ": trial " in stage.label]
    assert len(trained) == 2 * 2 * 2
    assert "DPO: trial 1 (learning_rate 0.001, beta 0.1), seed 100" in trained
    assert not any(label == "DPO, seed 0" for label in trained)
    only = Experiment(path, only=["weights: Uniform"])
    assert [choice.label for choice in only.choices] == ["choice: CTPD"]


def test_an_ablation_with_tune_has_trials_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ablations = copy.deepcopy(tuned_recipe()["ablations"])
    ablations["weights"]["tune"] = True
    ablations["rate"] = {"base": "DPO", "field": "learning_rate", "values": {"x": 5e-3}, "tune": True}
    path = write_tuned(tmp_path, ablations=ablations, tune=TUNE | {"space": {"learning_rate": [1e-3, 3e-3]}})
    search = Experiment(path).search
    assert search is not None
    assert set(search.choices) == {"DPO", "CTPD", "weights: Origin", "weights: Uniform", "rate: x"}
    assert {point["learning_rate"] for point in search.points["rate: x"]} == {5e-3}
    assert {len(found) for found in search.points.values()} == {2}
    trained = [stage for stage in search.choices["weights: Uniform"].attempts() if isinstance(stage, TrainStage)]
    assert {stage.method.params.model_dump()["weights"] for stage in trained} == {"uniform"}


def test_a_larger_space_keeps_the_stages_of_trials_that_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = Graph(Experiment(write_tuned(tmp_path)).choices)
    large = Graph(Experiment(write_tuned(tmp_path, tune=TUNE | {"trials": 4, "space": {"learning_rate": [1e-3, 3e-3], "beta": [0.1, 1.0]}})).choices)  # fmt: skip
    kept = {stage.key for stage in small.stages if stage.kind != "choice"} & {stage.key for stage in large.stages}
    assert sum(stage.kind == "train" and stage.key in kept for stage in large.stages) >= 4
