"""Which frozen models an objective reads, for the record: stored passes over the pairs, or models in memory."""

from ctpd.objectives.base import Objective
from ctpd.ops.weights import Signal, find_strategy
from harness.record import FrozenModel, StoredSignal

FROZEN = {
    Signal.TEACHER_REFERENCE: FrozenModel(role="teacher", model="SFT"),
    Signal.TEACHER_POSITIVE: FrozenModel(role="teacher", model="positive"),
    Signal.TEACHER_NEGATIVE: FrozenModel(role="teacher", model="negative"),
    Signal.STUDENT_POSITIVE: FrozenModel(role="student", model="positive"),
    Signal.STUDENT_NEGATIVE: FrozenModel(role="student", model="negative"),
}
"""Whose pass each signal is; the data's marks need none."""


def stored_signals(objective: Objective) -> tuple[StoredSignal, ...]:
    """The stored passes over the pairs that a run reads: log-probabilities, distributions, and generated responses."""
    found = set()
    layout, view = objective.layout, objective.teacher
    if layout.reference is not None:
        found.add(StoredSignal(role=layout.reference, model="SFT", kept="log probabilities"))
    if layout.weighting is not None:
        needs = find_strategy(layout.weighting.strategy).needs - {Signal.MARKS}
        found |= {StoredSignal(**dict(FROZEN[need]), kept="log probabilities") for need in needs}
    if view is not None and view.is_stored:
        found |= {StoredSignal(**dict(FROZEN[signal]), kept="distributions") for signal in view.models}
    if objective.generation is not None:
        found.add(StoredSignal(role=objective.generation.writer, model="SFT", kept="responses"))
    return tuple(sorted(found, key=lambda signal: (signal.role, signal.model, signal.kept)))


def models_in_memory(objective: Objective) -> tuple[FrozenModel, ...]:
    """The frozen models that are in memory while the student trains."""
    view = objective.teacher
    return () if view is None or view.is_stored else tuple(FROZEN[signal] for signal in view.models)
