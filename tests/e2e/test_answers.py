"""Collapsed models are marked, and a column that cannot be measured takes nothing else with it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from ctpd.cli.template import shipped_text
from tests.conftest import Cli, SmokeRun
from tests.fixtures.colours import write_data, write_tasks

SMOKE = "testbed-smoke"


def test_a_model_that_was_trained_to_pieces_is_marked_in_the_table_and_shown_by_eval(
    cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    """DPO with an absurd learning rate: the answers no longer end, and the row says so."""
    recipe = tmp_path / "broken.yaml"
    text = (
        shipped_text(SMOKE)
        .replace(f"name: {SMOKE}", "name: broken")
        .replace("learning_rate: 1e-3, beta: 0.1}}", "learning_rate: 1.0, beta: 0.1}}")
    )
    recipe.write_text(text)
    store = shutil.copytree(smoke.pristine, tmp_path / "store")
    options = ("--only", "DPO", "--only", "Student", "--store", store, "--quiet")
    outcome = cli("run", recipe, *options)
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "DPO §" in shown
    assert "§ Unhealthy, whatever the score: DPO: answers do not end by themselves" in shown
    assert "Student §" not in shown
    scores = cli("eval", recipe, *options)
    assert scores.code == 0, scores.err
    assert "end by themselves" in scores.out
    assert "repeated 4-grams" in scores.out


@pytest.fixture
def long_suite(tmp_path: Path) -> Path:
    """A column that fits into any model, and one that generates more tokens than the models of smoke have room for."""
    tasks = write_tasks(tmp_path / "tasks")
    long = yaml.safe_load((tasks / "colour_words.yaml").read_text())
    long |= {"task": "colour_long", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 100_000, "do_sample": False}}
    (tasks / "colour_long.yaml").write_text(yaml.safe_dump(long))
    column = {"version": 1.0, "shots": 0, "folder": "tasks"}
    columns = [
        column | {"name": "Long", "task": "colour_long", "metric": "exact_match,whole"},
        column | {"name": "Choice", "task": "colour_choice", "metric": "acc,none"},
    ]
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": "own", "columns": columns}))
    return suite


def test_a_column_that_cannot_be_measured_is_a_dash_and_the_command_ends_with_an_error(
    cli: Cli, smoke: SmokeRun, long_suite: Path, tmp_path: Path
) -> None:
    """The other columns, the records and the tables are made; a second run is all hits and says it again."""
    root = write_data(tmp_path / "hub")
    recipe = tmp_path / "long.yaml"
    text = shipped_text(SMOKE).replace(f"name: {SMOKE}", "name: long")
    text = text.replace("suite: testbed, ", f"suite: {long_suite}, ").replace(
        "data_root: testbed", f"data_root: {root}"
    )
    recipe.write_text(text)
    store = shutil.copytree(smoke.pristine, tmp_path / "store")
    options = ("--only", "DPO", "--only", "Student", "--store", store, "--quiet")
    for _ in range(2):
        outcome = cli("run", recipe, *options)
        assert outcome.code == 2
        assert outcome.err.count("Error: ") == 1
        assert (
            "all columns but these were evaluated: Long on Student and DPO, seed 0, since the model's length"
            in outcome.err
        )
        assert "Evaluate a model with a longer context" in outcome.err
        shown = " ".join(outcome.out.split())
        assert "Not measured: Long on Student, DPO, since the model's length" in shown
        assert "The Average of every row is without Long" in shown
    rows = {row["run"]: row for row in json.loads(cli("compare", recipe, "--store", store, "--json").out)["main"]}
    assert rows["DPO"]["Long"] is None
    assert rows["DPO"]["Average"] == rows["DPO"]["Choice"]
    evaluated = cli("eval", recipe, *options, "--json")
    assert evaluated.code == 2
    assert json.loads(evaluated.out)["Student"]["Long"] is None
    assert json.loads(evaluated.out)["Student"]["Choice"] >= 0
