"""Progress output while stages run: a line for each finished one, and for the running one a live bar, or a line a minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from ctpd.core.printing import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_LABEL_WIDTH = 52
_BAR_WIDTH = 20
_OTHER_COLUMNS = 70  # characters of bar, percentage, times, speed and loss, with the spaces between them
_REFRESHES_PER_SECOND = 4
LINE_SECONDS = 60.0
"""Without a terminal, a running stage prints a line this often."""


class Bar(Protocol):
    """The progress of one stage."""

    def update(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``; may be called for every batch."""
        ...

    def detail(self, text: str) -> None:
        """Show this beside it, such as the loss."""
        ...


class _NoBar:
    """Shows nothing, with `quiet`."""

    def update(self, done: int, total: int) -> None:
        """Do nothing."""

    def detail(self, text: str) -> None:
        """Do nothing."""


class _Lines:
    """A line a minute: what is done, how fast, what is left, and the loss of a training."""

    def __init__(self, title: str, write: Callable[[str], None]) -> None:
        self._title, self._write, self._detail = title, write, ""
        self._start = self._said = time.monotonic()
        self._before = -1  # what was done when the first update came: a resumed training does not begin at 0

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._before < 0:
            self._before, self._start = done, now
        if now - self._said < LINE_SECONDS:
            return
        self._said = now
        rate = _rate(done - self._before, now - self._start)
        left = "" if not rate else f", about {_clock((total - done) / rate)} left"
        speed = "" if not rate else f", {rate:.3g} a second{left}"
        detail = f", {self._detail}" if self._detail else ""
        self._write(f"{self._title}: {done:,} of {total:,} ({100 * done // max(1, total)} %){speed}{detail}")

    def detail(self, text: str) -> None:
        self._detail = text


class _LiveBar:
    def __init__(self, bars: "RichProgress", task: "TaskID") -> None:
        self._bars, self._task, self._detail = bars, task, ""
        self._start, self._before = time.monotonic(), -1

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._before < 0:
            self._before, self._start = done, now
        rate = _rate(done - self._before, now - self._start)
        self._bars.update(
            self._task, completed=done, total=total, speed=f"{rate:.3g}/s" if rate else "", detail=self._detail
        )

    def detail(self, text: str) -> None:
        self._detail = text


def _rate(done: int, seconds: float) -> float:
    """Units a second; 0 while nothing is known."""
    return done / seconds if done > 0 and seconds > 0 else 0.0


class Progress:
    """Shows the stages of a plan; silent with ``quiet``.

    Args:
        quiet: show nothing.
        stream: where to write; standard error if it is None. A terminal gets live bars, anything else plain lines.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = None if quiet else (stream or sys.stderr)
        self._bars: RichProgress | None = None  # while they are shown

    @contextmanager
    def stage(self, label: str, *, index: int, total: int) -> Iterator[Bar]:
        """The bar of stage ``index`` (from 1) of ``total``; when the block ends, a line says how long it took."""
        title = f"[{index:>{len(str(total))}}/{total}] {printable(label)}"
        start = time.monotonic()
        outcome = "stopped after"
        try:
            with self._bar(title) as bar:
                yield bar
            outcome = "done in"
        finally:
            self.note(f"{title:<{_LABEL_WIDTH}} {outcome} {_clock(time.monotonic() - start)}")

    def note(self, text: str) -> None:
        """Print one line, above a live bar."""
        if self._bars is not None:
            self._bars.console.out(printable(text), highlight=False)
        elif self._stream is not None:
            self._stream.write(printable(text) + "\n")
            self._stream.flush()

    @contextmanager
    def _bar(self, title: str) -> Iterator[Bar]:
        if self._stream is None:
            yield _NoBar()
            return
        if not self._stream.isatty():
            yield _Lines(title, self.note)
            return
        with _live_bars(self._stream) as bars:
            self._bars = bars
            try:
                yield _LiveBar(bars, bars.add_task(title, total=None, speed="", detail=""))
            finally:
                self._bars = None


def _live_bars(stream: TextIO) -> "RichProgress":
    """Label, bar, percentage and estimate on one line, which disappears when the stage ends."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = Console(file=stream)
    label = Column(no_wrap=True, overflow="ellipsis", width=max(10, min(_LABEL_WIDTH, console.width - _OTHER_COLUMNS)))
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=label),
        BarColumn(bar_width=_BAR_WIDTH),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=False),
        TextColumn("left"),
        TextColumn("{task.fields[speed]} {task.fields[detail]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        transient=True,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
