"""Stages, their keys, and the one function that builds what is missing."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ctpd.core.config import digest, to_plain
from ctpd.core.errors import DamagedArtifact
from ctpd.core.processes import processes
from ctpd.core.store import Store
from ctpd.pipeline.progress import Bar, Progress
from ctpd.pipeline.runtime import Runtime, provenance

POLL_SECONDS = 0.5  # how often a process that waits for others looks again
LOOK_AT_ALL_SECONDS = 30.0  # how often everything is looked at for cycles that nobody uses any more
NOTHING_LEFT, APART = -1, -2  # said by a launch's first process in place of the number of a stage

_looked_at_all = 0.0


@dataclass(frozen=True)
class Work:
    """What a builder is given: its folder, its inputs' folders, and how to run.

    `writes` is off in all but one of the processes that build a stage together: they compute and leave no file.
    """

    folder: Path
    inputs: Mapping[str, Path]
    store: Store
    runtime: Runtime
    progress: Callable[[int, int], None]
    writes: bool = True


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
        together: all processes of a launch run the builder at once, and share its work among them; no identity.
    """

    kind: str
    version: int
    config: Any
    build: Builder
    label: str
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)
    together: bool = False

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
        """Build what is missing and check what is there; return the number of stages that were missing.

        Any number of processes may do this on one store: each stage is built by one of them, or by all processes of a
        launch together, which must call this with the same targets.
        With ``rebuild``, artifacts that are found damaged are removed and built anew.

        Raises:
            DamagedArtifact: a target, or an input of a missing stage, is damaged and ``rebuild`` is off.
        """
        ranks = processes()
        ranks.init_process_group(runtime.torch_device() if ranks.world_size > 1 else "cpu")
        if ranks.is_main:
            self.check(store, rebuild=rebuild)
        ranks.barrier()
        total = len(self.missing(store))
        ranks.barrier()
        work = _Building(self, store, runtime, progress if ranks.is_main else Progress(quiet=True), total)
        try:
            if ranks.world_size == 1:
                work.alone()
            else:
                work.side_by_side()
        finally:
            gc.unfreeze()
        return total

    def check(self, store: Store, *, rebuild: bool = False) -> None:
        """Compare what a run would read with its manifests; with ``rebuild`` remove what is damaged.

        Raises:
            DamagedArtifact: an artifact is damaged and ``rebuild`` is off.
        """
        missing = {stage.key for stage in self.missing(store)}
        used = {stage.key: stage for stage in self.targets}
        for stage in self.stages:
            if stage.key in missing:
                used.update({i.key: i for i in stage.inputs.values()})
        for stage in used.values():
            if not store.has(stage.kind, stage.key):
                continue
            if not rebuild:
                store.open(stage.kind, stage.key)
            elif _remove_damaged(stage, store):
                self.check(store, rebuild=True)  # its inputs are used now, and may be damaged too
                return


@dataclass(frozen=True)
class _Building:
    """One process that builds a graph's missing stages, beside any number of others on the same store."""

    graph: Graph
    store: Store
    runtime: Runtime
    progress: Progress
    total: int
    told: set[str] = field(default_factory=set)

    def alone(self) -> None:
        """Build one by one what nobody else is building, until nothing is missing."""
        while pending := self.graph.missing(self.store):
            ready = _ready(pending)
            if not self._build_one(ready):
                self._pause(ready)

    def side_by_side(self) -> None:
        """The same by all processes of a launch: a stage that is built together comes first, the others are dealt."""
        ranks = processes()
        number = APART
        while number != NOTHING_LEFT:
            with contextlib.ExitStack() as held:
                number = ranks.broadcast(self._choice(held) if ranks.is_main else 0)
                if number >= 0:
                    self._build_together(self.graph.stages[number])
            if number == APART:
                self._build_apart()
            _forget()

    def _choice(self, held: contextlib.ExitStack) -> int:
        """The number of a stage to be built together, whose lock ``held`` gets, or what there is to do instead."""
        pending = self.graph.missing(self.store)
        for stage in _ready(pending):
            if not stage.together or not held.enter_context(self.store.try_lock(stage.kind, stage.key)):
                continue
            if not self.store.has(stage.kind, stage.key):
                return [known.key for known in self.graph.stages].index(stage.key)
        return APART if pending else NOTHING_LEFT

    def _build_together(self, stage: Stage) -> None:
        ranks = processes()
        with contextlib.ExitStack() as open_:
            bar = open_.enter_context(self._bar(stage))
            if ranks.is_main:
                open_.enter_context(_artifact(stage, self.store, self.runtime))
            ranks.barrier()  # the folder is there
            stage.build(self._work(stage, bar, writes=ranks.is_main))
            ranks.barrier()  # the first process may finish before another
        ranks.barrier()  # the artifact is there

    def _build_apart(self) -> None:
        """A round in which each process builds what it gets of the stages that are ready now."""
        ready = _ready(self.graph.missing(self.store))
        single = [stage for stage in ready if not stage.together]
        built = 0
        while self._build_one(single):
            built += 1
        if processes().is_main and not built:
            self._pause(ready)
        processes().barrier()

    def _build_one(self, ready: Sequence[Stage]) -> bool:
        """Build the first stage that is neither there nor locked; says whether there was one."""
        for stage in ready:
            with self.store.try_lock(stage.kind, stage.key) as free:
                if not free or self.store.has(stage.kind, stage.key):
                    continue
                with self._bar(stage) as bar, _artifact(stage, self.store, self.runtime):
                    stage.build(self._work(stage, bar))
            _forget()
            return True
        return False

    def _bar(self, stage: Stage) -> contextlib.AbstractContextManager[Bar]:
        done = self.total - len(self.graph.missing(self.store))
        return self.progress.stage(stage.label, index=done + 1, total=self.total)

    def _work(self, stage: Stage, bar: Bar, *, writes: bool = True) -> Work:
        inputs = {name: self.store.path(i.kind, i.key) for name, i in stage.inputs.items()}
        folder = self.store.partial(stage.kind, stage.key)
        return Work(folder, inputs, self.store, self.runtime, bar.update, writes)

    def _pause(self, ready: Sequence[Stage]) -> None:
        """Give the processes that build these a little time; say once what is waited for."""
        waiting = [stage for stage in ready if not self.store.has(stage.kind, stage.key)]
        if waiting and not self.told & {stage.key for stage in waiting}:
            self.progress.note(f"Another process builds: {waiting[0].label}")
            self.told.add(waiting[0].key)
        time.sleep(POLL_SECONDS)


def _forget() -> None:
    """Free what a stage leaves: models hold cycles, and without this the next stage's memory stands beside the last's.

    What is still in use, mostly imported modules, is not looked at again for a while: that would take longer than small
    stages.
    """
    global _looked_at_all
    if time.monotonic() - _looked_at_all > LOOK_AT_ALL_SECONDS:
        gc.unfreeze()
        _looked_at_all = time.monotonic()
    gc.collect()
    gc.freeze()


def _ready(pending: Sequence[Stage]) -> list[Stage]:
    """The stages whose inputs are all there."""
    keys = {stage.key for stage in pending}
    return [stage for stage in pending if not any(source.key in keys for source in stage.inputs.values())]


def _remove_damaged(stage: Stage, store: Store) -> bool:
    """Compare an artifact byte for byte and remove it if it is damaged; says whether it was."""
    with store.lock(stage.kind, stage.key):  # another process may be mending it
        try:
            store.verify(stage.kind, stage.key)
        except DamagedArtifact:
            store.remove(stage.kind, stage.key)
            return True
    return False


@contextlib.contextmanager
def _artifact(stage: Stage, store: Store, runtime: Runtime) -> Iterator[None]:
    """Prepare a stage's folder; finish the artifact when the block ends without an error."""
    made = dict(provenance(runtime))
    with store.build(stage.kind, stage.key, identity=stage.identity, provenance=made):
        start = time.time()
        yield
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
