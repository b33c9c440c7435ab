"""Processes that this command starts and that end with it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from ctpd.cli.signals import PARENT

PROGRAM = ("-m", "ctpd")
TERMINATE_SECONDS = 30.0  # how long a process may take to end after SIGTERM when its work is done or of no use
STOP_SECONDS = 300.0  # the same when a signal stops the command: a training writes its state first


def start_own(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start this program with other arguments and further environment variables; it ends when this process does."""
    return subprocess.Popen(
        [sys.executable, *PROGRAM, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **environment, PARENT: str(os.getpid())},
    )


@contextlib.contextmanager
def ending(started: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """End the processes with the block, those too that it has added to ``started``."""
    seconds = TERMINATE_SECONDS
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        seconds = STOP_SECONDS
        raise
    finally:
        try:
            _end(started, seconds)
        finally:  # a second Ctrl-C comes here at once
            for process in started:
                process.kill()
                process.wait()


def _end(started: Sequence["subprocess.Popen[bytes]"], seconds: float) -> None:
    for process in started:
        process.terminate()
    end = time.monotonic() + seconds
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
