"""SIGINT, SIGTERM and SIGHUP during a training: a resume state is written first, then the signal does what it always does."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ctpd.core.processes import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 1.0
"""A launcher passes Ctrl-C on to processes that the terminal has sent it to already: within this time it is one."""

_TEXT = "Stopping after a resume state is written. Press Ctrl-C again to stop at once."


class StopRequest:
    """The signal that asks this process to end, if one has come while `listening`.

    Args:
        note: told once that a signal has been noticed.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._note, self._time = note, 0.0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the first signal until `deliver`, or until the block ends without an error; SIGINT after it ends at once.

        Signals that are ignored stay ignored. In another thread than the main one nothing changes.
        """
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._restore()
        if self.received is not None:
            self.deliver(self.received)

    def deliver(self, number: signal.Signals) -> None:
        """Let the signal do what it did before `listening`: end the process, or raise KeyboardInterrupt."""
        self._restore()
        self.received = None
        signal.raise_signal(number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signal.Signals(number), time.monotonic()
            # In a thread: this one may be in the middle of writing to the same stream.
            threading.Thread(target=self._note, args=(_TEXT,), daemon=True).start()
        elif number == signal.SIGINT and not self._is_passed_on():
            self.deliver(signal.SIGINT)

    def _is_passed_on(self) -> bool:
        return processes().world_size > 1 and time.monotonic() - self._time < SAME_SECONDS

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
