"""A store that cannot be written to: one paragraph, exit code 2, nothing lost; the next command goes on."""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctpd.core.disk import explained
from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.pipeline.build import build_missing
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage, Work
from tests.conftest import Cli, Outcome, SmokeRun
from tests.fixtures.stages import small_stage
from tests.fixtures.tried import Tried

RUN = ("run", "testbed-smoke", "--device", "cpu")
MOUNTED_BYTES = 600_000


def assert_paragraph(outcome: Outcome, *parts: str) -> None:
    """One paragraph on standard error after the progress, exit code 2."""
    assert outcome.code == 2, outcome.err
    message = outcome.err[outcome.err.index("Error: ") :]
    assert message.count("\n") == 1, message
    assert "fault of ctpd" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system, or one that is read-only with a copy of a folder; skip where it is not permitted."""
    places: list[Path] = []

    def mount(*options: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip(reason="mounting a file system is not permitted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def refuse_writing(monkeypatch: pytest.MonkeyPatch, root: Path, number: int) -> None:
    """Let every change under ``root`` fail with an error number, as a read-only or protected folder does."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = next((p for p in args if isinstance(p, str | os.PathLike) and str(p).startswith(str(root))), None)
            flags = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            writes = (
                bool(flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
                if isinstance(flags, int) and function is real_open
                else function is not io_open or any(letter in str(flags) for letter in "wax+")
            )
            if path is not None and writes:
                raise OSError(number, os.strerror(number), str(path))
            return function(*args, **kwargs)

        return call

    real_open, io_open = os.open, io.open
    for name in ("open", "mkdir", "replace", "rename", "unlink", "rmdir", "link"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(io, "open", refusing(io_open))
    monkeypatch.setattr("builtins.open", refusing(io_open))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_finished_run_is_shown_from_a_store_that_cannot_be_written(
    number: int, cli: Cli, smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_writing(monkeypatch, smoke.store, number)
    outcome = cli(*RUN, "--store", smoke.store)
    assert outcome.code == 0, outcome.err
    assert "Main results" in outcome.out
    assert os.strerror(number).lower() in outcome.err
    assert "compare testbed-smoke --to" in outcome.err


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("command", ["rm", "gc", "compare", "run"])
def test_commands_that_write_refuse_a_store_that_cannot_be_written(
    number: int, command: str, cli: Cli, smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(smoke.store)
    before = [(artifact.stage, artifact.key) for artifact in store.artifacts()]
    key = before[0][1]
    commands = {
        "rm": ("store", "rm", key),
        "gc": ("store", "gc", "testbed-smoke"),
        "compare": ("compare", "testbed-smoke"),
        "run": (*RUN, "--limit", 2),
    }
    refuse_writing(monkeypatch, smoke.store, number)
    outcome = cli(*commands[command], "--store", smoke.store)
    assert_paragraph(outcome, str(smoke.store), os.strerror(number).lower())
    if command in ("rm", "gc"):
        assert "nothing was removed" in outcome.err
        assert outcome.out == ""
    if command == "compare":
        assert "--to" in outcome.err
    monkeypatch.undo()
    assert [(artifact.stage, artifact.key) for artifact in store.artifacts()] == before


def test_a_store_on_a_read_only_file_system(cli: Cli, smoke: SmokeRun, mounted: Callable[..., Path]) -> None:
    root = mounted("size=64m") / "store"
    shutil.copytree(smoke.pristine, root)
    read_only(root.parent)
    key = next(artifact.key for artifact in Store(root).artifacts())
    assert cli(*RUN, "--store", root).code == 0
    assert_paragraph(cli("store", "rm", key, "--store", root), "read-only file system", "nothing was removed")
    assert_paragraph(cli("store", "gc", "testbed-smoke", "--store", root), "nothing was removed")
    assert_paragraph(cli(*RUN, "--limit", 2, "--store", root), "read-only file system", "--store")
    assert cli("store", "du", "--store", root).code == 0
    assert cli("store", "gc", "testbed-smoke", "--dry-run", "--store", root).code == 0


def test_a_file_in_the_place_of_the_store(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("x")
    assert_paragraph(cli("train", "testbed-smoke", "--device", "cpu", "--store", tmp_path / "store"), "--store")
    assert_paragraph(cli("store", "rm", "abc", "--store", tmp_path / "store"), "no store of ctpd")
    assert (tmp_path / "store").read_text() == "x"


def test_a_file_in_the_place_of_a_stage(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "world").write_text("x")
    assert_paragraph(cli("train", "testbed-smoke", "--device", "cpu", "--store", root), str(root))
    assert (root / "world").read_text() == "x"


def write(stage: Stage, work: Work) -> None:
    parts = [(work.path(source) / "text").read_text() for source in stage.inputs.values()]
    (work.folder / "more").mkdir()
    (work.folder / "more" / "text").write_text("y" * 1000)
    (work.folder / "text").write_text("x" + "".join(parts))


def run(store: Store, *targets: Stage) -> int:
    return build_missing(Graph(targets), store, runtime=Runtime(device="cpu"), progress=Progress(quiet=True))


class Failing:
    """Counts the calls that write, and lets the one with the given number fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, root: Path, number: int) -> None:
        self.root, self.number, self.count = root, number, 0
        for name in ("mkdir", "replace", "fsync"):
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))
        monkeypatch.setattr(io, "open", self._counting(io.open, writing=True))

    def _counting(self, function: Callable[..., Any], *, writing: bool = False) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            mode = str(args[0] if args else kwargs.get("mode", "r"))
            inside = isinstance(path, int) or str(path).startswith(str(self.root))
            if inside and not (writing and not any(letter in mode for letter in "wax+")):
                self.count += 1
                if self.count == self.number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if isinstance(path, int) else str(path))
            return function(path, *args, **kwargs)

        return call


def test_a_disk_that_is_full_at_any_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """The n-th write fails, for every n; the finished artifacts are whole, and the next run builds the rest."""
    base = small_stage("base", write)
    top = small_stage("top", write, base)
    monkeypatch.setattr("ctpd.pipeline.build._collect_garbage", lambda: None)  # takes longer than all else here
    number, failures = 0, 0
    is_reached = True
    while is_reached:
        number += 1
        store = Store(tmp_path / f"{number}.store")
        with monkeypatch.context() as patched:
            failing = Failing(patched, root=store.root, number=number)
            try:
                run(store, top)
            except UserError as error:
                failures += 1
                assert "no space left on device" in str(error)  # noqa: PT017
                assert str(store.root) in str(error)  # noqa: PT017
            is_reached = failing.count >= number
        for artifact in store.artifacts():
            store.open(artifact.stage, artifact.key)
        run(store, top)
        assert (store.open("top", top.key) / "text").read_text() == "xx"
        assert not store.partials()
    assert failures > 15
    tried("writes that fail because the disk is full", failures)


def test_a_full_file_system_loses_nothing(cli: Cli, smoke: SmokeRun, mounted: Callable[..., Path]) -> None:
    """A real one: the store outgrows it in the middle of the run; with more space the run goes on."""
    place = mounted(f"size={MOUNTED_BYTES}")
    root = place / "store"
    outcome = cli("train", "testbed-smoke", "--device", "cpu", "--only", "DPO", "--store", root)
    assert_paragraph(outcome, "no space left on device", str(root), "the same command goes on from there")
    finished = {(artifact.stage, artifact.key) for artifact in Store(root).artifacts()}
    assert finished
    for stage, key in finished:
        Store(root).open(stage, key)
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    outcome = cli("train", "testbed-smoke", "--device", "cpu", "--only", "DPO", "--store", root)
    assert outcome.code == 0, outcome.err
    for artifact in Store(root).artifacts():
        Store(root).open(artifact.stage, artifact.key)


@pytest.fixture
def size_limit() -> Iterator[Callable[[int], None]]:
    """Limit the size of files that this process writes (`ulimit -f`)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_limit_on_the_size_of_files(cli: Cli, tmp_path: Path, size_limit: Callable[[int], None]) -> None:
    size_limit(50_000)
    outcome = cli("train", "testbed-smoke", "--device", "cpu", "--only", "DPO", "--store", tmp_path / "s")
    assert_paragraph(outcome, "file too large", "ulimit -f", str(tmp_path / "s"))


def test_a_small_folder_for_temporary_files_does_not_matter(
    cli: Cli, smoke: SmokeRun, tmp_path: Path, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a command needs for a time is in the store's own folder."""
    import tempfile

    root = tmp_path / "store"
    shutil.copytree(smoke.pristine, root)
    store = Store(root)
    for artifact in (*store.artifacts("evaluate"), *store.artifacts("record")):
        store.remove(artifact.stage, artifact.key)
    temporary = mounted("size=12k")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    outcome = cli("eval", "testbed-smoke", "--device", "cpu", "--only", "DPO", "--store", root)
    assert outcome.code == 0, outcome.err
    assert not list(temporary.iterdir())


def test_a_full_folder_for_temporary_files_is_not_blamed_on_the_data(tmp_path: Path) -> None:
    error = UserError("the data set could not be loaded (x)", where="some/data@main")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/small/tmp/x.arrow")
    found = explained(error, folder=tmp_path)
    assert found is not None
    assert str(found).startswith("/small/tmp/x.arrow: no space left on device. Free some space there")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), ("no space left",)),
        (OSError("Not enough disk space. Needed: Unknown size"), ("no space left",)),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/s/a"), ("/s/a:", "quota")),
        (PermissionError(errno.EACCES, "Permission denied", "/s/a"), ("/s/a: permission denied", "permissions")),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), ("TMPDIR",)),
    ],
)
def test_errors_of_disks_are_explained(error: Exception, parts: tuple[str, ...], tmp_path: Path) -> None:
    found = explained(error, folder=tmp_path)
    assert found is not None
    for part in parts:
        assert part in str(found)


OTHERS = [ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file", "a"), UserError("the text 'No space left on device'")]  # fmt: skip


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_are_not(error: Exception) -> None:
    assert explained(error) is None


def test_an_artifact_that_cannot_be_read_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `--rebuild` would remove it."""
    base, store = small_stage("base", write), Store(tmp_path)
    run(store, base)
    opened = io.open

    def denied(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("text"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(io, "open", denied)
        with pytest.raises(UserError, match=r"cannot be read \(permission denied"):
            Graph([base]).check(store, rebuild=True)
    assert store.open("base", base.key)
