"""Temporary folders inside a store, removed at the next start if the process that made them was killed.

A folder's lock, a file beside it, is held until the folder is removed. The operating system frees the lock of a process
that has ended in any way, so a lock that can be taken marks a folder that nobody uses.
"""

import contextlib
import contextvars
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ctpd.core.errors import UserError

try:
    import fcntl
except ImportError:  # no Unix: folders of killed processes are left
    fcntl = None  # type: ignore[assignment]

FOLDER = "tmp"  # in a store
_PREFIX = "ctpd-"
_LOCK = ".lock"
_ATTEMPTS = 100  # another process may remove the new lock before it is held, or the empty `FOLDER`

_root: contextvars.ContextVar[Path | None] = contextvars.ContextVar("_root", default=None)
_cleaned: set[Path] = set()


class TemporaryFolder:
    """A new folder, which `remove` removes; its name holds the number of this process.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, name: str) -> None:
        root = _root.get()
        self._lock: int | None = None
        self._is_first = root is not None and not root.parent.exists()  # the store's folder is made here, too
        try:
            if root is None:
                self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-"))
                return
            self.path, self._lock = _made(root, name)
        except OSError as error:
            raise UserError(
                f"a temporary folder cannot be made ({error.strerror})",
                where=str(root or tempfile.gettempdir()),
                fix="Make room there and allow this user to write",
            ) from error

    def remove(self) -> None:
        """Remove the folder and what is in it; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is None:
            return
        _unlink(_lock_of(self.path))
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):  # others have folders there
            self.path.parent.rmdir()
            if self._is_first:
                self.path.parent.parent.rmdir()


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A new folder while the block runs; raises as `TemporaryFolder`."""
    folder = TemporaryFolder(name)
    try:
        yield folder.path
    finally:
        folder.remove()


@contextlib.contextmanager
def kept_in(store: Path) -> Iterator[None]:
    """Make the temporary folders of the block in the store of this folder, not in the system's folder.

    What killed processes left there is removed, once in a process.
    """
    root = store.absolute() / FOLDER
    if root not in _cleaned:
        _cleaned.add(root)
        remove_left(root)
    token = _root.set(root)
    try:
        yield
    finally:
        _root.reset(token)


def remove_left(root: Path) -> None:
    """Remove the temporary folders in ``root`` whose process has ended."""
    for path in root.glob(f"{_PREFIX}*{_LOCK}"):
        lock = _taken(path)
        if lock is None:
            continue
        shutil.rmtree(path.with_name(path.name.removesuffix(_LOCK)), ignore_errors=True)
        _unlink(path)
        os.close(lock)
    with contextlib.suppress(OSError):
        root.rmdir()


def _made(root: Path, name: str) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        root.mkdir(parents=True, exist_ok=True)
        path = root / f"{_PREFIX}{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(_lock_of(path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            if _is_held(lock, _lock_of(path), without_locks=True):
                path.mkdir(mode=0o700)
                return path, lock
            os.close(lock)
    raise OSError(0, "other processes keep removing it")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _taken(path: Path) -> int | None:
    """The lock at ``path``, held; None if another process holds it or has removed it."""
    try:
        lock = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    if _is_held(lock, path, without_locks=False):
        return lock
    os.close(lock)
    return None


def _is_held(lock: int, path: Path, *, without_locks: bool) -> bool:
    """Lock an open file; whether that worked and it is still the file at ``path``.

    ``without_locks`` is the answer where the file system or the operating system has no such locks.
    """
    if fcntl is None:
        return without_locks
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(lock))
    return False


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
