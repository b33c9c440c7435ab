"""The files that a task of the user's own reads: definitions, python modules and local data. Read without lm-eval.

A task that comes with lm-eval or with this project is known by lm-eval's version and its own; what a suite's `folder`
defines is known by its files alone, so their digest is part of a result's identity.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness import task_yaml
from harness.suites import Column

_SKIPPED = ("__pycache__",)
_DATA_KEYS = frozenset({"dataset_path", "data_files", "data_dir"})


class TaskFile(NamedTuple):
    """A file, named by its path in the task's folder, or by the reference that leads to it from there."""

    name: str
    path: Path


@dataclass(frozen=True)
class TaskFiles:
    """What a task of the user's own reads.

    Attributes:
        definition: YAML files and what python functions in them may read: their modules, and the files beside the YAML.
        data: the files of local data sets.
    """

    definition: tuple[TaskFile, ...] = ()
    data: tuple[TaskFile, ...] = ()

    @property
    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and time of each file."""
        paths = [file.path for file in (*self.definition, *self.data)]
        return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)

    @property
    def digest(self) -> str | None:
        """sha256 over names and contents; None without files."""
        files = sorted({*self.definition, *self.data})
        if not files:
            return None
        total = hashlib.sha256()
        for name, path in files:
            total.update(f"{name}\0{_file_digest(*_stat(path))}\0".encode())
        return total.hexdigest()


def is_own(column: Column) -> bool:
    """Whether a column's task is defined in a folder of the user's, beside the suite's file."""
    return column.folder is not None and Path(column.folder).is_absolute()


def task_files(column: Column, *, base: Path | None, mirrored: bool = False) -> TaskFiles:
    """The files that the task of a column reads and that nothing else stands for.

    Of a task that comes with lm-eval or with this project these are the data sets that lie in the working directory
    under their names on the hub: the library reads them instead of the hub's.

    Args:
        column: the column.
        base: where relative paths of data sets begin: the data root, else the working directory; None leaves them out.
        mirrored: whether ``base`` is a mirror of the hub, whose folders of the column's data sets are known otherwise.
    """
    if not is_own(column):
        named = () if mirrored or base is None else column.datasets
        return TaskFiles(data=tuple(sorted({file for name in named for file in _data_files(name, base)})))
    assert column.folder is not None
    folder = Path(column.folder)
    found = _Found(folder)
    found.add(column.task, _definitions(folder))
    data = {file for reference in found.references for file in _data_files(reference, base)}
    return TaskFiles(tuple(sorted(found.files)), tuple(sorted(data)))


@dataclass(frozen=True)
class _Definition:
    """A YAML file: its contents with those of the files that it includes, and all of these files with their contents."""

    config: Mapping[str, Any]
    files: Mapping[TaskFile, Mapping[str, Any]]


@dataclass
class _Found:
    """What is found from one task on: the files of definitions, and references to data."""

    folder: Path
    files: set[TaskFile] = field(default_factory=set)
    references: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, definitions: list[_Definition]) -> None:
        """Add what the task, group or tag ``name`` reads, and the members of it."""
        if name in self.seen:
            return
        self.seen.add(name)
        for definition in definitions:
            if name not in _names(definition.config):
                continue
            self.references |= set(_references(definition.config))
            for file, config in definition.files.items():
                self.files.add(file)
                self.files |= set(_python_files(file.path, config, folder=self.folder))
            for member in task_yaml.members(definition.config):
                self.add(member, definitions)


def _definitions(folder: Path) -> list[_Definition]:
    """Every YAML file of a folder that is a definition; lm-eval skips the others, too."""
    found = []
    for path in sorted(folder.glob("**/*.yaml")):
        if not _is_skipped(path.relative_to(folder)):
            try:
                found.append(_definition(TaskFile(str(path.relative_to(folder)), path), seen=frozenset()))
            except (OSError, ValueError, yaml.YAMLError):
                continue
    return found


def _definition(file: TaskFile, *, seen: frozenset[Path]) -> _Definition:
    own = _parsed(*_stat(file.path))
    if not isinstance(own, dict) or file.path in seen:
        raise ValueError(f"{file.path} is no definition of a task")
    config: dict[str, Any] = {}
    files: dict[TaskFile, Mapping[str, Any]] = {file: own}
    for reference in task_yaml.included(own):
        name = str(Path(file.name).parent / reference)
        other = _definition(TaskFile(name, (file.path.parent / reference).resolve()), seen=seen | {file.path})
        config |= other.config
        files |= other.files
    return _Definition(config | own, files)


def _names(config: Mapping[str, Any]) -> set[str]:
    """The names under which lm-eval knows a definition: its group or task, and its tags."""
    own = config.get("group") or config.get("task")
    tags = config.get("tag") or []
    return {str(own), *([tags] if isinstance(tags, str) else tags)}


def _references(config: Mapping[str, Any]) -> Iterator[str]:
    """What may be paths of local data: data sets, their files and folders."""
    found = task_yaml.leaves(config)
    return (value for keys, value in found if isinstance(value, str) and not _DATA_KEYS.isdisjoint(keys))


def _python_files(path: Path, config: Mapping[str, Any], *, folder: Path) -> Iterator[TaskFile]:
    """The modules of a YAML file's functions, and the files beside them, which a function can read."""
    functions = [value for _, value in task_yaml.leaves(config) if isinstance(value, task_yaml.Tagged)]
    for function in functions:
        module = path.parent / (function.rpartition(".")[0].replace(".", "/") + ".py")
        for beside in {path.parent, module.parent}:
            for file in beside.iterdir() if beside.is_dir() else ():
                if file.is_file() and not file.name.startswith("."):
                    yield TaskFile(_name_in(file, folder), file)


def _name_in(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _data_files(reference: str, base: Path | None) -> Iterator[TaskFile]:
    """The local files that a reference names: a file, all files of a folder, or those that a pattern matches."""
    if "://" in reference or not reference or (base is None and not Path(reference).is_absolute()):
        return
    target = Path(reference) if base is None else base / reference
    if target.is_file():
        yield TaskFile(reference, target)
    elif target.is_dir():
        for path in sorted(target.rglob("*")):
            if path.is_file() and not _is_skipped(path.relative_to(target)):
                yield TaskFile(f"{reference}/{path.relative_to(target)}", path)
    elif any(character in reference for character in "*?["):
        anchor = Path(target.anchor)
        for path in sorted(anchor.glob(str(target.relative_to(anchor)))):
            if path.is_file():
                yield TaskFile(f"{reference}/{path.name}", path)


def _is_skipped(path: Path) -> bool:
    return any(part.startswith(".") or part in _SKIPPED for part in path.parts)


def _stat(path: Path) -> tuple[Path, int, int]:
    found = path.stat()
    return path, found.st_size, found.st_mtime_ns


@cache
def _parsed(path: Path, size: int, changed: int) -> Any:
    """The contents of a YAML file in this state: a plan asks for the same files many times."""
    return task_yaml.parse(path.read_text(encoding="utf-8"))


@cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """sha256 of a file in this state."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
