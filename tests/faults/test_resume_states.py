"""Resume states: kills while one is written, damage, signals. A later run always ends with the undisturbed numbers."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpd.core.errors import UserError
from ctpd.train.fit import Fit
from ctpd.train.states import HASHES, UNFINISHED, ResumeStates
from ctpd.train.stopping import StopRequest
from tests.fixtures.data_parallel import flip_byte
from tests.fixtures.launch_processes import ROOT, imports_from
from tests.fixtures.resumed import STEPS, train
from tests.fixtures.tiny import tiny_rows
from tests.fixtures.tried import Tried


class Killed(BaseException):
    """Nothing after this point is executed, as after SIGKILL."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, dict[str, torch.Tensor]]:
    return train(tmp_path_factory.mktemp("undisturbed"), checkpoint_seconds=1e9)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state of step 3."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.raises(Killed):
        train(folder, progress=at_step(4, killed))
    return folder


def killed() -> None:
    raise Killed


def at_step(step: int, action: Callable[[], object]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            action()

    return progress


def same(found: tuple[Fit, dict[str, torch.Tensor]], expected: tuple[Fit, dict[str, torch.Tensor]]) -> bool:
    weights = all(torch.equal(value, found[1][name]) for name, value in expected[1].items())
    return weights and found[0].history == expected[0].history


# Kills

_ON_EVENT: list[Callable[[str], None]] = []  # an audit hook stays for the whole process; this one does what is in here


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Events that change files below a folder of resume states."""
    if not _ON_EVENT or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return
    if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wxa+")):
        return
    if "states" in Path(os.fsdecode(args[0])).parts if isinstance(args[0], str | bytes | os.PathLike) else True:
        _ON_EVENT[0](f"{event} {args[0]}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def listening(action: Callable[[str], None]) -> Iterator[None]:
    _ON_EVENT.append(action)
    try:
        yield
    finally:
        _ON_EVENT.clear()


def events_of_second_state(folder: Path, *, kill_at: int | None = None) -> list[str]:
    """What happens to files from the first state to the second; the training is killed before event ``kill_at``."""
    seen: list[str] = []

    def count(event: str) -> None:
        if len(seen) == kill_at:
            raise Killed
        seen.append(event)

    def between(done: int, total: int) -> None:
        if done == 2:
            stack.enter_context(listening(count))
        if done == 3:
            raise Killed

    with contextlib.ExitStack() as stack, pytest.raises(Killed):
        train(folder / "states", progress=between)
    return seen


def test_a_kill_at_any_event_while_a_state_is_written_costs_a_step_and_moves_no_number(
    tmp_path: Path, undisturbed: tuple[Fit, dict[str, torch.Tensor]], tried: Tried
) -> None:
    events = events_of_second_state(tmp_path / "all")
    assert len(events) > 10
    renamed = next(i for i, event in enumerate(events) if event.startswith("os.rename"))
    for number in range(len(events)):
        folder = tmp_path / str(number)
        events_of_second_state(folder, kill_at=number)
        steps: list[int] = []
        found = train(folder / "states", progress=lambda done, total, steps=steps: steps.append(done))
        assert steps[0] == (2 if number <= renamed else 3), events[number]
        assert same(found, undisturbed), events[number]
    tried("kills at file events while a resume state is written", len(events))


KILLED = """
import os, signal, sys
from pathlib import Path
def hook(event, args):
    if event == "os.rename" and "checkpoint-2" in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from tests.fixtures.resumed import train
train(Path(sys.argv[1]))
"""


def test_a_process_killed_before_it_renames_a_state_leaves_the_one_before(
    tmp_path: Path, undisturbed: tuple[Fit, dict[str, torch.Tensor]]
) -> None:
    environment = os.environ | imports_from(ROOT)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", UNFINISHED]
    steps: list[int] = []
    assert same(train(tmp_path, progress=lambda done, total: steps.append(done)), undisturbed)
    assert steps == [2, 3, 4]


# Damage


def copied(state: Path, folder: Path) -> Path:
    shutil.copytree(state, folder, dirs_exist_ok=True)
    return folder / "checkpoint-3"


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    notes: list[str] = []
    return ResumeStates(folder, sharded=False).newest(notes.append), notes


def test_a_whole_state_is_found_and_all_else_is_removed(state: Path, tmp_path: Path) -> None:
    found = copied(state, tmp_path)
    (tmp_path / UNFINISHED / "checkpoint-4").mkdir(parents=True)
    shutil.copytree(state / "checkpoint-3", tmp_path / "checkpoint-2")
    (tmp_path / "stray").write_text("?")
    (found / ".nfs0001").write_text("a file of the file system's own")
    assert newest(tmp_path) == (found, [])
    assert list(tmp_path.iterdir()) == [found]


def test_a_flipped_bit_or_a_missing_file_in_any_file_is_noticed(state: Path, tmp_path: Path, tried: Tried) -> None:
    names = sorted(path.relative_to(state) for path in state.rglob("*") if path.is_file())
    assert len(names) > 5
    actions: list[Callable[[Path], None]] = [flip_byte, Path.unlink, lambda path: path.write_bytes(b"")]
    for number, (name, action) in enumerate((name, action) for name in names for action in actions):
        folder = tmp_path / str(number)
        copied(state, folder)
        action(folder / name)
        found, notes = newest(folder)
        assert found is None, name
        assert not list(folder.iterdir())
        assert "step 3 is not used" in notes[0]
        assert name.name in notes[0] or name.name == HASHES
        assert "starts afresh" in notes[1]
        tried("changed, emptied and missing files of resume states", 1)


def rename(state: Path) -> None:
    state.rename(state.with_name("checkpoint-2"))


def renumber(state: Path) -> None:
    path = state / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 3', '"global_step": 2'))


def without_hashes(state: Path) -> None:
    (state / HASHES).unlink()


def other_hashes(state: Path) -> None:
    (state / HASHES).write_text("[]")


def with_a_stranger(state: Path) -> None:
    (state / "pytorch_model.bin").write_bytes(b"?")


@pytest.mark.tries("changed, emptied and missing files of resume states")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rename, "it is of step 3"),
        (renumber, "the contents of trainer_state.json have changed"),
        (without_hashes, "its list of hashes cannot be read"),
        (other_hashes, "its list of hashes cannot be read"),
        (with_a_stranger, "the file pytorch_model.bin was not written with it"),
        (lambda state: flip_byte(state / "model.safetensors"), "the contents of model.safetensors have changed"),
        (lambda state: flip_byte(state / "optimizer.pt"), "the contents of optimizer.pt have changed"),
        (lambda state: (state / "scheduler.pt").unlink(), "the file scheduler.pt is missing"),
    ],
)
def test_a_damaged_state_is_not_resumed_and_the_numbers_are_the_undisturbed_ones(
    damage: Callable[[Path], None],
    said: str,
    state: Path,
    tmp_path: Path,
    undisturbed: tuple[Fit, dict[str, torch.Tensor]],
) -> None:
    damage(copied(state, tmp_path))
    notes: list[str] = []
    found = train(tmp_path, checkpoint_seconds=1e9, note=notes.append)
    assert same(found, undisturbed)
    assert said in notes[0]
    assert found[0].steps == STEPS


def test_an_older_whole_state_is_resumed_if_the_newest_is_damaged(
    state: Path, tmp_path: Path, undisturbed: tuple[Fit, dict[str, torch.Tensor]]
) -> None:
    newer = copied(state, tmp_path)
    with pytest.raises(Killed):
        train(tmp_path / "older", progress=at_step(3, killed))
    (tmp_path / "older/checkpoint-2").rename(tmp_path / "checkpoint-2")
    flip_byte(newer / "optimizer.pt")
    steps: list[int] = []
    assert same(train(tmp_path, progress=lambda done, total: steps.append(done)), undisturbed)
    assert steps == [3, 4]


def test_a_state_of_another_sharding_is_kept_and_refused(state: Path, tmp_path: Path) -> None:
    found = copied(state, tmp_path)
    with pytest.raises(UserError, match="interrupted without FSDP and cannot go on with it"):
        ResumeStates(tmp_path, sharded=True).newest(lambda text: None)
    assert json.loads((found / HASHES).read_text())["step"] == 3


# Signals


@contextlib.contextmanager
def as_in_the_command_line() -> Iterator[None]:
    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.tries("signals")
@pytest.mark.parametrize("step", [2, STEPS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_a_state_first_and_ends_as_ever(
    number: signal.Signals, step: int, tmp_path: Path, undisturbed: tuple[Fit, dict[str, torch.Tensor]]
) -> None:
    receive = at_step(step, lambda: signal.raise_signal(number))
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with as_in_the_command_line(), pytest.raises(expected) as ended:
        train(tmp_path, checkpoint_seconds=1e9, progress=receive)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{step}"]
    steps: list[int] = []
    assert same(train(tmp_path, checkpoint_seconds=1e9, progress=lambda done, total: steps.append(done)), undisturbed)
    assert steps == list(range(step + 1, STEPS + 1))


def test_a_signal_in_the_last_evaluation_writes_the_state_after_it(
    tmp_path: Path, undisturbed: tuple[Fit, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = type(tiny_rows(1))
    collate = rows.collate

    def receive(self: Any, items: list[int]) -> Any:
        if len(self) == 3:  # the evaluation's rows
            seen.append(1)
            if len(seen) == 3:  # two batches in the first evaluation
                os.kill(os.getpid(), signal.SIGINT)
        return collate(self, items)

    seen: list[int] = []
    monkeypatch.setattr(rows, "collate", receive)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, checkpoint_seconds=1e9)
    monkeypatch.setattr(rows, "collate", collate)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{STEPS}"]
    assert same(train(tmp_path, checkpoint_seconds=1e9), undisturbed)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, checkpoint_seconds=1e9, progress=at_step(2, twice), note=notes.append)
    assert not list(tmp_path.rglob("*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ["Press Ctrl-C again" in text for text in notes] == [True]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest(lambda text: None)
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_nobody_delivered_is_delivered_at_the_end_of_the_block() -> None:
    stop = StopRequest(lambda text: None)
    with pytest.raises(KeyboardInterrupt), stop.listening():
        signal.raise_signal(signal.SIGINT)
