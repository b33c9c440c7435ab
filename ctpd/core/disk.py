"""Failures of disks and permissions, said in one paragraph: what, where, and how to mend it."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ctpd.core.errors import UserError

NEARLY_FULL_BYTES = 64 * 2**10  # a folder with less free space than this is taken to be the full one
_NOTHING_LOST = "what is finished is kept, and the same command goes on from there"
_FULL = {
    errno.ENOSPC: ("no space left on device", f"Free some space there; {_NOTHING_LOST}"),
    errno.EDQUOT: ("disk quota exceeded", f"Free some space there or raise the quota; {_NOTHING_LOST}"),
    errno.EFBIG: ("file too large", f"Raise the limit on file sizes (`ulimit -f`); {_NOTHING_LOST}"),
}
_ELSEWHERE = "Give a folder that can be written to"
_FIXES = {
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: "Change its permissions, or give another path",
    errno.EPERM: "Change its permissions, or give another path",
    errno.ENOTDIR: "A file is in the place of a folder: move it away, or give another path",
    errno.EEXIST: "A file is in the place of a folder: move it away, or give another path",
    errno.EISDIR: "A folder is in the place of a file: move it away, or give another path",
    errno.ENAMETOOLONG: "Give a shorter path",
    errno.ELOOP: "Symbolic links lead in a circle: remove them",
    errno.EIO: f"The device failed: check it, and the system's log; {_NOTHING_LOST}",
    errno.ESTALE: f"The network folder has gone: mount it again; {_NOTHING_LOST}",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "The system has too many open files: end other programs",
}


class DiskError(UserError):
    """A full disk, a missing permission or the like."""


def explained(error: BaseException, *, folder: Path | None = None) -> UserError | None:
    """The error of a full disk, a missing permission or the like in one paragraph; None for any other error.

    Libraries report a full disk under names of their own, and a caller may have blamed its input for it, so the chain
    of causes is searched for it.

    Args:
        folder: where the work that failed writes, for errors that name no file.
    """
    if isinstance(error, DiskError):
        return error
    for cause in _chain(error):
        number = _full_disk(cause, folder)
        if number is not None:
            what, fix = _FULL[number]
            return DiskError(what, where=_named(cause) or _fullest(folder), fix=fix)
        if isinstance(cause, FileNotFoundError) and "No usable temporary directory" in str(cause):
            return DiskError(
                "no folder for temporary files can be written to",
                where=os.environ.get("TMPDIR"),
                fix=f"Free some space there, or set TMPDIR to another folder; {_NOTHING_LOST}",
            )
    if isinstance(error, OSError) and error.errno in _FIXES and _named(error):
        return DiskError(reason(error), where=_named(error), fix=_FIXES[error.errno])
    return None


def full(error: OSError, *, where: Path) -> UserError | None:
    """The error of a full disk, a quota or a limit on sizes; None for any other error."""
    if error.errno not in _FULL:
        return None
    what, fix = _FULL[error.errno]
    return DiskError(what, where=_named(error) or str(where), fix=fix)


def reason(error: OSError) -> str:
    """The system's words for an error, such as `permission denied`."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def is_unreadable(error: OSError) -> bool:
    """Whether a file could not be read although nothing is known to be wrong with it, such as without permission."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _full_disk(error: BaseException, folder: Path | None) -> int | None:
    """The number of the error if it comes from a full disk or a limit on sizes."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return error.errno
    text = "" if isinstance(error, UserError) else str(error)  # ours may quote a user's texts
    if "Not enough disk space" in text:  # datasets
        return errno.ENOSPC
    for number in _FULL:
        if os.strerror(number) in text or f"(os error {number})" in text:
            return number
    if "failed writing file" in text and _fullest(folder) is not None:  # torch, which does not say why
        return errno.ENOSPC
    return None


def _named(error: BaseException) -> str | None:
    """The file that an error names; of a copy or a rename, the new one."""
    name = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return None if name is None or isinstance(name, int) else os.fsdecode(name)


def _fullest(folder: Path | None) -> str | None:
    """The nearly full one of ``folder`` and the folder for temporary files; ``folder`` if neither is."""
    candidates = [folder] if folder is not None else []
    temporary = os.environ.get("TMPDIR") or tempfile.gettempdir()
    for candidate in (*candidates, Path(temporary)):
        try:
            state = os.statvfs(candidate)
        except OSError:
            continue
        if state.f_bavail * state.f_frsize < NEARLY_FULL_BYTES:
            return str(candidate)
    return str(folder) if folder is not None else None
