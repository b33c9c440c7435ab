"""Shared fixtures. No test touches the network; the data shared between projects is optional."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read once, when the libraries are imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "CTPD_TEST_GPUS" not in os.environ:  # what tests expect is what CPUs give; `make gpu` runs those that need GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("COLUMNS", "LINES"):  # which pytest-xdist sets: output is tested as without a terminal
    os.environ.pop(name, None)

import contextlib
import io
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

# No test fails because the machine is busy.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

# What a test starts inherits ignored signals: SIGINT of a job in the background of a shell, SIGHUP of one under nohup.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


class Outcome(NamedTuple):
    """The result of a command: exit code and both streams."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


class SmokeRun(NamedTuple):
    """The store that one `ctpd run testbed-smoke` filled, and the outcome of that run.

    Tests may add to ``store``, in whatever order they run; ``pristine`` is a copy that none changes, for those that count.
    """

    store: Path
    pristine: Path
    outcome: Outcome


def run_cli(*args: object) -> Outcome:
    """The command line in this process, so that a warning anywhere in a run is an error here."""
    from ctpd.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    """The command line as a function of its arguments."""
    return run_cli


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """One complete run of the smallest recipe, shared by all tests that only read it or add to it."""
    folder = tmp_path_factory.mktemp("smoke")
    store, pristine = folder / "store", folder / "pristine"
    outcome = run_cli("run", "testbed-smoke", "--store", store, "--device", "cpu")
    shutil.copytree(store, pristine)
    return SmokeRun(store, pristine, outcome)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the project, with golden numbers and real data; the test skips where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(reason="the folder `shared` beside the project is absent")
    return folder
