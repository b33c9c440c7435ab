"""What progress writes: live bars on a terminal, a line per stage elsewhere, nothing with quiet."""

import io
import re
import subprocess
import sys

import pytest

from ctpd.pipeline.progress import Progress

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
