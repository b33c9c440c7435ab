"""What the missing stages of a plan may take: time, memory and disk, from the most similar finished stages of the store.

Similar is a stage of the same kind that reads some of the same models or data, and whose identity has the most in common with the
planned one: method, schedule, role. Trainings are scaled by their steps and pairs, evaluations by their documents, and nothing
else is. Where the store has no such stage there is no estimate: another model or other data may take a thousand times as long.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.pipeline.references import TRAINING
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.evaluate import RESULT, EvaluateStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.train.config import Schedule

_KEY = re.compile(r"(?:^|/)[0-9a-f]{32,64}$")
MOST_CANDIDATES = 64
"""Finished stages of a kind that are compared with, the newest ones: a plan takes seconds."""


class Cost(NamedTuple):
    """What a stage takes: seconds, the peak of its memory in MiB (None where it was not measured), bytes on disk."""

    seconds: float
    memory_mib: float | None
    disk: int


class Total(NamedTuple):
    """The sum of estimates: seconds one after another, the largest memory, bytes; ``unknown`` stages have none."""

    seconds: float
    memory_mib: float | None
    disk: int
    unknown: int


class Estimates:
    """Estimates from the finished stages of a store, which are read once for each kind.

    Args:
        store: where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._finished: dict[str, list[_Finished]] = {}

    def of(self, stage: Stage) -> Cost | None:
        """What a stage may take; None where the store holds none of its kind that reads what it reads."""
        if stage.kind not in self._finished:
            self._finished[stage.kind] = list(_finished(self._store, stage.kind))
        candidates = self._finished[stage.kind]
        own = frozenset(_leaves(stage.identity))
        read = _read_by(own)
        candidates = [one for one in candidates if read & _read_by(one.leaves)]
        if not candidates:
            return None
        nearest = max(candidates, key=lambda one: len(own & one.leaves))
        factor = _factor(stage, nearest)
        return Cost(nearest.seconds * factor, nearest.memory_mib, nearest.disk)


def total(costs: Sequence[Cost | None]) -> Total:
    """The sum of what is known."""
    known = [cost for cost in costs if cost is not None]
    return Total(
        seconds=sum(cost.seconds for cost in known),
        memory_mib=max((cost.memory_mib for cost in known if cost.memory_mib is not None), default=None),
        disk=sum(cost.disk for cost in known),
        unknown=len(costs) - len(known),
    )


@dataclass(frozen=True)
class _Finished:
    """A finished stage: what it is, and what it took."""

    folder: Path
    identity: Mapping[str, Any]
    seconds: float
    disk: int

    @cached_property
    def leaves(self) -> frozenset[tuple[str, str]]:
        return frozenset(_leaves(self.identity))

    @cached_property
    def training(self) -> Mapping[str, Any]:
        """The training's numbers; empty for another stage."""
        return _read(self.folder / TRAINING)

    @property
    def memory_mib(self) -> float | None:
        found = self.training.get("peak_memory_mib")
        return float(found) if isinstance(found, int | float) else None


def _finished(store: Store, kind: str) -> Iterator[_Finished]:
    """Those whose manifest says how long they took, the newest first."""
    folders = [path for path in (store.root / kind).glob("[!.]*") if path.is_dir() and not path.is_symlink()]
    folders.sort(key=lambda path: -path.stat().st_mtime)
    for folder in folders[:MOST_CANDIDATES]:
        try:
            found = store.manifest(kind, folder.name)
            seconds, identity = found["provenance"]["seconds"], found["identity"]
        except (UserError, LookupError, TypeError):
            continue
        if isinstance(seconds, int | float) and isinstance(identity, Mapping):
            disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield _Finished(folder, identity, float(seconds), disk)


def _factor(stage: Stage, nearest: _Finished) -> float:
    """How much larger a stage is than the one that is known; 1 where that cannot be told."""
    if isinstance(stage, TrainStage):
        try:
            steps = stage.planned_steps()
        except UserError:
            return 1.0
        schedule = nearest.identity["config"]["schedule"]
        before = _number(nearest.training.get("steps")) * schedule.get("pairs_per_step", Schedule().pairs_per_step)
        return steps.total * steps.per_step / before if steps is not None and before else 1.0
    if isinstance(stage, EvaluateStage):
        protocol = _read(nearest.folder / RESULT).get("protocol", {})
        done, whole = _number(protocol.get("num_docs")), _number(protocol.get("num_total"))
        limit = stage.protocol.limit
        return (whole if limit is None else min(limit, whole)) / done if done and whole else 1.0
    return 1.0


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _read_by(leaves: frozenset[tuple[str, str]]) -> set[str]:
    """The keys and digests of what a stage reads."""
    return {value for _, value in leaves if _KEY.search(value)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value with its path; equal pairs are what two stages have in common."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}.{number}")
    else:
        yield path, str(value)
