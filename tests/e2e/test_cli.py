"""The command line, end to end, on the store of one `ctpd run testbed-smoke`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctpd.app import evaluated_parts
from ctpd.core.store import Store
from ctpd.models import load_model
from ctpd.pipeline.graph import Graph
from ctpd.recipe import load_recipe, shipped_recipes
from harness.record import Record
from tests.conftest import Cli, SmokeRun

TABLES = ("main", "weights", "reference")


def manifests(store: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in store.glob("*/*/manifest.json")}


def trained_keys(cli: Cli, store: Path) -> dict[str, str]:
    rows = json.loads(cli("train", "testbed-smoke", "--store", store, "--quiet", "--json").out)
    return {row["run"]: row["key"] for row in rows}


def test_run_ends_well_and_prints_the_main_table(smoke: SmokeRun) -> None:
    assert smoke.outcome.code == 0, smoke.outcome.err
    assert smoke.outcome.out.startswith("Main results\n")
    for run in ("Teacher", "Student", "DPO", "TIS-DPO", "CTPD"):
        assert f"\n{run} " in smoke.outcome.out
    written = (smoke.store / "tables" / "testbed-smoke").iterdir()
    assert {path.stem for path in written if path.is_file()} == {*TABLES, "report"}  # figures are `compare`'s
    assert not list(smoke.pristine.glob("*/*.partial"))


def test_second_run_builds_nothing(cli: Cli, smoke: SmokeRun) -> None:
    before = manifests(smoke.store)
    second = cli("run", "testbed-smoke", "--store", smoke.store)
    assert second.code == 0
    assert second.err.startswith("0 stages built")
    assert second.out == smoke.outcome.out
    assert manifests(smoke.store) == before


def test_plan_of_a_finished_recipe_is_all_hits_and_of_an_empty_store_all_misses(
    cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    done, fresh = (
        json.loads(cli("run", "testbed-smoke", "--store", s, "--plan", "--json").out) for s in (smoke.store, tmp_path)
    )
    assert all(line["hit"] for line in done)
    assert not any(line["hit"] for line in fresh)
    assert [line["key"] for line in done] == [line["key"] for line in fresh]
    assert not any(tmp_path.iterdir())


def test_compare_writes_every_table_in_every_format(cli: Cli, smoke: SmokeRun) -> None:
    folder = smoke.store / "tables" / "testbed-smoke"
    shutil.rmtree(folder, ignore_errors=True)
    outcome = cli("compare", "testbed-smoke", "--store", smoke.store, "--format", "md", "--format", "tex")
    assert outcome.code == 0, outcome.err
    tables = {f"{t}.{e}" for t in TABLES for e in ("md", "csv", "tex", "html")}
    assert {path.name for path in folder.iterdir()} == {*tables, "report.html", "figures"}
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {f"difference--main.{suffix}" for suffix in ("svg", "pdf", "png")} <= figures
    assert (folder / "main.md").read_text().strip() in outcome.out
    assert r"\toprule" in (folder / "main.tex").read_text()


def test_compare_prints_every_table_and_keeps_tables_and_records_where_asked(
    cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    outcome = cli("compare", "testbed-smoke", "--store", smoke.store, "--to", tmp_path)
    for caption in ("Main results", "Weight ablation", "Reference ablation"):
        assert caption in outcome.out
    records = [Record.read(path) for path in (tmp_path / "testbed-smoke" / "records").glob("*.json")]
    recipe = load_recipe("testbed-smoke")
    assert {record.run for record in records} > set(recipe.runs) | set(recipe.untrained)
    assert len(records) == 10


def test_compare_as_json_has_a_row_per_run(cli: Cli, smoke: SmokeRun) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    tables = json.loads(cli("compare", "testbed-smoke", "--store", smoke.store, "--json").out, parse_constant=refuse)
    assert set(tables) == set(TABLES)
    assert len(tables["main"]) == 5


def test_only_narrows_the_plan_without_changing_keys(cli: Cli, smoke: SmokeRun) -> None:
    lines = json.loads(cli("run", "testbed-smoke", "--store", smoke.store, "--only", "DPO", "--plan", "--json").out)
    assert all(line["hit"] for line in lines)
    assert not any(line["stage"] == "weights" for line in lines)


def test_limit_evaluates_anew_but_trains_nothing(cli: Cli, smoke: SmokeRun) -> None:
    lines = json.loads(cli("run", "testbed-smoke", "--store", smoke.store, "--limit", 2, "--plan", "--json").out)
    assert {line["stage"] for line in lines if not line["hit"]} == {"evaluate", "record"}


def test_train_names_one_model_per_run_and_trains_shared_runs_once(cli: Cli, smoke: SmokeRun) -> None:
    keys = trained_keys(cli, smoke.store)
    recipe = load_recipe("testbed-smoke")
    assert set(recipe.runs) | set(recipe.untrained) <= set(keys)
    assert keys["CTPD"] == keys["weights: Origin"] == keys["reference: Teacher"]
    assert len({keys[name] for name in ("DPO", "TIS-DPO", "CTPD")}) == 3


def test_eval_prints_a_score_per_run_and_column(cli: Cli, smoke: SmokeRun) -> None:
    outcome = cli("eval", "testbed-smoke", "--store", smoke.store, "--quiet", "--json")
    assert outcome.code == 0, outcome.err
    scores = json.loads(outcome.out)
    assert len(scores["CTPD, seed 0"]) == 4


@pytest.fixture(scope="module")
def exported(cli: Cli, smoke: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    key, to = trained_keys(cli, smoke.store)["CTPD"], tmp_path_factory.mktemp("export") / "model"
    outcome = cli("export", key[:10], "--to", to, "--store", smoke.store)
    assert outcome.code == 0, outcome.err
    return key, to


def test_exported_model_loads_in_plain_transformers_with_the_same_logits(
    smoke: SmokeRun, exported: tuple[str, Path]
) -> None:
    key, folder = exported
    ids = AutoTokenizer.from_pretrained(folder)("Where is it?\n", return_tensors="pt")["input_ids"]
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours: Any = load_model(smoke.store / "train" / key / "model", precision="float32", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, rtol=0, atol=0)
    assert set(load_file(folder / "model.safetensors")) <= set(plain.state_dict())


def test_any_model_directory_can_be_evaluated(
    cli: Cli, smoke: SmokeRun, exported: tuple[str, Path], tmp_path: Path
) -> None:
    """An exported model scores what the run that trained it scored."""
    world = next(path.parent for path in smoke.store.glob("world/*/manifest.json"))
    outcome = cli(
        "eval",
        "--model",
        exported[1],
        "--suite",
        "testbed",
        "--data-root",
        world / "hub",
        "--limit",
        4,
        "--store",
        tmp_path,
        "--quiet",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    limited = cli("eval", "testbed-smoke", "--only", "CTPD", "--limit", 4, "--store", smoke.store, "--quiet", "--json")
    theirs = next(iter(json.loads(outcome.out).values()))
    ours = json.loads(limited.out)["CTPD, seed 0"]
    assert theirs == pytest.approx(ours, rel=1e-5)  # batches of another size


def test_store_du_lists_what_is_there(cli: Cli, smoke: SmokeRun) -> None:
    found = json.loads(cli("store", "du", "--store", smoke.store, "--json").out)
    assert {(item["stage"], item["key"]) for item in found} == {
        (artifact.stage, artifact.key) for artifact in Store(smoke.store).artifacts()
    }
    assert "MiB" in cli("store", "du", "--store", smoke.store).out


def test_store_rm_makes_exactly_the_removed_artifact_missing(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(smoke.pristine, store)
    key = trained_keys(cli, store)["DPO"]
    assert cli("store", "rm", key[:10], "--store", store).code == 0
    lines = json.loads(cli("train", "testbed-smoke", "--store", store, "--plan", "--json").out)
    assert [line["key"] for line in lines if not line["hit"]] == [key]
    # The records are there, so a run needs no model.
    assert cli("run", "testbed-smoke", "--store", store).err.startswith("0 stages built")


def test_store_gc_keeps_what_a_recipe_needs_and_removes_the_rest(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(smoke.pristine, store)
    parts = evaluated_parts("testbed-smoke", Store(store))  # other tests may have evaluated with a limit
    planned = {stage.key for part in parts for stage in Graph(part.records).stages}
    needed = planned & {artifact.key for artifact in Store(store).artifacts()}
    with Store(store).build("stray", "0" * 32, identity={}, provenance={}) as folder:
        (folder / "file").write_text("x")
    (store / "train" / f"{'a' * 32}.partial").mkdir()
    assert "Would remove" in cli("store", "gc", "testbed-smoke", "--dry-run", "--store", store).out
    assert list((store / "stray").glob("*/manifest.json"))
    assert cli("store", "gc", "testbed-smoke", "--store", store).code == 0
    assert {artifact.key for artifact in Store(store).artifacts()} == needed
    assert not (store / "train" / f"{'a' * 32}.partial").exists()


def test_recipes_lists_every_shipped_recipe(cli: Cli) -> None:
    assert set(json.loads(cli("recipes", "--json").out)) == set(shipped_recipes())
    assert "testbed-smoke" in cli("recipes").out


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_can_be_planned_or_says_which_model_is_missing(
    cli: Cli, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("run", recipe, "--plan", "--store", tmp_path / "store")
    if outcome.code:
        assert outcome.code == 2
        assert ".model' is '" in outcome.err or "model directory" in outcome.err or "data file" in outcome.err
    else:
        assert "Nothing was run." in outcome.out
    assert not (tmp_path / "store").exists()


def test_doctor_finds_everything(cli: Cli) -> None:
    assert "Everything that ctpd needs is here." in cli("doctor").out
    assert "torch" in json.loads(cli("doctor", "--json").out)["versions"]


def test_init_writes_a_recipe_that_plans_and_refuses_to_overwrite(
    cli: Cli, exported: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    args = ("init", "--teacher", exported[1], "--student", exported[1], "--data", "pairs.jsonl", "--to", "mine.yaml")
    assert cli(*args).code == 0
    plan = cli("run", "mine.yaml", "--plan")
    assert plan.code == 0, plan.err
    assert "importance weights: CTPD, seed 0" in plan.out
    assert cli(*args).code == 2


def test_python_api_gives_the_tables_of_the_command(smoke: SmokeRun) -> None:
    import ctpd

    assert [table.spec.name for table in ctpd.run("testbed-smoke", store=smoke.store)] == list(TABLES)


def test_module_runs_as_a_script() -> None:
    done = subprocess.run([sys.executable, "-m", "ctpd", "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "train", "eval", "compare", "recipes", "init", "help", "export", "store", "doctor"):
        assert f"\n  {command} " in done.stdout
