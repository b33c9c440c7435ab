"""Progress output while stages run: on a terminal a live bar for the running stage, and a line for each finished one."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from ctpd.core.printing import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_LABEL_WIDTH = 52
_BAR_WIDTH = 20
_OTHER_COLUMNS = 46  # characters of bar, percentage and times, with the spaces between them
_REFRESHES_PER_SECOND = 4


class Bar(Protocol):
    """The progress of one stage."""

    def update(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``; may be called for every batch."""
        ...


class _NoBar:
    """Shows nothing: with `quiet`, and where the output is not a terminal."""

    def update(self, done: int, total: int) -> None:
        """Do nothing."""


class _LiveBar:
    def __init__(self, bars: "RichProgress", task: "TaskID") -> None:
        self._bars, self._task = bars, task

    def update(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)


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
        if self._stream is None or not self._stream.isatty():
            yield _NoBar()
            return
        with _live_bars(self._stream) as bars:
            self._bars = bars
            try:
                yield _LiveBar(bars, bars.add_task(title, total=None))
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
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        transient=True,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
