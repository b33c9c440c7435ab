"""How a process ends that is told to: by a signal, or because the process that started it has ended."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

PARENT = "CTPD_PARENT"  # environment variable in the processes that we start: the number of the process to end with
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Stopped(SystemExit):
    """A signal has asked this process to end; raised wherever it runs, so that the usual clean-up is done."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def _signals() -> list[signal.Signals]:
    return [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` on the first SIGTERM or SIGHUP in the block; the clean-up is not interrupted by a second one.

    A signal that is ignored stays so: `nohup` ignores SIGHUP. In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _signals()}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def stop(number: int, _frame: object) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Where the environment names the process that started this one: get SIGTERM when that ends, in whatever way.

    Only Linux can do this; elsewhere nothing changes.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # no libc of that kind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)
