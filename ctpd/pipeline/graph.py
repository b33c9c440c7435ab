"""The graph of the stages that some targets need: which are in the store, and which are missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from ctpd.core.errors import DamagedArtifact
from ctpd.core.store import Store
from ctpd.pipeline.estimates import Cost, Estimates
from ctpd.pipeline.stage import Stage

FAILED = "failed"
"""Kind of the artifact that stands for a stage of a trial whose numbers were not finite; its key is the stage's."""


@dataclass(frozen=True)
class PlanLine:
    """One line of `--plan`. The key is None where the trials of a run are still to choose its values."""

    label: str
    kind: str
    key: str | None
    hit: bool
    failed: bool = False
    cost: Cost | None = None
    """What a missing stage may take; None for a hit, and where nothing of its kind was built before."""


class Graph:
    """The stages that ``targets`` need, in an order in which each follows its inputs."""

    def __init__(self, targets: Sequence[Stage]) -> None:
        self.targets = tuple(targets)
        ordered: dict[str, Stage] = {}
        for target in targets:
            _visit(target, ordered)
        self.stages = tuple(ordered.values())
        self.attempts = {attempt.key for stage in self.stages for attempt in stage.attempts()}
        """Keys of the stages that may fail: only trials read them."""

    def plan(self, store: Store) -> list[PlanLine]:
        """Which stages are in the store, and what the others may take; builds nothing."""
        lines, estimates = [], Estimates(store)
        for stage in self.stages:
            hit, failed = store.has(stage.kind, stage.key), self.failed(stage, store)
            cost = None if hit or failed else estimates.of(stage)
            lines.append(PlanLine(stage.label, stage.kind, stage.key, hit or failed, failed, cost))
        return lines

    def failed(self, stage: Stage, store: Store) -> bool:
        """Whether this is a stage of a trial, and its numbers, or those of a stage that it reads, were not finite."""
        if stage.key not in self.attempts or store.has(stage.kind, stage.key):
            return False
        return store.has(FAILED, stage.key) or any(self.failed(source, store) for source in stage.inputs.values())

    def missing(self, store: Store) -> list[Stage]:
        """The stages that must be built: those that the targets need, and those whose damaged artifact `check` removed.

        An input of a finished stage is not needed.
        """
        needed: dict[str, Stage] = {}
        removed = [stage for stage in self.stages if store.is_removed(stage.kind, stage.key)]
        for stage in (*self.targets, *removed):
            self._visit_missing(stage, store, needed)
        return list(needed.values())

    def _visit_missing(self, stage: Stage, store: Store, needed: dict[str, Stage]) -> None:
        if stage.key in needed or store.has(stage.kind, stage.key) or self.failed(stage, store):
            return
        for source in stage.inputs.values():
            self._visit_missing(source, store, needed)
        needed.setdefault(stage.key, stage)

    def check(self, store: Store, *, rebuild: bool = False, renew: bool = False) -> None:
        """Compare the artifacts that a build would read with their manifests.

        With ``rebuild`` compare all artifacts of the graph, byte for byte, and remove damaged ones: they are `missing`
        then; with ``renew``, too, those of an earlier version that lack what this one writes (`Stage.is_whole`).

        Raises:
            DamagedArtifact: an artifact is damaged and ``rebuild`` is off.
        """
        if rebuild:
            for stage in self.stages:
                if store.has(stage.kind, stage.key):
                    _remove_damaged(stage, store, renew=renew)
            return
        used = {stage.key: stage for stage in self.targets}
        for stage in self.missing(store):
            used.update({i.key: i for i in stage.inputs.values()})
        for stage in used.values():
            if store.has(stage.kind, stage.key):
                store.open(stage.kind, stage.key)


def ready(missing: Sequence[Stage]) -> list[Stage]:
    """Those of the missing stages whose inputs are all in the store."""
    keys = {stage.key for stage in missing}
    return [stage for stage in missing if not any(source.key in keys for source in stage.inputs.values())]


def _remove_damaged(stage: Stage, store: Store, *, renew: bool) -> None:
    with store.lock(stage.kind, stage.key):  # another process may be rebuilding it
        try:
            store.verify(stage.kind, stage.key)
        except DamagedArtifact:
            store.remove(stage.kind, stage.key, rebuild=True)
            return
        if renew and not stage.is_whole(store.path(stage.kind, stage.key)):
            store.remove(stage.kind, stage.key, rebuild=True)


def _visit(stage: Stage, ordered: dict[str, Stage]) -> None:
    if stage.key in ordered:
        return
    for source in stage.inputs.values():
        _visit(source, ordered)
    ordered.setdefault(stage.key, stage)
