"""A whole run that is killed at random moments, again and again, ends with the measurements of an undisturbed one."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpd.core.store import Store
from tests.conftest import SmokeRun
from tests.fixtures.commands import command, program, scores
from tests.fixtures.tried import ROUNDS, Tried
from tests.fixtures.waiting import until

RUN = ("run", "testbed-smoke", "--device", "cpu", "--only", "DPO")
WAYS = {"one process": (), "jobs": ("--jobs", 2), "launch": ("--num-processes", 2)}
KILLS = max(2, ROUNDS // 10)  # of each way
MOST = 4  # artifacts that a command may finish before it is killed


@contextlib.contextmanager
def started(*words: object) -> Iterator["subprocess.Popen[bytes]"]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(**command(*words), **quiet) as process:
        try:
            yield process
        finally:
            process.kill()


def killed(store: Path, chance: random.Random, *words: object) -> bool:
    """Whether a command was killed while it ran: some artifacts after its beginning, at any moment of the next one's build."""

    def finished() -> int:
        return sum(1 for _ in store.glob("*/*/manifest.json"))

    wanted = finished() + chance.randrange(MOST)
    with started(*words, "--store", store) as process:
        until(lambda: process.poll() is not None or (finished() >= wanted and building(store)), "nothing is built")
        time.sleep(chance.uniform(0, 1.5))
        process.kill()
        return process.wait() == -signal.SIGKILL


def building(store: Path) -> bool:
    return next(store.glob("*/*.partial"), None) is not None


def assert_same(store: Path, undisturbed: Path) -> None:
    """All scores of a store, and all weights, signals and tokens, byte for byte, are those of a store that may hold more."""
    expected = scores(undisturbed)
    assert scores(store) == {key: expected[key] for key in scores(store)}
    files = list(store.glob("*/*/**/*.safetensors"))
    assert len(files) > MOST
    for path in files:
        assert path.read_bytes() == (undisturbed / path.relative_to(store)).read_bytes(), path


@pytest.mark.parametrize("way", WAYS if ROUNDS > 1 else ["one process"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_undisturbed_numbers(
    way: str, smoke: SmokeRun, tmp_path: Path, tried: Tried
) -> None:
    words, undisturbed = (*RUN, *WAYS[way]), smoke.pristine
    if way == "launch":  # sums of several processes are rounded otherwise
        undisturbed = tmp_path / "undisturbed"
        assert program(*words, "--store", undisturbed).returncode == 0
    chance, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        number += 1
        store = tmp_path / str(number)
        while kills < KILLS and killed(store, chance, *words):
            kills += 1
        done = program(*words, "--store", store)
        assert done.returncode == 0, done.stderr
        assert_same(store, undisturbed)
        assert not Store(store).partials()
        assert not (store / "tmp").exists()
    tried(f"kills of a run at random moments, {way}", kills)
