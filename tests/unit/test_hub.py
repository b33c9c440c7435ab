"""An unreachable hub is said at once, and costs no minute of retries."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ctpd.app import Experiment
from ctpd.cli import hub
from ctpd.recipe import Shared
from harness.suites import load_suite


@pytest.fixture
def closed() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers 501 to everything."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_any_answer_is_an_answer(server: str, closed: str) -> None:
    assert hub.unreachable(server) is None
    assert "refused" in str(hub.unreachable(closed))
    assert hub.unreachable("no address") is not None
    assert "not one of the web" in str(hub.unreachable("file:///"))


def test_a_command_goes_offline_before_the_libraries_are_imported(closed: str) -> None:
    code = (
        "import os; from ctpd.app import Experiment; Experiment('testbed-smoke').records; from ctpd.cli.hub import ask_hub; "
        "assert not ask_hub(); assert os.environ['HF_HUB_OFFLINE'] == os.environ['HF_DATASETS_OFFLINE'] == '1'"
    )
    environment = {name: value for name, value in os.environ.items() if name not in hub.OFFLINE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HF_ENDPOINT": closed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(
        f"Note: the hub, {closed}, cannot be reached (Connection refused): only its cache is used"
    )


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "unreachable", lambda url: pytest.fail("the hub was asked"))
    assert not hub.ask_hub()
    assert capsys.readouterr().err == ""


def test_only_what_is_of_the_hub_needs_it() -> None:
    experiment = Experiment("testbed-smoke")
    shared, suite = experiment.recipe.shared, experiment.suite
    assert not hub.needs_hub(shared, suite)
    evaluation = shared.evaluation.model_copy(update={"data_root": None})
    elsewhere: Shared = shared.model_copy(update={"evaluation": evaluation})
    assert hub.needs_hub(elsewhere, load_suite("card"))
    teacher = shared.teacher.model_copy(update={"revision": "0" * 40})
    assert hub.needs_hub(shared.model_copy(update={"teacher": teacher}), suite)
