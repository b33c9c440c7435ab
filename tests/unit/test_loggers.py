"""`--report-to`: loggers write outside of the build folder, under the names of recipe and training."""

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from ctpd.core.errors import UserError
from ctpd.train.loggers import LogTarget, check_loggers, logging_to
from harness.record import Execution
from tests.conftest import Cli

VARIABLES = ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "WANDB_PROJECT", "TRACKIO_DIR", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def target(folder: Path, *, run: str = "DPO, seed 0", project: str = "mine") -> LogTarget:
    return LogTarget(folder=folder, project=project, run=run, key="0123456789abcdef")


class Fake(TrainerCallback):
    """A logger that notes where it would write."""

    seen: list[dict[str, Any]]

    def __init__(self) -> None:
        self.folder = os.environ.get("TENSORBOARD_LOGGING_DIR")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({"folder": self.folder, "run": args.run_name, "project": args.project, "out": args.output_dir})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    Fake.seen = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Fake)
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: ["fake"]
    )
    return Fake.seen


def test_a_logger_gets_a_folder_that_stays_and_the_names_of_recipe_and_training(
    fake: list[dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    store, logs = tmp_path / "store", tmp_path / "logs"
    args = ("train", "testbed-smoke", "--store", store, "--device", "cpu", "--only", "DPO", "--report-to", "fake")
    outcome = cli(*args, "--log-dir", logs)
    assert outcome.code == 0, outcome.err
    assert {one["project"] for one in fake} == {"testbed-smoke"}
    assert [one["run"] for one in fake if one["run"].startswith(("DPO", "student: SFT"))] == [
        "student: SFT",
        "DPO, seed 0",
    ]
    assert len({one["folder"] for one in fake}) == len(fake)
    for one in fake:
        assert Path(one["folder"]).is_relative_to(logs / "tensorboard" / "testbed-smoke")
        assert not Path(one["out"]).exists()
    assert not set(VARIABLES) & set(os.environ)


def test_without_log_dir_the_store_holds_the_logs(fake: list[dict[str, Any]], tmp_path: Path) -> None:
    from ctpd.app import plan
    from ctpd.core.store import Store
    from ctpd.pipeline.build import build_missing
    from ctpd.pipeline.graph import Graph
    from ctpd.pipeline.progress import Progress
    from ctpd.pipeline.runtime import Runtime, provenance

    stages = [stage for stage in plan("testbed-smoke").stages if stage.kind == "pretrain"]
    runtime = Runtime(device="cpu", report_to=("fake",), project="testbed-smoke")
    build_missing(Graph(stages[:1]), Store(tmp_path), runtime=runtime, progress=Progress(quiet=True))
    assert [Path(one["folder"]).parents[3] for one in fake] == [tmp_path / "logs"]
    assert provenance(runtime)["runtime"].keys() == Execution.model_fields.keys()
    assert len(Store(tmp_path).artifacts()) == 3  # the logs are no artifact


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tensorbord", "`--report-to tensorbord` is not a logger. Did you mean 'tensorboard'?"),
        ("all", "`--report-to all` is not a logger."),
        ("codecarbon", "`--report-to codecarbon` is not a logger."),
        ("wandb", "`--report-to wandb` needs a package that is not installed"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_what_cannot_log_is_refused_before_the_first_stage(name: str, text: str, cli: Cli, tmp_path: Path) -> None:
    outcome = cli("train", "testbed-smoke", "--store", tmp_path / "store", "--report-to", name)
    assert outcome.code == 2
    assert text in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_logger_that_cannot_be_imported_is_refused(
    fake: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ModuleNotFoundError("No module named 'opentelemetry'")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", broken)
    with pytest.raises(UserError, match="`--report-to fake` does not work here: No module named 'opentelemetry'"):
        check_loggers(["fake"], None)


def test_a_logger_that_reads_its_folder_when_it_is_imported_finds_it(
    fake: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As trackio does; the check before the first stage imports it."""
    seen: list[str | None] = []
    monkeypatch.setitem(
        integration_utils.INTEGRATION_TO_CALLBACK, "fake", lambda: seen.append(os.environ.get("TRACKIO_DIR"))
    )
    check_loggers(["fake"], None, default=tmp_path / "logs")
    check_loggers(["fake"], tmp_path / "named", default=tmp_path / "logs")
    assert seen == [str(tmp_path / "logs" / "trackio"), str(tmp_path / "named" / "trackio")]
    assert "TRACKIO_DIR" not in os.environ


def test_a_folder_without_a_logger_is_refused(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("run", "testbed-smoke", "--log-dir", tmp_path)
    assert outcome.code == 2
    assert "--log-dir does nothing here: --report-to names no logger" in outcome.err


def test_without_loggers_nothing_is_checked_and_no_folder_made(tmp_path: Path) -> None:
    check_loggers((), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    with logging_to(target(tmp_path)):
        assert os.environ["WANDB_PROJECT"] == "theirs"
        assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")
    assert os.environ["WANDB_PROJECT"] == "theirs"
    assert "TRACKIO_DIR" not in os.environ


def test_names_with_signs_of_a_path_stay_in_the_folder(tmp_path: Path) -> None:
    found = target(tmp_path, project="../up", run="a/b: ../..\\c").variables["TENSORBOARD_LOGGING_DIR"]
    assert Path(found) == tmp_path / "tensorboard" / "_up" / "a_b_ .._.._c" / "0123456789ab"
    assert target(tmp_path, project="...").arguments["project"] == "_"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_of_wandb_ends_with_its_training(fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its callback leaves the run open, and would write the next training into it."""
    ended: list[str] = []
    wandb = SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    with contextlib.suppress(UserError), logging_to(target(tmp_path)):
        wandb.run = SimpleNamespace(finish=lambda: ended.append("ours"))
        if fails:
            raise UserError("not finite")
    assert ended == ["ours"]
    with logging_to(target(tmp_path)):  # opened by the caller of the library
        pass
    assert ended == ["ours"]


def test_tensorboard_writes_one_folder_a_training(cli: Cli, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    store = tmp_path / "store"
    args = ("train", "testbed-smoke", "--store", store, "--device", "cpu", "--only", "DPO")
    assert cli(*args, "--report-to", "tensorboard").code == 0
    folders = sorted(path.parent for path in (store / "logs").rglob("events.*"))
    names = {folder.parent.name for folder in folders}
    assert {"student_ SFT", "DPO, seed 0"} <= names
    for folder in folders:
        events = reader.EventAccumulator(str(folder))
        events.Reload()
        assert "train/loss" in events.Tags()["scalars"]
