"""The content-addressed store: one folder per artifact, written once, never changed.

`<root>/<stage>/<key>/` holds an artifact's files and, written last, `manifest.json` (identity, provenance, sha256 of
each file). An artifact is built in `<key>.partial/` and renamed when it is complete, which is atomic: an interrupted
build never leaves a folder that looks like an artifact. Beside them are `.<key>.lock` (held while the key is built),
`.<key>.hashes` (a memory of the hashes of large files) and `.<key>.damaged` (an artifact that was removed because it was
damaged, and is to be built again). `<root>/ctpd-store.json` marks the folder as a store.

Nothing in the folder is trusted: an artifact is a folder whose name is a key and whose manifest gives the same stage and
key, and a symbolic link in the place of an artifact, of a partial build or of a lock is refused.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpd.core import disk, locks, manifests
from ctpd.core.config import to_plain
from ctpd.core.errors import UserError
from ctpd.core.hashes import HashMemory
from ctpd.core.manifests import MANIFEST
from ctpd.core.printing import command

MARKER = "ctpd-store.json"
VERSION = 1  # of the folder's layout
RESUME_FOLDER = "checkpoints"  # in a folder that is being built: kept after an interruption, unlike the rest
PARTIAL = ".partial"
_STAGE = re.compile(r"[a-z][a-z0-9_]*")
_KEY = re.compile(r"[0-9a-f]{32}")


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
        return self.root / stage / f"{key}{PARTIAL}"

    def has(self, stage: str, key: str) -> bool:
        """Whether something is in the artifact's place: a build puts it there when it is complete. `open` checks it."""
        return os.path.lexists(self.path(stage, key))

    def open(self, stage: str, key: str) -> Path:
        """Return the folder of a finished artifact after comparing its files with the manifest.

        Files up to `hashes.REMEMBERED_BYTES` are hashed, larger ones too unless they are in the state in which they were
        hashed last (size, times, inode).

        Raises:
            DamagedArtifact: a file is missing, was added, or has another size or other contents.
            UserError: a file cannot be read.
        """
        return manifests.check(self.path(stage, key), HashMemory(self._beside(stage, key, "hashes")))

    def verify(self, stage: str, key: str) -> Path:
        """Like `open`, with every file hashed, however large."""
        return manifests.check(self.path(stage, key), None)

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """What is known of a finished artifact: `identity`, `provenance`, `files`.

        Raises:
            DamagedArtifact: it cannot be read, or is of another artifact.
            UserError: there is no permission to read it.
        """
        return manifests.read(self.path(stage, key))

    @contextlib.contextmanager
    def build(
        self, stage: str, key: str, *, identity: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Iterator[Path]:
        """Yield a folder to build in; commit it when the block ends without an error.

        What an interrupted build left is removed first, except `RESUME_FOLDER`. Hold `lock`, and call `has` inside it,
        so that one process at a time builds a key.

        Raises:
            UserError: the folder is a symbolic link, cannot be written to, or was removed or replaced while it was built
                in; the disk is full.
        """
        partial = self.partial(stage, key)
        try:
            self._mark()
            folder = _emptied(partial)
            yield partial
            if _inode(partial) != folder:
                raise UserError(
                    "the folder was removed or replaced while an artifact was built in it",
                    where=str(partial),
                    fix="Run the same command again",
                )
            self._commit(stage, key, {"identity": to_plain(identity), "provenance": to_plain(provenance)})
        except Exception as error:
            if found := disk.explained(error, folder=partial):
                raise found from error
            raise

    def _commit(self, stage: str, key: str, facts: Mapping[str, Any]) -> None:
        partial, target = self.partial(stage, key), self.path(stage, key)
        memory = HashMemory(self._beside(stage, key, "hashes"))
        manifests.write(partial, {"stage": stage, "key": key, **facts}, memory)
        if os.path.lexists(target):  # another process has finished it, on a file system without working locks
            shutil.rmtree(partial)
        else:
            os.replace(partial, target)
        self._beside(stage, key, "damaged").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, stage: str, key: str) -> Iterator[None]:
        """Wait for the key's lock and hold it: no two processes or threads build the same artifact at once.

        The operating system frees the lock of a process that has died.

        Raises:
            UserError: the store cannot be written to, or a symbolic link is in the lock's place.
        """
        with self._acquired(stage, key, wait=True):
            yield

    @contextlib.contextmanager
    def try_lock(self, stage: str, key: str) -> Iterator[bool]:
        """Take the key's lock if it is free, without waiting; yields whether it was taken.

        Raises:
            UserError: as `lock`.
        """
        with self._acquired(stage, key, wait=False) as taken:
            yield taken

    @contextlib.contextmanager
    def _acquired(self, stage: str, key: str, *, wait: bool) -> Iterator[bool]:
        path = self._beside(stage, key, "lock")
        if path.is_symlink():
            raise _refused_link(path)
        try:
            self._mark()
            lock = locks.acquired(path, wait=wait, store=self.root)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def building(self) -> list[str]:
        """The artifacts that processes are building now, as `stage/key`: those whose locks are held."""
        found = [path for ending in ("lock", "softlock") for path in self.root.glob(f"*/.*.{ending}")]
        known = {(path.parent.name, path.name.removeprefix(".").rpartition(".")[0]) for path in found}
        names = sorted((stage, key) for stage, key in known if _STAGE.fullmatch(stage) and _KEY.fullmatch(key))
        return [f"{stage}/{key}" for stage, key in names if locks.is_held(self._beside(stage, key, "lock"))]

    def remove(self, stage: str, key: str, *, rebuild: bool = False) -> None:
        """Delete an artifact and what an interrupted build left of it. Hold the lock of the key.

        A folder in the artifact's place that is none is left, unless it is to be rebuilt. The artifact is renamed first:
        a removal that is interrupted leaves no artifact without some of its files.

        Args:
            rebuild: leave a mark by which `is_removed` knows that the artifact was damaged and is to be built again.

        Raises:
            UserError: it cannot be removed.
        """
        target, partial = self.path(stage, key), self.partial(stage, key)
        mark = self._beside(stage, key, "damaged")
        try:
            _delete(partial)
            mark.unlink(missing_ok=True)
            if rebuild:
                mark.touch(exist_ok=False)  # follows no link
            if os.path.lexists(target) and (rebuild or self._is_artifact(stage, key)):
                os.replace(target, partial)
                _delete(partial)
            self._beside(stage, key, "hashes").unlink(missing_ok=True)
        except OSError as error:
            raise disk.DiskError(
                f"{stage}/{key} could not be removed ({disk.reason(error)})",
                where=str(self.root),
                fix="Change the permissions of the store's folder, or remove the folder by hand",
            ) from error

    def is_removed(self, stage: str, key: str) -> bool:
        """Whether the artifact was damaged, was removed by `--rebuild`, and is not built again yet."""
        return self._beside(stage, key, "damaged").is_file() and not self.has(stage, key)

    def check_removable(self) -> None:
        """Refuse to remove anything from a folder that is no store, cannot be written to, or is being built in.

        Raises:
            UserError: one of these; nothing was removed.
        """
        self.check_marked()
        try:
            self._mark()
            probe = self.root / f".{MARKER}.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error, "; nothing was removed") from error
        if building := self.building():
            more = f" and {len(building) - 1} more" if len(building) > 1 else ""
            raise UserError(
                f"another process is working on {building[0]}{more}, and may read other artifacts of the store; nothing "
                "was removed",
                where=str(self.root),
                fix="Wait until it has finished, or end it",
            )

    def check_marked(self) -> None:
        """Refuse a folder that is no store.

        Raises:
            UserError: it has neither the marker nor an artifact, or the marker is of a newer version.
        """
        marker = self.root / MARKER
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
            version = found["version"] if isinstance(found, dict) else None
        except FileNotFoundError:
            version = VERSION if self._keys("*") else None
        except (OSError, ValueError, KeyError):
            version = None
        if not isinstance(version, int):
            raise UserError(
                f"this is no store of ctpd: it holds neither {MARKER} nor artifacts",
                where=str(self.root),
                fix="Give the folder that `--store` names in `ctpd run`",
            )
        if version > VERSION:
            raise UserError(
                "the store was written by a newer version of ctpd", where=str(marker), fix="Install that one"
            )

    def artifacts(self, stage: str = "*") -> list[Artifact]:
        """Every finished artifact (of one stage), largest first."""
        found = [
            Artifact(kind, key, path, sum(file.stat().st_size for _, file in manifests.files(path)))
            for kind, key in self._keys(stage)
            for path in [self.path(kind, key)]
        ]
        return sorted(found, key=lambda artifact: -artifact.bytes)

    def partials(self) -> list[Path]:
        """The folders that interrupted builds left, and those of builds that run now."""
        return sorted(
            path
            for path in self.root.glob(f"*/*{PARTIAL}")
            if _is_name(path.parent.name, path.name.removesuffix(PARTIAL)) and path.is_dir() and not path.is_symlink()
        )

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

    def _keys(self, stage: str) -> list[tuple[str, str]]:
        """Stage and key of each folder whose manifest is as a build writes it."""
        found = []
        for path in sorted(self.root.glob(f"{stage}/*/{MANIFEST}")):
            kind, key = path.parts[-3:-1]
            if _is_name(kind, key) and self._is_artifact(kind, key):
                found.append((kind, key))
        return found

    def _is_artifact(self, stage: str, key: str) -> bool:
        """Whether a folder's manifest is as a build writes it; its files are not compared."""
        try:
            self.manifest(stage, key)
        except UserError:
            return False
        return True

    def _beside(self, stage: str, key: str, ending: str) -> Path:
        return self.root / stage / f".{key}.{ending}"

    def _mark(self) -> None:
        """Write the marker if there is none."""
        marker = self.root / MARKER
        if not os.path.lexists(marker):
            self.root.mkdir(parents=True, exist_ok=True)
            aside = self.root / f".{MARKER}.{os.getpid()}.{threading.get_ident()}"
            aside.write_text(json.dumps({"store": "ctpd", "version": VERSION}) + "\n", encoding="utf-8")
            os.replace(aside, marker)

    def _unwritable(self, error: OSError, consequence: str = "") -> UserError:
        return disk.full(error, where=self.root) or disk.DiskError(
            f"the store cannot be written to ({disk.reason(error)}){consequence}",
            where=str(self.root),
            fix="Give a folder that can be written to with `--store`",
        )


def _refused_link(path: Path) -> UserError:
    return UserError(
        "a symbolic link is in the place of a folder or file of the store", where=str(path), fix="Remove the link"
    )


def _is_name(stage: str, key: str) -> bool:
    return bool(_STAGE.fullmatch(stage) and _KEY.fullmatch(key))


def _inode(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; None if there is none."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    found = folder.stat()
    return found.st_dev, found.st_ino


def _emptied(partial: Path) -> tuple[int, int] | None:
    """Make the folder, or remove what an interrupted build left in it, except `RESUME_FOLDER`; returns its inode."""
    if partial.is_symlink():
        raise _refused_link(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for left in partial.iterdir():
        if left.name != RESUME_FOLDER or left.is_symlink() or not left.is_dir():
            _delete(left)
    return _inode(partial)


def _delete(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
