"""Several processes for one command: the same numbers, and nothing built twice."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Cli, SmokeRun
from tests.fixtures.commands import program, scores


def test_jobs_share_the_work_and_reach_the_scores_of_one_process_to_the_last_digit(
    smoke: SmokeRun, tmp_path: Path
) -> None:
    done = program("run", "testbed-smoke", "--store", tmp_path, "--device", "cpu", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    tables = [text.partition("\nWritten to")[0] for text in (done.stdout, smoke.outcome.out)]
    assert tables[0] == tables[1]
    assert "helper" not in done.stderr
    assert scores(tmp_path) == scores(smoke.pristine)
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/manifest.json")]
    who = Counter(manifest["provenance"]["command"].split()[1] for manifest in manifests)
    assert set(who) == {"run", "eval"}
    assert not list(tmp_path.glob("*/*.partial"))


def test_processes_of_one_launch_deal_out_evaluations_and_print_them_once(
    cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    model = next(smoke.store.glob("pretrain/*/model"))
    hub = next(smoke.store.glob("world/*/hub"))
    words = [
        "eval",
        "--model",
        model,
        "--suite",
        "testbed",
        "--data-root",
        hub,
        "--limit",
        2,
        "--device",
        "cpu",
        "--json",
    ]
    done = program(*words, "--store", tmp_path / "two", "--num-processes", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("4 stages built") == 1
    assert json.loads(done.stdout) == json.loads(cli(*words, "--store", tmp_path / "one", "--quiet").out)
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "two").glob("*/*/manifest.json")]
    assert [manifest["provenance"]["processes"] for manifest in manifests] == [2, 2, 2, 2]


def test_processes_of_one_launch_train_as_one_process_does(smoke: SmokeRun, tmp_path: Path) -> None:
    """All collective stages: pretraining, signals, trainings; losses of DPO, CTPD and all trainings before them."""
    words = ["train", "testbed-smoke", "--store", tmp_path, "--device", "cpu", "--only", "CTPD", "--only", "DPO"]
    done = program(*words, "--num-processes", 2)
    assert done.returncode == 0, done.stderr
    found = sorted(tmp_path.glob("*/*/training.json"))
    assert len(found) == 8
    for path in found:
        made, alone = (
            json.loads((store / path.relative_to(tmp_path)).read_text()) for store in (tmp_path, smoke.store)
        )
        assert made["shares_prompts"] == alone["shares_prompts"]
        for entry, expected in zip(made["history"], alone["history"], strict=True):
            assert entry.get("loss", 0.0) == pytest.approx(expected.get("loss", 0.0), abs=2e-3), path
    assert len(list(tmp_path.glob("signals/*/signal.safetensors"))) == 4
    assert not list(tmp_path.glob("*/*.partial"))


def test_jobs_of_processes_are_refused_in_one_paragraph(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("run", "testbed-smoke", "--store", tmp_path, "--jobs", 2, "--num-processes", 2)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: `--jobs 2` builds independent stages at a time")
    assert outcome.err.count("\n") == 1
    assert not any(tmp_path.iterdir())
