"""The content-addressed store: one folder per artifact, written once, never changed.

`<root>/<stage>/<key>/` holds an artifact's files and, written last, `manifest.json` (identity, provenance, sha256 of
each file). An artifact is built in `<key>.partial/` and renamed when it is complete, which is atomic: an interrupted
build never leaves a folder that looks like an artifact.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpd.core.config import to_plain
from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.printing import command

if TYPE_CHECKING:
    from filelock import FileLock

MANIFEST = "manifest.json"
RESUME_FOLDER = "checkpoints"  # in a folder that is being built: kept after an interruption, unlike the rest
ALWAYS_HASHED_BYTES = 256 * 2**20  # `open` hashes files up to this size, and compares the size of larger ones


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder, stage and key."""

    stage: str
    key: str
    path: Path
    bytes: int


class Store:
    """The artifacts under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, stage: str, key: str) -> Path:
        """The folder of the artifact, whether it exists or not."""
        return self.root / stage / key

    def partial(self, stage: str, key: str) -> Path:
        """The folder in which the artifact is built, and which an interrupted build leaves."""
        return self.root / stage / f"{key}.partial"

    def has(self, stage: str, key: str) -> bool:
        """Whether the artifact is finished (its manifest is written last)."""
        return (self.path(stage, key) / MANIFEST).is_file()

    def open(self, stage: str, key: str) -> Path:
        """Return the folder of a finished artifact after comparing its files with the manifest.

        Raises:
            DamagedArtifact: a file is missing, or has another size or other contents.
        """
        return self._check(stage, key, hash_up_to=ALWAYS_HASHED_BYTES)

    def verify(self, stage: str, key: str) -> Path:
        """Like `open`, with every file compared byte for byte, however large."""
        return self._check(stage, key, hash_up_to=None)

    @contextlib.contextmanager
    def build(
        self, stage: str, key: str, *, identity: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Iterator[Path]:
        """Yield a folder to build in; commit it when the block ends without an error.

        What an interrupted build left is removed first, except `RESUME_FOLDER`. Hold `lock`, and call `has` inside it,
        so that one process at a time builds a key.

        Raises:
            UserError: the folder was removed or replaced while it was built in.
        """
        target = self.path(stage, key)
        partial = self.partial(stage, key)
        partial.mkdir(parents=True, exist_ok=True)
        for left in partial.iterdir():
            if left.is_dir() and left.name != RESUME_FOLDER:
                shutil.rmtree(left)
            elif not left.is_dir():
                left.unlink()
        folder = partial.stat().st_ino
        yield partial
        if not partial.is_dir() or partial.stat().st_ino != folder:
            raise UserError(
                "the folder was removed or replaced while an artifact was built in it",
                where=str(partial),
                fix="Run the same command again",
            )
        manifest = {
            "stage": stage,
            "key": key,
            "identity": to_plain(identity),
            "provenance": to_plain(provenance),
            "files": {str(path.relative_to(partial)): _describe(path) for path in _files(partial)},
        }
        _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)

    @contextlib.contextmanager
    def lock(self, stage: str, key: str) -> Iterator[None]:
        """Wait for the key's lock and hold it: no two processes or threads build the same artifact at once.

        The operating system frees the lock of a process that has died.

        Raises:
            UserError: the lock file cannot be written, or its file system has no locks.
        """
        lock = self._acquired(stage, key, wait=True)
        assert lock is not None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def try_lock(self, stage: str, key: str) -> Iterator[bool]:
        """Take the key's lock if it is free, without waiting; yields whether it was taken.

        Raises:
            UserError: as `lock`.
        """
        lock = self._acquired(stage, key, wait=False)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _acquired(self, stage: str, key: str, *, wait: bool) -> "FileLock | None":
        """The lock, held, or None if another holds it and ``wait`` is off."""
        from filelock import FileLock, Timeout  # imported here so that `import ctpd` stays fast

        path = self.root / stage / f".{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)  # uses flock; follows no symbolic link, truncates no file
            lock.acquire(blocking=wait)
        except Timeout:
            return None
        except OSError as error:
            raise UserError(
                f"the lock cannot be taken ({error.strerror})",
                where=str(path),
                fix="A store needs a folder that can be written to, on a file system with locks",
            ) from error
        return lock

    def remove(self, stage: str, key: str) -> None:
        """Delete an artifact and what an interrupted build left of it. Hold the lock of the key."""
        for path in (self.path(stage, key), self.partial(stage, key)):
            shutil.rmtree(path, ignore_errors=True)

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """What is known of a finished artifact: `identity`, `provenance`, `files`.

        Raises:
            DamagedArtifact: it cannot be read.
        """
        folder = self.path(stage, key)
        try:
            found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return {"identity": {}, "provenance": {}} | found
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(folder, "its manifest cannot be read") from error

    def artifacts(self, stage: str = "*") -> list[Artifact]:
        """Every finished artifact (of one stage), largest first."""
        found = [
            Artifact(
                path.parent.parent.name,
                path.parent.name,
                path.parent,
                sum(f.stat().st_size for f in _files(path.parent)),
            )
            for path in sorted(self.root.glob(f"{stage}/*/{MANIFEST}"))
            if not path.parent.name.endswith(".partial")
        ]
        return sorted(found, key=lambda artifact: -artifact.bytes)

    def partials(self) -> list[Path]:
        """The folders that interrupted builds left, and those of builds that run now."""
        return sorted(self.root.glob("*/*.partial"))

    def find(self, prefix: str) -> Artifact:
        """The one artifact whose key begins with ``prefix`` (optionally ``stage/prefix``).

        Raises:
            UserError: none, or more than one.
        """
        stage, _, key = prefix.rpartition("/")
        found = [a for a in self.artifacts() if a.key.startswith(key) and (not stage or a.stage == stage)]
        if len(found) != 1:
            raise UserError(
                f"{len(found) or 'no'} artifact{'s' if found else ''} in {self.root} begin{'' if found else 's'} with '{prefix}'",
                fix=f"Give more of the key; `{command('store', 'du', store=self.root)}` lists them",
            )
        return found[0]

    def _check(self, stage: str, key: str, *, hash_up_to: int | None) -> Path:
        folder = self.path(stage, key)
        try:
            files = json.loads((folder / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(folder, "its manifest cannot be read") from error
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                raise _damaged(folder, f"the file {name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise _damaged(
                    folder, f"the file {name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
                )
            hashed = hash_up_to is None or expected["bytes"] <= hash_up_to
            if hashed and _sha256(path) != expected["sha256"]:
                raise _damaged(folder, f"the contents of {name} have changed")
        return folder


def _damaged(folder: Path, what: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"the stored artifact is damaged: {what}",
        where=str(folder),
        fix="Run the same command again with `--rebuild`, which builds it again",
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def digest_folder(folder: Path) -> str:
    """sha256 over the names and contents of the files of a folder (a model directory), hidden files left out."""
    total = hashlib.sha256()
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.relative_to(folder).parts)
    ):
        total.update(f"{path.relative_to(folder)}\0{_sha256(path)}\0".encode())
    return total.hexdigest()
