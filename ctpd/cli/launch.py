"""Several processes for one command: the ranks of one launch (`--num-processes`), or helpers on one store (`--jobs`)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from ctpd.cli.children import ending, start_own
from ctpd.cli.options import visible_gpu
from ctpd.core.errors import CtpdError, UserError
from ctpd.core.printing import printable
from ctpd.core.processes import RENDEZVOUS, ProcessLost, processes
from ctpd.core.temporary import temporary_folder
from ctpd.recipe import LaunchSpec

ERRORS = "CTPD_ERRORS"  # environment variable in the processes of our launch: the folder to which they write errors
HELPER = "CTPD_HELPER"  # environment variable in the helpers of `--jobs`
POLL_SECONDS = 0.05  # between two looks at the processes of a launch
OTHERS_SECONDS = 20.0  # how long the others of a launch have to say why they fail before they are ended


class LaunchError(CtpdError):
    """The first error of a launch's processes, with its message and exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def processes_to_start(spec: LaunchSpec, *, num_processes: int | None, jobs: int) -> int:
    """The number of processes that this command must start; 1: it does the work itself.

    Args:
        spec: the recipe's `launch` block; a launcher that has started us, and then ``num_processes``, override it.
        num_processes: the value of `--num-processes`.
        jobs: the value of `--jobs`.

    Raises:
        UserError: the flags contradict each other or the launcher.
    """
    started = processes().world_size if "WORLD_SIZE" in os.environ else None
    count = num_processes or started or spec.num_processes
    if started is not None and count != started:
        raise UserError(
            f"`--num-processes {count}` contradicts the launcher, which has started {started}",
            fix="Leave out one of them",
        )
    if jobs > 1 and count > 1:
        asking = "a launcher" if started else "`--num-processes`" if num_processes else "the recipe's `launch` block"
        raise UserError(
            f"`--jobs {jobs}` builds independent stages at a time, each in one process, and {asking} asks for {count} "
            "processes that build one stage together",
            fix="Leave `--jobs` out" + ("" if started else ", or give it with `--num-processes 1`"),
        )
    return 1 if started else count


def started_by_user() -> bool:
    """Whether the user has started this process: it is no helper and no rank of our launch, and it is rank 0."""
    return processes().is_main and ERRORS not in os.environ and HELPER not in os.environ


def run_launched(argv: Sequence[str], *, count: int, device: str) -> None:
    """Run the command in ``count`` processes and wait for them; the output of rank 0 appears here.

    They find each other through a file, and listen on the loopback device alone.

    Raises:
        LaunchError: one of them failed.
        UserError: there are fewer GPUs than processes.
    """
    import torch

    gpus = torch.cuda.device_count()
    if (device == "auto" and 0 < gpus < count) or (device == "cuda" and gpus < count):
        raise UserError(
            f"{count} processes need a GPU each, and there are {gpus}", fix="Give `--num-processes` or a device"
        )
    with temporary_folder("launch") as folder:
        started: list[subprocess.Popen[bytes]] = []
        with ending(started):
            for rank in range(count):
                started.append(_start_rank(argv, rank, count=count, folder=folder))
            failures = _failures(started, folder)
            if failures:
                raise _first_error(folder, failures, count=count)


def _start_rank(argv: Sequence[str], rank: int, *, count: int, folder: Path) -> "subprocess.Popen[bytes]":
    arguments = _without(argv, values=("--num-processes",), flags=("--rebuild",))
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    environment = {
        **{name: str(value) for name, value in places.items()},
        **_on_loopback(),
        **_threads(count),
        RENDEZVOUS: str(folder / "rendezvous"),
        ERRORS: str(folder),
    }
    if rank == 0:
        return start_own(arguments, environment)
    with _log(folder, rank).open("wb") as log:
        return start_own(arguments, environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _on_loopback() -> dict[str, str]:
    """The environment in which gloo and NCCL use the loopback device alone."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")] if os.name == "posix" else []
    return {variable: name for name in names for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


def _failures(ranks: Sequence["subprocess.Popen[bytes]"], folder: Path) -> dict[int, int]:
    """Wait until all have ended or one has failed; returns rank -> exit code of those that failed.

    A process that is ended by a signal after it has finished its work has not failed.
    """
    failures: dict[int, int] = {}
    end = float("inf")  # when a process has failed: others fail for the same reason, the loss of it, or its cause
    while time.monotonic() < end:
        codes = {rank: process.poll() for rank, process in enumerate(ranks)}
        failures = {
            rank: code for rank, code in codes.items() if code and (code > 0 or not _finished(folder, rank).exists())
        }
        if all(code is not None for code in codes.values()):
            break
        if failures:
            end = min(end, time.monotonic() + OTHERS_SECONDS)
        time.sleep(POLL_SECONDS)
    return failures


def _finished(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.finished"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


def leave_finished() -> None:
    """In a process of our launch that has done its work and printed its output: say so to the process that launched it."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return
    sys.stdout.flush()
    with contextlib.suppress(OSError):  # the folder is gone: the process that launched this one has ended
        _finished(Path(folder), processes().rank).touch()


def leave_error(error: BaseException, text: str, exit_code: int) -> bool:
    """Write an error to a file for the process that has launched this one; returns False if none has."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return False
    report = {"time": time.time(), "text": text, "exit_code": exit_code, "lost": isinstance(error, ProcessLost)}
    try:
        written = Path(folder) / f"{processes().rank}.part"
        written.write_text(json.dumps(report), encoding="utf-8")
        written.replace(written.with_suffix(".json"))  # never seen half written
    except OSError:  # the folder is gone: the process that launched this one has ended
        return False
    return True


@contextlib.contextmanager
def helpers(argv: Sequence[str], *, jobs: int, device: str, quiet: bool) -> Iterator[None]:
    """While the block runs, ``jobs - 1`` further processes run the same command on the same store.

    They are ended with the block. A helper that ends early is no error: its unfinished stage is built in this process.
    """
    import torch

    gpus = torch.cuda.device_count() if device == "auto" else 0
    threads = torch.get_num_threads()
    environment = {**_threads(jobs), HELPER: "1"}
    arguments = _helping(argv, device=device)
    started: list[subprocess.Popen[bytes]] = []
    with temporary_folder("jobs") as folder:
        try:
            with ending(started):
                for number in range(1, jobs):
                    own = {**environment, **_only_gpu(number % gpus if gpus else None)}
                    with _log(folder, number).open("wb") as log:
                        started.append(start_own(arguments, own, stdout=subprocess.DEVNULL, stderr=log))
                torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", threads)))
                yield
                early = [(number, code) for number, helper in enumerate(started, start=1) if (code := helper.poll())]
                for number, code in [] if quiet else early:
                    said = printable(_last_line(_log(folder, number), code))
                    click.echo(f"Note: a helper of `--jobs` ended early. {said}", err=True)
        finally:
            torch.set_num_threads(threads)


def _helping(argv: Sequence[str], *, device: str) -> list[str]:
    """The command of a helper: `eval` for `run`, because the command itself writes records and tables."""
    command, *rest = argv
    rest = _without(
        rest, values=("--jobs", "--device", "--num-processes", "--samples"), flags=("--rebuild", "--json", "--quiet")
    )
    own = ["--quiet", "--device", device, "--num-processes", "1"]
    return ["eval" if command == "run" else command, *own, *rest]


def _without(argv: Sequence[str], *, values: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without the options ``values``, which have a value, and ``flags``, which have none."""
    left: list[str] = []
    skip = False
    for word in argv:
        if skip or word in flags or any(word.startswith(f"{name}=") for name in values):
            skip = False
        elif word in values:
            skip = True
        else:
            left.append(word)
    return left


def _only_gpu(number: int | None) -> dict[str, str]:
    """The environment in which a process sees one GPU alone: the trainer's library takes the first that it sees."""
    visible = None if number is None else visible_gpu(number)
    return {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}


def _threads(count: int) -> dict[str, str]:
    """The number of threads of each of ``count`` processes, unless the environment sets it."""
    import torch

    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}


def _first_error(folder: Path, failures: Mapping[int, int], *, count: int) -> LaunchError:
    """The error that ended a launch: the first that is not only the loss of another process, or that of a killed process."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    reports.sort(key=lambda error: (error["lost"], error["time"]))
    silent = [rank for rank in failures if not (folder / f"{rank}.json").exists()]
    if reports and not (reports[0]["lost"] and silent):
        return LaunchError(reports[0]["text"], reports[0]["exit_code"])
    rank = min(silent or failures)
    return LaunchError(f"Process {rank} of {count} died. {_last_line(_log(folder, rank), failures[rank])}", 1)


def _last_line(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    if code < 0:
        lines.append(f"It was ended by {signal.Signals(-code).name}" + (" (out of memory?)." if code == -9 else "."))
    return lines[-1] if lines else f"Its exit code was {code}."
