"""sha256 of files, and a memory of the large ones: they are read again only after they have changed."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

REMEMBERED_BYTES = 256 * 2**20  # files up to this size are hashed at every use


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def state(path: Path) -> list[int]:
    """What changes when a file is written to or replaced: size, times of contents and of inode, inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


class HashMemory:
    """The hashes of one artifact's large files, with the state in which each file was hashed.

    Args:
        path: the file that keeps them between processes. A store that cannot be written to goes without.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[object]] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.known = dict(json.loads(path.read_text(encoding="utf-8")).items())

    def sha256(self, file: Path, name: str) -> str:
        """The sha256 of a file; a large one that is in the state in which it was hashed last is not read again."""
        before = state(file)
        if before[0] <= REMEMBERED_BYTES:
            return sha256(file)
        known = self.known.get(name)
        if isinstance(known, list) and known[:-1] == before:
            return str(known[-1])
        found = sha256(file)
        if state(file) == before:
            self.known[name] = [*before, found]
            self._write()
        return found

    def _write(self) -> None:
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.{threading.get_ident()}")
        with contextlib.suppress(OSError):
            try:
                aside.write_text(json.dumps(self.known), encoding="utf-8")
                os.replace(aside, self.path)
            finally:
                aside.unlink(missing_ok=True)


def visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder with their relative paths in order, hidden files and folders left out."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            yield str(path.relative_to(folder)), path


def digest_folder(folder: Path) -> str:
    """sha256 over the names and contents of the files of a folder (a model directory), hidden files left out."""
    total = hashlib.sha256()
    for name, path in visible_files(folder):
        total.update(f"{name}\0{sha256(path)}\0".encode())
    return total.hexdigest()
