"""What progress writes: live bars on a terminal, a line per stage elsewhere, nothing with quiet."""

import io
import re
import subprocess
import sys

import pytest

from ctpd.pipeline.progress import Progress
from tests.fixtures.waiting import until

NAME = "train: [bold]A[/bold]\n\x1b[31mB"
SHOWN = "train: [bold]A[/bold]⟨U+000A⟩⟨U+001B⟩[31mB"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def two_stages(stream: io.StringIO, *, quiet: bool = False) -> str:
    progress = Progress(quiet=quiet, stream=stream)
    with progress.stage(NAME, index=1, total=12) as bar:
        for done in range(5):
            bar.update(done, 4)
    with pytest.raises(KeyboardInterrupt), progress.stage("second", index=12, total=12):
        raise KeyboardInterrupt
    progress.note("a note")
    return stream.getvalue()


def test_without_a_terminal_there_is_one_plain_line_per_stage_and_names_are_literal() -> None:
    lines = two_stages(io.StringIO()).splitlines()
    assert [re.sub(r"0:\d\d$", "0:00", line) for line in lines] == [
        f"[ 1/12] {SHOWN:<44} done in 0:00",
        f"{'[12/12] second':<52} stopped after 0:00",
        "a note",
    ]


def test_a_terminal_gets_bars_that_leave_the_same_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    text = two_stages(Terminal())
    assert "━" in text
    assert "100%" in text
    for line in (rf"{re.escape(f'[ 1/12] {SHOWN:<44}')} done in 0:\d\d\n", r"stopped after 0:\d\d\n", "a note\n"):
        assert re.search(line, text)


def test_quiet_writes_nothing() -> None:
    assert two_stages(Terminal(), quiet=True) == ""


def test_progress_loads_neither_torch_nor_rich() -> None:
    code = "import sys, ctpd.pipeline.progress\nassert not {'torch', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("ctpd.pipeline.progress.time", found)
    return found


def test_without_a_terminal_a_long_stage_prints_a_line_a_minute_with_speed_and_loss(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("train", index=1, total=9) as bar:
        for done in range(100, 401):  # a resumed training begins at step 100
            bar.detail(f"loss {1 / done:.2g}")
            bar.update(done, 700)
            clock.now += 0.5
    assert stream.getvalue().splitlines() == [
        "[1/9] train: 220 of 700 (31 %), 2 a second, about 4:00 left, loss 0.0045",
        "[1/9] train: 340 of 700 (48 %), 2 a second, about 3:00 left, loss 0.0029",
        f"{'[1/9] train':<52} done in 2:30",
    ]


def test_a_stage_that_stands_still_has_no_speed(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("train", index=1, total=1) as bar:
        bar.update(0, 10)
        clock.now = 61.0
        bar.update(0, 0)
    assert stream.getvalue().splitlines()[0] == "[1/1] train: 0 of 0 (0 %)"


def test_a_terminal_shows_speed_and_loss(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(stream=stream).stage("train", index=1, total=1) as bar:
        bar.update(0, 10)
        clock.now = 2.0
        bar.detail("loss 0.53")
        bar.update(5, 10)
        until(lambda: "2.5/s loss 0.53" in stream.getvalue(), "rich, which draws four times a second, does not show it")
