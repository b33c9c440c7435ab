"""Locks of the store's keys: the operating system's where the file system has them, else files that exist while held."""

import errno
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_reported: set[Path] = set()  # stores whose file system has no locks


def acquired(path: Path, *, wait: bool, store: Path) -> "BaseFileLock | None":
    """The lock, held; None if another process or thread holds it and ``wait`` is off.

    The operating system frees its locks when a process dies. Without them, the file `*.softlock` beside ``path`` is the
    lock; the next process removes it if its owner has died on the same machine.

    Args:
        path: the lock file. It is never emptied, and a symbolic link in its place is refused.
        store: the folder to name when its file system has no locks.

    Raises:
        OSError: the lock file cannot be written.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # imported here so that `import ctpd` stays fast

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
        try:
            lock.acquire(blocking=wait)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _report(store)
            lock = SoftFileLock(path.with_suffix(".softlock"))
            lock.acquire(blocking=wait)
    except Timeout:
        return None
    return lock


def is_held(path: Path) -> bool:
    """Whether another process or thread holds the lock; creates nothing."""
    from filelock import FileLock, Timeout

    if os.path.lexists(path.with_suffix(".softlock")):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _report(store: Path) -> None:
    if store not in _reported:
        _reported.add(store)
        warnings.warn(
            f"the file system of {store} has no locks: files named `.*.softlock` take their place. If a process dies on "
            "another machine, remove its file by hand; else the next process waits for it",
            stacklevel=2,
        )
