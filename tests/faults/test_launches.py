"""Launches of several processes: what listens, how they end, and what is left when one is told to or killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.launched_command import COMMAND
from tests.fixtures.tried import ROUNDS, Tried
from tests.fixtures.waiting import HANGS, until

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = (
    "0100007F",
    "00000000000000000000000001000000",
    "0000000000000000FFFF00000100007F",
)  # as /proc/net writes it
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
Start = Callable[..., "subprocess.Popen[str]"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `graph` on a store; whatever is left of it is killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: object, store: Path = tmp_path / "store", **options: Any) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, *COMMAND, "graph", str(store), *map(str, words)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, **{**streams, **options}
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def pids(process: "subprocess.Popen[str]", store: Path, count: int = 2) -> list[int]:
    """The processes of a launch, when all of them have begun their work."""
    files = [store / f"{rank}.pid" for rank in range(count)]
    until(lambda: all(file.exists() for file in files) or process.poll() is not None, "the processes do not begin")
    assert process.poll() is None, process.communicate()
    return [int(file.read_text()) for file in files]


def listening(processes: list[int]) -> set[str]:
    """The addresses on which processes listen, as /proc/net writes them."""
    inodes = set()
    for pid in processes:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(file)
            if target.startswith("socket:["):
                inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes}


@linux
def test_a_launch_on_one_machine_listens_on_loopback_alone(start: Start, tmp_path: Path) -> None:
    process = start("--num-processes", 2, "--mode", "slow")
    ranks = pids(process, tmp_path / "store")
    assert listening([process.pid, *ranks]) <= set(LOOPBACK)


def test_a_process_that_aborts_after_its_work_has_not_failed(start: Start, tmp_path: Path) -> None:
    done = start("--num-processes", 2, "--mode", "aborts at exit")
    out, err = done.communicate(timeout=HANGS)
    assert done.returncode == 0, err
    assert out == "done\n"
    assert not (tmp_path / "store" / "tmp").exists()


def test_a_killed_process_ends_the_launch_and_is_named(start: Start, tmp_path: Path) -> None:
    done = start("--num-processes", 2, "--mode", "killed")
    out, err = done.communicate(timeout=HANGS)
    assert (done.returncode, out) == (1, "")
    assert err.endswith("Error: Process 1 of 2 died. It was ended by SIGKILL (out of memory?).\n")
    assert not (tmp_path / "store" / "tmp").exists()


@linux
def test_starved_threads_of_a_group_do_not_abort_a_launch(start: Start, tmp_path: Path, tried: Tried) -> None:
    """All on one core with a process that never sleeps: gloo's threads have no turn before the interpreter's end."""
    core = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            os.sched_setaffinity(busy.pid, {core})
            for number in range(ROUNDS):
                done = start("--num-processes", 2, "--mode", "starved", store=tmp_path / str(number))
                os.sched_setaffinity(done.pid, {core})
                out, err = done.communicate(timeout=HANGS)
                assert (done.returncode, out) == (0, "done\n"), err
                assert "Warning" not in err
                tried("launches whose threads are starved at the end", 1)
        finally:
            busy.kill()


SIGNALS = [(("--num-processes", 2), signal.SIGTERM), (("--jobs", 2), signal.SIGHUP)]
if ROUNDS > 1:
    SIGNALS += [(("--num-processes", 2), signal.SIGINT), (("--num-processes", 2), signal.SIGHUP), ((), signal.SIGHUP)]


@pytest.mark.tries("signals")
@pytest.mark.parametrize(("how", "number"), SIGNALS, ids=str)
def test_a_signal_ends_everything_and_leaves_nothing(
    how: tuple[object, ...], number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start(*how, "--mode", "slow")
    ranks = pids(process, store, 2 if "--num-processes" in how else 1)
    if "--jobs" in how:
        until(lambda: children_of(process.pid), "no helper")
    others = {*children_of(process.pid), *ranks} - {process.pid}
    process.send_signal(number)
    out, err = process.communicate(timeout=HANGS)
    assert (process.returncode, out) == (128 + number, "")
    assert "What is finished is kept; the same command continues from there." in err
    assert "Traceback" not in err
    until(lambda: not any(map(is_running, others)), "a process goes on")
    assert not (store / "tmp").exists()


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@linux
@pytest.mark.tries("kills of a command that has started others")
@pytest.mark.parametrize("how", [("--num-processes", 2), ("--jobs", 2)], ids=["launch", "jobs"])
def test_what_a_killed_command_has_started_ends_and_its_folders_are_removed_by_the_next(
    how: tuple[object, ...], start: Start, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start(*how, "--mode", "slow", stderr=subprocess.DEVNULL)
    until(lambda: len(children_of(process.pid)) == (2 if "--num-processes" in how else 1), "nothing started")
    others = children_of(process.pid)
    if "--num-processes" in how:
        pids(process, store)
    process.kill()
    until(lambda: not any(map(is_running, others)), "a process goes on")
    left = list((store / "tmp").iterdir())
    assert {path.suffix for path in left} == {"", ".lock"}
    assert all(f"-{process.pid}-" in path.name for path in left)
    done = start()
    assert done.communicate(timeout=HANGS)[0] == "done\n"
    assert not (store / "tmp").exists()


def test_a_signal_that_is_ignored_stays_so(start: Start, tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP."""
    process = start("--num-processes", 2, "--mode", "slow", preexec_fn=ignore_hangup)
    ranks = pids(process, tmp_path / "store")
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    assert all(map(is_running, ranks))


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
