"""Resume states of a training: written aside, finished by a rename, and resumed only if they are whole.

`<folder>/checkpoint-<step>/` is what `transformers.Trainer` writes, with `hashes.json`: the step and the sha256 of every
file. A state is written in `<folder>/unfinished/`, its files are synced, the hashes are written last, and the folder is
renamed. A process that is killed leaves a finished state or none; one whose bytes have changed is found out.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ctpd.core.errors import UserError
from ctpd.core.processes import processes

HASHES = "hashes.json"
UNFINISHED = "unfinished"
_THREADS = 4  # hashing gives up the interpreter's lock
_STATE = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class ResumeStates:
    """The states in one folder. All ranks call each method; rank 0 alone finishes, checks and removes.

    Args:
        folder: only this class and the Trainer write in it.
        sharded: whether each rank writes its shard of the model (FSDP).
    """

    def __init__(self, folder: Path, *, sharded: bool) -> None:
        self.folder, self._sharded = folder, sharded
        self.last: int | None = None  # step of the finished state, if there is one

    @property
    def unfinished(self) -> Path:
        """Where the Trainer writes a state: a folder that is never taken for one."""
        return self.folder / UNFINISHED

    def path(self, step: int) -> Path:
        """The folder of the finished state after this step."""
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def newest(self, note: Callable[[str], None]) -> Path | None:
        """The newest whole state; all else in the folder is removed.

        On a network file system other ranks may not see yet what rank 0 does: its answer counts.

        Args:
            note: told what is not resumed, and why.

        Raises:
            UserError: the state is sharded and this training is not, or the other way round.
        """
        step = processes().broadcast(self._newest_step(note) if processes().is_main else 0)
        self.last = None if step < 0 else step
        return None if self.last is None else self.path(self.last)

    def finish(self, step: int) -> None:
        """Make what all ranks have written in `unfinished` the state of this step, and remove older ones."""
        processes().barrier()  # every rank has written its files
        if processes().is_main:
            written = self.unfinished / self.path(step).name
            content = {"step": step, "sharded": self._sharded, "files": _hashes(written)}
            (written / HASHES).write_text(json.dumps(content, indent=1), encoding="utf-8")
            _sync(written)
            os.replace(written, self.path(step))
            _sync_folder(self.folder)
            self._remove_all_but(step)
        processes().barrier()
        self.last = step

    def _newest_step(self, note: Callable[[str], None]) -> int:
        """The step of the newest whole state, -1 for none."""
        if not self.folder.is_dir():
            return -1
        names = [found for path in self.folder.iterdir() if (found := _STATE.fullmatch(path.name))]
        for step in sorted((int(name[1]) for name in names), reverse=True):
            problem = self._problem(step)
            if problem is None:
                self._remove_all_but(step)
                return step
            note(f"The resume state of step {step} is not used: {problem}.")
        if names:
            note("There is no whole resume state: the training starts afresh.")
        self._remove_all_but(-1)
        return -1

    def _problem(self, step: int) -> str | None:
        """What is wrong with a state; None if it is whole."""
        folder = self.path(step)
        content = _read(folder / HASHES)
        if content is None:
            return "its list of hashes cannot be read"
        if content["step"] != step:
            return f"it is of step {content['step']}"
        expected = content["files"]
        if missing := sorted(name for name in expected if not (folder / name).is_file()):
            return f"the file {missing[0]} is missing"
        found = _hashes(folder)
        # A hidden file may be one of the file system's own, and no library reads it.
        if added := sorted(name for name in found.keys() - expected.keys() if not Path(name).name.startswith(".")):
            return f"the file {added[0]} was not written with it"
        if changed := sorted(name for name in expected if found[name] != expected[name]):
            return f"the contents of {changed[0]} have changed"
        if content["sharded"] != self._sharded:
            raise _other_sharding(folder, sharded=self._sharded)
        return None

    def _remove_all_but(self, step: int) -> None:
        for path in self.folder.iterdir():
            if path == self.path(step):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _other_sharding(folder: Path, *, sharded: bool) -> UserError:
    before, now = ("without", "with") if sharded else ("with", "without")
    return UserError(
        f"the training was interrupted {before} FSDP and cannot go on {now} it",
        where=str(folder),
        fix="Run it as before, or remove this folder to start the training afresh",
    )


def _read(path: Path) -> dict[str, Any] | None:
    """The list of hashes; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fields = {"step": int, "sharded": bool, "files": dict}
    is_list = isinstance(content, dict) and all(isinstance(content.get(n), kind) for n, kind in fields.items())
    return content if is_list else None


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 by path of all files of a state but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Wait until the files of a folder, and the folders themselves, are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
