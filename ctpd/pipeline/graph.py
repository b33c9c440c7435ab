"""Stages, their keys, and the one function that builds what is missing."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ctpd.core.config import digest, to_plain
from ctpd.core.errors import DamagedArtifact
from ctpd.core.store import Store
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.runtime import Runtime, provenance


@dataclass(frozen=True)
class Work:
    """What a builder is given: its folder, its inputs' folders, and how to run."""

    folder: Path
    inputs: Mapping[str, Path]
    store: Store
    runtime: Runtime
    progress: Callable[[int, int], None]


class Builder(Protocol):
    """Writes a stage's files into ``work.folder``."""

    def __call__(self, work: Work) -> None:
        """Build the artifact."""
        ...


@dataclass(frozen=True, eq=False)
class Stage:
    """One artifact to be: its identity and the function that builds it.

    Attributes:
        kind: the folder in the store.
        version: raised when the builder's result changes for the same configuration.
        config: the slice of the recipe that decides the result; identity.
        inputs: the stages whose artifacts the builder reads; their keys are identity too.
        external: digests of files that are no stages (a model directory, a data file); identity.
        label: for people; no identity.
    """

    kind: str
    version: int
    config: Any
    build: Builder
    label: str
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the key is made of."""
        return {
            "stage": self.kind,
            "version": self.version,
            "config": to_plain(self.config),
            "inputs": {name: stage.key for name, stage in self.inputs.items()},
            "external": dict(self.external),
        }

    @cached_property
    def key(self) -> str:
        """sha256 of the canonical identity, 32 hex digits."""
        return digest(self.identity)[:32]


@dataclass(frozen=True)
class PlanLine:
    """One line of `--plan`."""

    label: str
    kind: str
    key: str
    hit: bool


class Graph:
    """The stages that ``targets`` need, in an order in which each follows its inputs."""

    def __init__(self, targets: Sequence[Stage]) -> None:
        self.targets = tuple(targets)
        ordered: dict[str, Stage] = {}
        for target in targets:
            _visit(target, ordered)
        self.stages = tuple(ordered.values())

    def plan(self, store: Store) -> list[PlanLine]:
        """Hits and misses; runs nothing."""
        return [PlanLine(s.label, s.kind, s.key, store.has(s.kind, s.key)) for s in self.stages]

    def missing(self, store: Store) -> list[Stage]:
        """The stages that must be built for the targets: an input of a finished stage is not needed."""
        needed: dict[str, Stage] = {}
        for target in self.targets:
            _visit_missing(target, store, needed)
        return list(needed.values())

    def run(self, store: Store, *, runtime: Runtime, progress: Progress, rebuild: bool = False) -> int:
        """Build what is missing and check what is there; return the number of stages built.

        With ``rebuild``, artifacts that are found damaged are removed and built anew.

        Raises:
            DamagedArtifact: a target, or an input of a missing stage, is damaged and ``rebuild`` is off.
        """
        self._check(store, rebuild=rebuild)
        missing = self.missing(store)
        for place, stage in enumerate(missing, start=1):
            with store.lock(stage.kind, stage.key):
                if not store.has(stage.kind, stage.key):
                    with progress.stage(stage.label, place=place, total=len(missing)) as bar:
                        _build(stage, store, runtime=runtime, report=bar.update)
            gc.collect()  # models hold cycles; without this the next stage's memory stands beside the last one's
        return len(missing)

    def _check(self, store: Store, *, rebuild: bool) -> None:
        missing = {stage.key for stage in self.missing(store)}
        used = {stage.key: stage for stage in self.targets}
        for stage in self.stages:
            if stage.key in missing:
                used.update({i.key: i for i in stage.inputs.values()})
        for stage in used.values():
            if not store.has(stage.kind, stage.key):
                continue
            try:
                (store.verify if rebuild else store.open)(stage.kind, stage.key)
            except DamagedArtifact:
                if not rebuild:
                    raise
                store.remove(stage.kind, stage.key)
                self._check(store, rebuild=rebuild)  # its inputs are used now, and may be damaged too
                return


def _build(stage: Stage, store: Store, *, runtime: Runtime, report: Callable[[int, int], None]) -> None:
    inputs = {name: store.path(i.kind, i.key) for name, i in stage.inputs.items()}
    made = dict(provenance(runtime))
    with store.build(stage.kind, stage.key, identity=stage.identity, provenance=made) as folder:
        start = time.time()
        stage.build(Work(folder, inputs, store, runtime, report))
        made |= {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "seconds": round(time.time() - start, 3),
        }


def _visit(stage: Stage, ordered: dict[str, Stage]) -> None:
    if stage.key in ordered:
        return
    for source in stage.inputs.values():
        _visit(source, ordered)
    ordered.setdefault(stage.key, stage)


def _visit_missing(stage: Stage, store: Store, needed: dict[str, Stage]) -> None:
    if stage.key in needed or store.has(stage.kind, stage.key):
        return
    for source in stage.inputs.values():
        _visit_missing(source, store, needed)
    needed.setdefault(stage.key, stage)
