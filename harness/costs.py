"""What each run cost, as far as its records say: time, memory, parameters, passes of other models over the pairs."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ctpd.core.roles import Role
from harness.record import Record, TrainingSummary

NOTHING = "–"
STATES = 3 * 4
"""Bytes that a trained parameter needs beside its weight: its gradient and AdamW's two moments, in float32."""


class CostTable(NamedTuple):
    """Header and cells, as text; ``notes`` say what the columns mean."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...]


def cost_table(runs: Mapping[str, Sequence[Record]]) -> CostTable:
    """One line a run: means over its seeds; a dash where no record says anything.

    Args:
        runs: the records of each run, one a seed.
    """
    return CostTable(HEADER, [_line(run, records) for run, records in runs.items()], NOTES)


HEADER = (
    "",
    "Seeds",
    "Training",
    "Peak memory",
    "Model's own",
    "Parameters",
    "Trained",
    "Steps",
    "Teacher passes",
    "Student passes",
    "Teacher in memory",
    "Evaluation",
)

NOTES = (
    "Means over the seeds. Training: the run's own, without what all runs share (pretraining, SFT, contrastive models).",
    "Peak memory during the training: of the GPU; on a CPU, of the whole process with all its libraries. Model's own: the part of it "
    "that weights, gradients and the optimizer's two moments take, computed from the numbers of parameters (float32).",
    "Passes: of a frozen model over all pairs before the training, made once, stored, and shared by all runs that read them.",
    "Teacher in memory: it reads every batch while the student trains; its memory and time are the run's.",
)


def _line(run: str, records: Sequence[Record]) -> tuple[str, ...]:
    trainings = [record.training for record in records if record.training is not None]
    seeds = [record.seed for record in records if record.seed is not None]

    def mean(cost: Callable[[TrainingSummary], float | None], form: Callable[[float], str]) -> str:
        found = [value for training in trainings if (value := cost(training)) is not None]
        return form(float(np.mean(found))) if found else NOTHING

    evaluation = [sum(result.seconds for result in record.evaluation.values()) for record in records]
    return (
        run,
        str(len(seeds)) if seeds else NOTHING,
        mean(lambda training: training.seconds, duration),
        mean(lambda training: training.peak_memory_mib, mebibytes),
        mean(lambda training: _own(training, records[0]), mebibytes),
        mean(lambda training: training.parameters, count),
        mean(lambda training: training.trainable_parameters, count),
        mean(lambda training: training.steps, count),
        _passes(records[0], "teacher"),
        _passes(records[0], "student"),
        "yes" if records[0].in_memory else "no",
        duration(float(np.mean(evaluation))),
    )


def _own(training: TrainingSummary, record: Record) -> float:
    """MiB of the weights as measured, and of gradients and AdamW's moments of all trained parameters, in one process."""
    trained = training.trainable_parameters + training.objective_parameters
    made = record.provenance
    shards = made.processes if made.runtime.fsdp is not None else 1
    return training.weights_mib + STATES * trained / shards / 2**20


def _passes(record: Record, role: Role) -> str:
    """How many stored passes of a role's models a run needed."""
    return str(sum(signal.role == role for signal in record.signals))


def duration(seconds: float) -> str:
    """A time in the two units that matter: ``7.5 s``, ``5 min 41 s``, ``2 h 3 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def mebibytes(value: float) -> str:
    """Memory in MiB, or in GiB from 10,000 MiB on."""
    return f"{value / 1024:,.1f} GiB" if value >= 10_000 else f"{value:,.0f} MiB" if value >= 10 else f"{value:.1f} MiB"


def count(value: float) -> str:
    """A number of things, in thousands with commas, from ten million on in millions."""
    return f"{value / 1e6:,.1f} M" if value >= 1e7 else f"{value:,.0f}"
