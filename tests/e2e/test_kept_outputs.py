"""What a command leaves is not lost by the next one: tables with --only, of one name, and evaluations with --limit."""

import json
import shutil
from pathlib import Path

import pytest

from ctpd.core.store import Store
from ctpd.recipe import shipped_recipes
from harness.record import Record
from tests.conftest import Cli, SmokeRun


@pytest.fixture
def store(smoke: SmokeRun, tmp_path: Path) -> Path:
    """A copy of the smoke run's store, with its tables as `compare` writes them."""
    shutil.copytree(smoke.pristine, tmp_path / "a store", ignore=shutil.ignore_patterns("tables"))
    return tmp_path / "a store"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".md", ".csv", ".tex"}}


def test_only_and_seed_choose_what_is_built_and_not_what_the_tables_show(cli: Cli, store: Path) -> None:
    """Issue 12: `run --only` and `compare --only` wrote the whole tables anew, with `missing` for rows that are there."""
    assert cli("compare", "testbed-smoke", "--store", store).code == 0
    folder = store / "tables" / "testbed-smoke"
    before = files(folder)
    run = cli("run", "testbed-smoke", "--only", "DPO", "--store", store)
    assert run.code == 0
    assert "\nCTPD " in run.out
    assert "missing" not in run.out
    assert files(folder) == before
    one = cli("compare", "testbed-smoke", "--only", "DPO", "--only", "CTPD", "--store", store)
    assert one.code == 0, one.err
    assert "\nDPO " in one.out
    assert "missing" not in one.out
    assert "Teacher" not in one.out
    assert "nothing was written" in one.out
    assert files(folder) == before
    rows = json.loads(cli("compare", "testbed-smoke", "--only", "DPO", "--store", store, "--json").out)["main"]
    assert [row["run"] for row in rows] == ["DPO"]
    assert (
        "--to does nothing here"
        in cli("compare", "testbed-smoke", "--only", "DPO", "--to", store, "--store", store).err
    )


def test_rows_that_are_missing_are_said_with_one_command_for_those_not_chosen(cli: Cli, store: Path) -> None:
    for path in store.glob("record/*/record.json"):
        if Record.read(path).run in ("CTPD", "TIS-DPO"):
            shutil.rmtree(path.parent)
    run = cli("run", "testbed-smoke", "--only", "DPO", "--store", store)
    assert run.out.count(" missing") > 1
    command = f"ctpd run testbed-smoke --store '{store}'"
    assert f"Missing: 2 further runs of the recipe. To build all: {command}\n" in run.err


def test_two_recipes_of_one_name_have_tables_of_their_own(cli: Cli, store: Path, tmp_path: Path) -> None:
    first = cli("compare", "testbed-smoke", "--store", store)
    before = files(store / "tables" / "testbed-smoke")
    text = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")
    for number in (1, 2):
        (tmp_path / f"mine-{number}.yaml").write_text(text.replace("caption: Main results", f"caption: Mine {number}"))
    for number in (1, 2, 1):
        outcome = cli("compare", tmp_path / f"mine-{number}.yaml", "--store", store)
        assert outcome.code == 0, outcome.err
        folder = store / "tables" / f"testbed-smoke-{number + 1}"
        assert "holds the tables of another recipe named 'testbed-smoke', shipped: testbed-smoke" in outcome.err
        assert f"Report: {folder / 'report.html'}" in outcome.out
        assert f"Mine {number}" in (folder / "main.md").read_text()
    assert files(store / "tables" / "testbed-smoke") == before
    assert cli("compare", "testbed-smoke", "--store", store).out == first.out
    (tmp_path / "mine-1.yaml").rename(tmp_path / "moved.yaml")
    assert "testbed-smoke-2" in cli("compare", tmp_path / "moved.yaml", "--store", store).out


def test_evaluations_with_a_limit_are_kept_found_and_have_tables_of_their_own(cli: Cli, store: Path) -> None:
    assert cli("compare", "testbed-smoke", "--store", store).code == 0
    before = files(store / "tables" / "testbed-smoke")
    limited = cli("run", "testbed-smoke", "--limit", 2, "--store", store)
    assert limited.code == 0, limited.err
    assert files(store / "tables" / "testbed-smoke") == before
    assert (store / "tables" / "testbed-smoke.limit-2" / "main.md").is_file()

    there = {artifact.key for artifact in Store(store).artifacts()}
    with Store(store).build("train", "0" * 32, identity={}, provenance={"label": "an old run"}):
        pass
    listed = cli("store", "gc", "testbed-smoke", "--dry-run", "--store", store).out
    assert f"train/{'0' * 32}" in listed
    assert "an old run" in listed
    assert "Would remove 1 artifact and " in listed
    assert cli("store", "gc", "testbed-smoke", "--store", store).code == 0
    assert {artifact.key for artifact in Store(store).artifacts()} == there

    for path in store.glob("record/*/record.json"):
        if not Record.read(path).partial:
            shutil.rmtree(path.parent)
    failed = cli("compare", "testbed-smoke", "--store", store)
    assert failed.code == 2
    assert "made with `--limit 2` alone" in failed.err
    assert f"ctpd compare testbed-smoke --limit 2 --store '{store}'" in failed.err


def test_store_du_says_what_each_artifact_is(cli: Cli, store: Path) -> None:
    found = json.loads(cli("store", "du", "--store", store, "--json").out)
    labels = {item["label"] for item in found if item["stage"] == "train"}
    assert {"DPO, seed 0", "student: SFT", "teacher: contrastive positive"} <= labels
    assert "CTPD, seed 0" in cli("store", "du", "--store", store).out
    manifest = next(store.glob("train/*/manifest.json"))
    content = json.loads(manifest.read_text())
    del content["provenance"]["label"]
    manifest.write_text(json.dumps(content))
    assert all(item["label"] for item in json.loads(cli("store", "du", "--store", store, "--json").out))
