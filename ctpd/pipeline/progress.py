"""What a person sees while stages run: one bar a stage, with its place in the plan and an estimate."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Bar:
    """The progress of one stage. `update` may be called as often as one likes."""

    def __init__(self, label: str, stream: TextIO | None) -> None:
        self._label, self._stream = label, stream
        self._start = self._shown = time.monotonic()
        self._animated = stream is not None and stream.isatty()

    def update(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        now = time.monotonic()
        if self._stream is None or not self._animated or (now - self._shown < 0.2 and done < total):
            return
        self._shown = now
        fraction = done / total if total else 1.0
        remaining = (now - self._start) * (1 - fraction) / fraction if fraction > 0 else 0.0
        filled = round(fraction * 20)
        text = f"{self._label:<52} {'━' * filled}{'─' * (20 - filled)} {fraction:>4.0%}  {_clock(remaining)} left"
        self._stream.write(f"\r\x1b[2K{text}")
        self._stream.flush()

    def close(self, outcome: str) -> None:
        """Replace the bar by one line that says how long the stage took."""
        if self._stream is None:
            return
        start = "\r\x1b[2K" if self._animated else ""
        self._stream.write(f"{start}{self._label:<52} {outcome} {_clock(time.monotonic() - self._start)}\n")
        self._stream.flush()


class Progress:
    """Prints the stages of a plan; silent with ``quiet``."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = None if quiet else (stream or sys.stderr)

    @contextmanager
    def stage(self, label: str, *, place: int, total: int) -> Iterator[Bar]:
        """The bar of stage ``place`` of ``total``."""
        width = len(str(total))
        bar = Bar(f"[{place:>{width}}/{total}] {label}", self._stream)
        bar.update(0, 1)
        try:
            yield bar
        except BaseException:
            bar.close("stopped after")
            raise
        bar.close("done in")

    def note(self, text: str) -> None:
        """One line beside the bars."""
        if self._stream is not None:
            self._stream.write(text + "\n")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
