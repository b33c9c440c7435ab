"""Build the missing stages of a graph. Any number of processes may share one store."""

import contextlib
import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ctpd.core.errors import NotFinite
from ctpd.core.processes import processes
from ctpd.core.store import Store
from ctpd.pipeline.graph import FAILED, Graph, ready
from ctpd.pipeline.progress import Bar, Progress
from ctpd.pipeline.runtime import LOGS, Runtime, provenance
from ctpd.pipeline.stage import Stage, Work
from ctpd.train.loggers import LogTarget

POLL_SECONDS = 0.5  # how often a process that waits for others checks the store
FULL_COLLECTION_SECONDS = 30.0  # time between full garbage collections, which visit imported modules too
NOTHING_MISSING, ONE_EACH = -1, -2  # broadcast by rank 0 instead of the index of a stage

_last_full_collection = 0.0


def build_missing(
    graph: Graph, store: Store, *, runtime: Runtime, progress: Progress, rebuild: bool = False, renew: bool = False
) -> int:
    """Build what is missing and check what is there; return the number of stages that were missing.

    Any number of processes may do this on one store. Each stage is built by one of them; a collective stage is built by all
    processes of a launch, which must call this function with the same targets.
    With ``rebuild``, damaged artifacts are removed and built again; with ``renew``, too, those of an earlier version that
    lack what this one writes.

    Raises:
        DamagedArtifact: a target, or an input of a missing stage, is damaged and ``rebuild`` is off.
    """
    ranks = processes()
    ranks.init_process_group(runtime.torch_device())  # a device that does not exist is refused here
    if ranks.is_main:
        graph.check(store, rebuild=rebuild, renew=renew)
    ranks.barrier()
    total = len(graph.missing(store))
    ranks.barrier()
    builder = _Builder(graph, store, runtime, progress if ranks.is_main else Progress(quiet=True), total)
    try:
        if ranks.world_size == 1:
            builder.run()
        else:
            builder.run_collectively()
    finally:
        gc.unfreeze()
    return total


def build_what_can_be(
    graph: Graph, store: Store, *, runtime: Runtime, progress: Progress
) -> list[tuple[Stage, Exception]]:
    """As `build_missing` in one process, but a stage that fails stops only those that read it; returns these failures."""
    failures: list[tuple[Stage, Exception]] = []
    builder = _Builder(graph, store, runtime, progress, len(graph.missing(store)), failures=failures)
    try:
        builder.run()
    finally:
        gc.unfreeze()
    return failures


@dataclass(frozen=True)
class _Builder:
    """One process that builds a graph's missing stages."""

    graph: Graph
    store: Store
    runtime: Runtime
    progress: Progress
    total: int
    announced: set[str] = field(default_factory=set)  # keys of stages that another process builds
    failures: list[tuple[Stage, Exception]] | None = None  # None: the first one is raised

    def run(self) -> None:
        """Build one by one what no other process is building, until nothing is missing."""
        while missing := self._left():
            candidates = ready(missing)
            if not self._build_one(candidates):
                self._pause(candidates)

    def _left(self) -> list[Stage]:
        """What is missing, without the stages that failed and those that read them."""
        lost, left = {stage.key for stage, _ in self.failures or ()}, []
        for stage in self.graph.missing(self.store):  # each after its inputs
            if stage.key in lost or any(source.key in lost for source in stage.inputs.values()):
                lost.add(stage.key)
            else:
                left.append(stage)
        return left

    def run_collectively(self) -> None:
        """Build with all processes of a launch: collective stages first, then one other stage per process at a time."""
        ranks = processes()
        index = ONE_EACH
        while index != NOTHING_MISSING:
            with contextlib.ExitStack() as locks:
                index = ranks.broadcast(self._choice(locks) if ranks.is_main else 0)
                if index >= 0:
                    self._build_collective(self.graph.stages[index])
            if index == ONE_EACH:
                self._build_one_each()
            _collect_garbage()

    def _choice(self, locks: contextlib.ExitStack) -> int:
        """The index of a collective stage to build, with its lock held; else ONE_EACH or NOTHING_MISSING."""
        missing = self.graph.missing(self.store)
        for stage in ready(missing):
            if not stage.collective or not locks.enter_context(self.store.try_lock(stage.kind, stage.key)):
                continue
            if not self.store.has(stage.kind, stage.key):
                return [known.key for known in self.graph.stages].index(stage.key)
        return ONE_EACH if missing else NOTHING_MISSING

    def _build_collective(self, stage: Stage) -> None:
        remarks: list[str] = []
        try:
            self._build_together(stage, remarks)
        except NotFinite as error:  # every rank raises it, or none
            if stage.key not in self.graph.attempts:
                raise
            if processes().is_main:
                self._fail(stage, error)
        self._show(stage, remarks)
        processes().barrier()  # the artifact, or the note of its failure, is complete now

    def _build_together(self, stage: Stage, remarks: list[str]) -> None:
        ranks = processes()
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(self._bar(stage))
            if ranks.is_main:
                stack.enter_context(_artifact(stage, self.store, self.runtime))
            work = self._work(stage, bar, remarks, writes=ranks.is_main)
            ranks.barrier()  # the folder exists now, and the inputs are checked
            stage.unlabelled().build(work)
            ranks.barrier()  # the other ranks may still be writing or computing

    def _build_one_each(self) -> None:
        """A round in which each process builds what it can lock of the stages that are ready now."""
        candidates = ready(self.graph.missing(self.store))
        single = [stage for stage in candidates if not stage.collective]
        built = 0
        while self._build_one(single):
            built += 1
        if processes().is_main and not built:
            self._pause(candidates)
        processes().barrier()

    def _build_one(self, candidates: Sequence[Stage]) -> bool:
        """Build the first stage that is neither finished nor locked; returns whether there was one."""
        for stage in candidates:
            with self.store.try_lock(stage.kind, stage.key) as locked:
                if not locked or self.store.has(stage.kind, stage.key):
                    continue
                remarks: list[str] = []
                try:
                    with self._bar(stage) as bar, _artifact(stage, self.store, self.runtime):
                        stage.unlabelled().build(self._work(stage, bar, remarks))
                except Exception as error:
                    if isinstance(error, NotFinite) and stage.key in self.graph.attempts:
                        self._fail(stage, error)
                    elif self.failures is not None:
                        self.failures.append((stage, error))
                    else:
                        raise
                self._show(stage, remarks)
            _collect_garbage()
            return True
        return False

    def _fail(self, stage: Stage, error: NotFinite) -> None:
        """Note that a trial cannot be trained or evaluated; the search goes on without it. Hold the lock of the stage."""
        details = {"label": f"failed: {stage.label}", **provenance(self.runtime)}
        with self.store.lock(FAILED, stage.key):
            if not self.store.has(FAILED, stage.key):
                with self.store.build(FAILED, stage.key, identity=stage.identity, provenance=details) as folder:
                    (folder / "failure.json").write_text(json.dumps({"error": error.what}) + "\n", encoding="utf-8")
        self.store.remove(stage.kind, stage.key)  # what is left of the build
        self.progress.note(f"Note: {stage.label}: {error.what}. The trial counts as the worst.")

    def _bar(self, stage: Stage) -> contextlib.AbstractContextManager[Bar]:
        done = self.total - len(self.graph.missing(self.store))
        return self.progress.stage(stage.label, index=done + 1, total=self.total)

    def _show(self, stage: Stage, remarks: Sequence[str]) -> None:
        for text in remarks:
            self.progress.note(f"Note: {stage.label}: {text}.")

    def _work(self, stage: Stage, bar: Bar, remarks: list[str], *, writes: bool = True) -> Work:
        """The arguments of a build; the process that writes checks the inputs now, right before they are read."""
        find = self.store.open if writes else self.store.path
        present = [source for source in stage.inputs.values() if not self.graph.failed(source, self.store)]
        folders = {source.key: find(source.kind, source.key) for source in present}
        folder = self.store.partial(stage.kind, stage.key)
        runtime = self.runtime
        target = LogTarget(
            folder=runtime.log_dir or self.store.root / LOGS, project=runtime.project, run=stage.label, key=stage.key
        )
        return Work(
            folder, runtime, bar.update, writes, folders, self.progress.note, remarks.append, target, bar.detail
        )

    def _pause(self, candidates: Sequence[Stage]) -> None:
        """Sleep while other processes build these stages; report once which stage is waited for."""
        waiting = [stage for stage in candidates if not self.store.has(stage.kind, stage.key)]
        if waiting and not self.announced & {stage.key for stage in waiting}:
            self.progress.note(f"Another process builds: {waiting[0].label}")
            self.announced.add(waiting[0].key)
        time.sleep(POLL_SECONDS)


def _collect_garbage() -> None:
    """Collect garbage between stages: models hold reference cycles, and their memory would be freed late.

    Surviving objects, mostly imported modules, are frozen, and collected again only every FULL_COLLECTION_SECONDS: a full
    collection takes longer than small stages.
    """
    global _last_full_collection
    if time.monotonic() - _last_full_collection > FULL_COLLECTION_SECONDS:
        gc.unfreeze()
        _last_full_collection = time.monotonic()
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _artifact(stage: Stage, store: Store, runtime: Runtime) -> Iterator[None]:
    """Prepare a stage's folder; finish the artifact when the block ends without an error."""
    details = {"label": stage.label, **provenance(runtime)}
    with store.build(stage.kind, stage.key, identity=stage.identity, provenance=details):
        start = time.time()
        yield
        details |= {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "seconds": round(time.time() - start, 3),
        }
