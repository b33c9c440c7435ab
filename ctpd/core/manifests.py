"""Manifests: what an artifact is, and the size and sha256 of each of its files.

A manifest also holds the sha256 of all the rest of it, so that none of its bytes can change unnoticed; those of older
versions have none.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpd.core import disk
from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.hashes import HashMemory, sha256

MANIFEST = "manifest.json"
_OWN_HASH = "sha256"
_FIELDS = {"stage", "key", "identity", "provenance", "files", _OWN_HASH}


def write(folder: Path, facts: Mapping[str, Any], memory: HashMemory) -> None:
    """Write the manifest of an artifact that is complete.

    Args:
        folder: with the artifact's files.
        facts: `stage`, `key`, `identity` and `provenance`.
        memory: remembers the hashes of large files.
    """
    described = {
        name: {"bytes": path.stat().st_size, "sha256": memory.sha256(path, name)} for name, path in files(folder)
    }
    manifest = json.loads(json.dumps({**facts, "files": described}))
    manifest[_OWN_HASH] = _hash_of(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as handle:
        handle.write(json.dumps(manifest, indent=1, ensure_ascii=False))
        handle.flush()
        os.fsync(handle.fileno())


def read(folder: Path) -> dict[str, Any]:
    """The manifest of the artifact in ``folder``, whose name is the key and whose parent's name is the stage.

    Raises:
        DamagedArtifact: it cannot be read, or is of another artifact.
        UserError: there is no permission to read it.
    """
    if folder.is_symlink():
        raise _damaged(folder, "it is a symbolic link")
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(folder / MANIFEST, error) or _damaged(folder, f"{MANIFEST} cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read") from error
    if not _is_manifest(found) or found.get(_OWN_HASH, _hash_of(found)) != _hash_of(found):
        raise _damaged(folder, f"{MANIFEST} is not as a build writes it")
    if (found["stage"], found["key"]) != (folder.parent.name, folder.name):
        raise _damaged(folder, f"{MANIFEST} is of another artifact")
    manifest: dict[str, Any] = {"identity": {}, "provenance": {}} | found
    return manifest


def check(folder: Path, memory: HashMemory | None) -> Path:
    """Compare the files of an artifact with its manifest; returns the folder.

    Args:
        folder: as for `read`.
        memory: of the hashes of large files; None: every file is read.

    Raises:
        DamagedArtifact: a file is missing, was added, or has another size or other contents.
        UserError: a file cannot be read.
    """
    known = read(folder)["files"]
    try:
        for name, expected in known.items():
            if what := _difference(folder / name, name, expected, memory):
                raise _damaged(folder, what)
        if added := [name for name, _ in files(folder) if name not in known and not _is_hidden(name)]:
            raise _damaged(folder, f"the file {added[0]} was added")
    except OSError as error:
        name = error.filename or folder
        raise _unreadable(name, error) or _damaged(folder, f"{name} cannot be read") from error
    return folder


def files(folder: Path) -> list[tuple[str, Path]]:
    """The files of an artifact with their relative names, without the manifest."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return [(path.relative_to(folder).as_posix(), path) for path in found]


def _difference(path: Path, name: str, expected: Mapping[str, Any], memory: HashMemory | None) -> str | None:
    """How a file differs from what the manifest says of it; None if it does not."""
    try:
        found_state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"the file {name} is missing"
    if not stat.S_ISREG(found_state.st_mode):
        return f"the file {name} is no regular file"
    if found_state.st_size != expected["bytes"]:
        return f"the file {name} has {found_state.st_size} bytes instead of {expected['bytes']}"
    found = sha256(path) if memory is None else memory.sha256(path, name)
    return None if found == expected["sha256"] else f"the contents of {name} have changed"


def _damaged(folder: Path, what: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"the stored artifact is damaged: {what}",
        where=str(folder),
        fix="Run the same command again with `--rebuild`, which builds it again",
    )


def _unreadable(name: str | Path, error: OSError) -> UserError | None:
    """The error for a file that is perhaps as it was and cannot be read; such an artifact is not removed."""
    if not disk.is_unreadable(error):
        return None
    return UserError(
        f"the file cannot be read ({disk.reason(error)})",
        where=str(name),
        fix="Change its permissions or mend the cause",
    )


def _is_manifest(found: object) -> bool:
    if not isinstance(found, dict) or not {"stage", "key", "files"} <= found.keys() <= _FIELDS:
        return False
    files = found["files"]
    return isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )


def _hash_of(manifest: Mapping[str, Any]) -> str:
    """The sha256 of a manifest's contents, without itself."""
    rest = {name: value for name, value in manifest.items() if name != _OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_hidden(name: str) -> bool:
    """Whether a file may be put there by the system or an editor (`.DS_Store`, `.nfs0001`)."""
    return any(part.startswith(".") for part in name.split("/"))
