"""Several processes for one command: the ranks of one launch (`--num-processes`), or helpers on one store (`--jobs`)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ctpd.cli.options import visible_gpu
from ctpd.core.errors import CtpdError, UserError
from ctpd.core.printing import printable
from ctpd.core.processes import ProcessLost, processes
from ctpd.recipe import LaunchSpec

ERRORS = "CTPD_ERRORS"  # environment variable in the processes of our launch: the folder to which they write errors
HELPER = "CTPD_HELPER"  # environment variable in the helpers of `--jobs`
TERMINATE_SECONDS = 10.0  # how long a helper may take to end after SIGTERM


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

    Raises:
        LaunchError: one of them failed.
        UserError: there are fewer GPUs than processes.
        KeyboardInterrupt: this process got SIGINT or SIGTERM, and has ended them.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if (device == "auto" and 0 < gpus < count) or (device == "cuda" and gpus < count):
        raise UserError(
            f"{count} processes need a GPU each, and there are {gpus}", fix="Give `--num-processes` or a device"
        )
    with tempfile.TemporaryDirectory(prefix="ctpd-") as name, _environment({ERRORS: name, **_threads(count)}):
        folder = Path(name)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(str(folder / "logs"), redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        arguments = _without(argv, values=("--num-processes",), flags=("--rebuild",))
        try:
            with _silent("torch.distributed.elastic"):
                elastic_launch(config, sys.executable)("-m", "ctpd", *arguments)
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            raise _first_error(folder, error.failures, count=count) from None


def leave_error(error: BaseException, text: str, exit_code: int) -> bool:
    """Write an error to a file for the process that has launched this one; returns False if none has."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return False
    report = {"time": time.time(), "text": text, "exit_code": exit_code, "lost": isinstance(error, ProcessLost)}
    try:
        (Path(folder) / f"{processes().rank}.json").write_text(json.dumps(report), encoding="utf-8")
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
    with tempfile.TemporaryDirectory(prefix="ctpd-") as name:
        started: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for number in range(1, jobs):
                log = Path(name) / f"{number}.log"
                command = [sys.executable, "-m", "ctpd", *_helping(argv, device=device)]
                with log.open("wb") as stderr:
                    helper = subprocess.Popen(
                        command,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                        env={**os.environ, **environment, **_only_gpu(number % gpus if gpus else None)},
                    )
                started.append((helper, log))
            torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", threads)))
            yield
        finally:
            torch.set_num_threads(threads)
            _end(started, quiet=quiet)


def _end(started: Sequence[tuple[subprocess.Popen[bytes], Path]], *, quiet: bool) -> None:
    ended = [(log, code) for helper, log in started if (code := helper.poll())]
    for helper, _ in started:
        helper.terminate()
    for helper, _ in started:
        try:
            helper.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()
    for log, code in ended:
        if not quiet:
            click.echo(f"Note: a helper of `--jobs` ended early. {printable(_last_line(log, code))}", err=True)


def _helping(argv: Sequence[str], *, device: str) -> list[str]:
    """The command of a helper: `eval` for `run`, because the command itself writes records and tables."""
    command, *rest = argv
    rest = _without(rest, values=("--jobs", "--device", "--num-processes"), flags=("--rebuild", "--json", "--quiet"))
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


def _first_error(folder: Path, failures: Mapping[int, Any], *, count: int) -> LaunchError:
    """The error that ended a launch: the first that is not only the loss of another process, or that of a killed process."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    reports.sort(key=lambda error: (error["lost"], error["time"]))
    # SIGTERM comes from the launcher, which ends the other processes after a failure.
    died = [rank for rank, end in failures.items() if end.exitcode < 0 and end.exitcode != -signal.SIGTERM]
    if reports and not (reports[0]["lost"] and died):
        return LaunchError(reports[0]["text"], reports[0]["exit_code"])
    rank = min(died or failures)
    log = next(folder.glob(f"logs/*/*/{rank}/stderr.log"), None)
    return LaunchError(f"Process {rank} of {count} died. {_last_line(log, failures[rank].exitcode)}", 1)


def _last_line(log: Path | None, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log is not None else []
    if code < 0:
        lines.append(f"It was ended by {signal.Signals(-code).name}" + (" (out of memory?)." if code == -9 else "."))
    return lines[-1] if lines else f"Its exit code was {code}."


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Switch a library's loggers off: `LaunchError` says in one paragraph what they would say about a failed process."""
    import logging

    found = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith(logger)]
    loggers = [log for log in found if isinstance(log, logging.Logger)]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
