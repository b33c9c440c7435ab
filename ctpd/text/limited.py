"""Somebody else's program, such as a chat template, with a limit on processor time and memory.

The rows of a batch are computed in a forked process. The system's limits hold there for everything, also for one long
operation in C that Python could not interrupt; processor time, unlike the clock's, does not pass while a machine is busy.
"""

import contextlib
import gc
import json
import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ctpd.core.errors import UserError

SECONDS = 5  # of processor time, for one row
BYTES = 2 * 2**30  # for all rows of a batch, beside what the process has already

_TEXTS, _REFUSED, _MEMORY, _FAILED = b"TRMF"
_HAS_LIMITS = hasattr(os, "fork")  # Unix


class LimitReached(Exception):
    """A row needs more than the limit.

    Attributes:
        row: its index.
        what: what it does, for a sentence.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row} {what}")
        self.row, self.what = row, what


def limited(count: int, work: Callable[[int], Sequence[str]]) -> list[list[str]]:
    """The texts that ``work`` gives for each of ``count`` rows, computed in a forked process.

    ``work`` may change nothing of this process. Elsewhere than on Unix it runs here and without limits.

    Raises:
        LimitReached: a row takes more than `SECONDS`, or the rows more than `BYTES`.
        UserError: as ``work``.
    """
    if not _HAS_LIMITS or count == 0:
        return [list(work(row)) for row in range(count)]
    row_at_work = mmap.mmap(-1, 8)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads may hold locks of theirs
        child = os.fork()
    if child == 0:
        _run(count, work, row_at_work, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or not answer:
        raise LimitReached(_row(row_at_work), _death(code))
    return _texts(answer, row_at_work)


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Raise `LimitReached` in the block after `SECONDS` of processor time: for a row that cannot be computed elsewhere.

    One long operation in C is not interrupted. In another thread than the main one nothing happens.
    """
    if not _HAS_LIMITS or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> NoReturn:
        raise LimitReached(0, _death(-signal.SIGXCPU))

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _run(count: int, work: Callable[[int], Sequence[str]], row_at_work: mmap.mmap, writing: int) -> NoReturn:
    """The forked process: write an answer and end, without the clean-up of the process that it is a copy of."""
    try:
        gc.disable()  # objects of the other process are not to be freed here
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        answer = _answer(count, work, row_at_work)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    finally:
        os._exit(1)


def _answer(count: int, work: Callable[[int], Sequence[str]], row_at_work: mmap.mmap) -> bytes:
    rows: list[Sequence[str]] = []
    try:
        _limit_memory()
        for row in range(count):
            row_at_work[:8] = struct.pack("<q", row)
            _limit_seconds()
            rows.append(work(row))
        texts = [text.encode("utf-8", "surrogatepass") for texts in rows for text in texts]
        head = json.dumps([[len(texts) for texts in rows], [len(text) for text in texts]]).encode()
        return bytes([_TEXTS]) + b"".join([head, b"\n", *texts])
    except MemoryError:
        rows.clear()
        return bytes([_MEMORY])
    except UserError as error:
        return bytes([_REFUSED]) + json.dumps([error.what, error.where, error.fix]).encode()
    except Exception as error:
        return bytes([_FAILED]) + repr(error).encode("utf-8", "replace")


def _texts(answer: bytes, row_at_work: mmap.mmap) -> list[list[str]]:
    kind, rest = answer[0], answer[1:]
    if kind == _MEMORY:
        raise LimitReached(_row(row_at_work), f"needs more than {BYTES // 2**30} GiB of memory")
    if kind == _REFUSED:
        what, where, fix = json.loads(rest)
        raise UserError(what, where=where, fix=fix)
    if kind == _FAILED:
        raise RuntimeError(rest.decode("utf-8", "replace"))
    head, _, joined = rest.partition(b"\n")
    counts, lengths = json.loads(head)
    found, begin = [], 0
    for length in lengths:
        found.append(joined[begin : begin + length].decode("utf-8", "surrogatepass"))
        begin += length
    texts = iter(found)
    return [[next(texts) for _ in range(count)] for count in counts]


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * mmap.PAGESIZE + BYTES)


def _limit_seconds() -> None:
    import resource

    _lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + SECONDS))


def _lower(limit: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _row(row_at_work: mmap.mmap) -> int:
    return int(struct.unpack("<q", row_at_work[:8])[0])


def _death(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"takes more than {SECONDS} seconds of processor time"
    return "ends the process" if code >= 0 else f"ends the process with {signal.Signals(-code).name}"
