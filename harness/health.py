"""Health of generated answers: a score does not say whether a model still writes as one (docs/statistics.md#health-of-the-answers).

Measured for every column that generates text, and judged against the untrained student, which each training starts from.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from harness.answers import Health
from harness.record import Record

FALL = 0.1
"""A share may be worse than the start's by so much."""
LENGTHS = (0.5, 2.0)
"""The mean length may be so many times the start's."""
ENDS = 0.9
"""Lengths are judged where at least this share of the start's answers ends by itself, and `GROSS` is in form."""
GROSS = 0.5
"""The least share of good answers where there is no start to compare with."""

NOTHING = "–"
_WORDS = re.compile(r"\w+|[^\w\s]")
_SIZE = 4  # words of an n-gram


def measure(texts: Sequence[str], *, ended: int | None, in_form: Sequence[bool] | None) -> Health | None:
    """The health of the answers of a column; None where it generates none.

    Args:
        texts: the answers, without their stop strings.
        ended: how many of them ended by themselves; None where the backend does not say.
        in_form: whether each is in the expected form; None where the column has none.
    """
    if not texts:
        return None
    return Health(
        answers=len(texts),
        ended=None if ended is None else ended / len(texts),
        in_form=None if in_form is None else float(np.mean(in_form)),
        characters=float(np.mean([len(text) for text in texts])),
        repeated=float(np.mean([repeated(text) for text in texts])),
    )


def repeated(text: str) -> float:
    """The share of a text's 4-grams of words that occurred in it before; 0 for a text of fewer than four words.

    A word is a run of letters and digits, or one other character that is no white space.
    """
    words = _WORDS.findall(text)
    grams = list(zip(*(words[start:] for start in range(_SIZE)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def matches(form: str, text: str) -> bool:
    """Whether a whole answer, without the white space around it, has the form of a regular expression."""
    return re.fullmatch(form, text.strip(), re.DOTALL) is not None


class Measure(NamedTuple):
    """One measure of health.

    Attributes:
        title: its column in a table.
        fault: what is said of answers that are outside the bounds, with one gap for the column.
        value: the measure; None where it is not known.
        text: the measure as text.
        bounds: the least and the greatest healthy value, given the start's health, or None for a recipe without a start.
    """

    title: str
    fault: str
    value: Callable[[Health], float | None]
    text: Callable[[float], str]
    bounds: Callable[[Health | None], tuple[float, float]]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _at_least(share: Callable[[Health], float | None]) -> Callable[[Health | None], tuple[float, float]]:
    def bounds(start: Health | None) -> tuple[float, float]:
        of_start = None if start is None else share(start)
        return GROSS if of_start is None else of_start - FALL, 1.0

    return bounds


def _repeated_bounds(start: Health | None) -> tuple[float, float]:
    return 0.0, GROSS if start is None else start.repeated + FALL


def _length_bounds(start: Health | None) -> tuple[float, float]:
    """None where the start's answers are cut off, empty, or mostly of another form: their length says nothing."""
    known = start is not None and start.ended is not None and start.ended >= ENDS and start.characters > 0
    if start is None or not known or (start.in_form is not None and start.in_form < GROSS):
        return 0.0, float("inf")
    return LENGTHS[0] * start.characters, LENGTHS[1] * start.characters


MEASURES = (
    Measure(
        "End by themselves",
        "answers do not end by themselves",
        lambda health: health.ended,
        _percent,
        _at_least(lambda health: health.ended),
    ),
    Measure(
        "In form",
        "answers are not in the expected form",
        lambda health: health.in_form,
        _percent,
        _at_least(lambda health: health.in_form),
    ),
    Measure(
        "Mean length",
        "answers have another length",
        lambda health: health.characters,
        lambda value: f"{value:.1f} characters",
        _length_bounds,
    ),
    Measure(
        "Repeated 4-grams",
        "answers repeat themselves",
        lambda health: health.repeated,
        _percent,
        _repeated_bounds,
    ),
)


def start_of(records: Sequence[Record]) -> Record | None:
    """The record of the model that all trainings start from: the untrained student; None where there is none."""
    return next((record for record in records if record.kind == "untrained student"), None)


def faults(records: Sequence[Record], start: Record | None) -> tuple[str, ...]:
    """What is wrong with the answers of one row, a clause for each measure that names the columns; empty for a healthy one.

    Each seed is judged by itself, since a mean hides a seed that has collapsed, and the worst is named. Only what was trained
    is judged: nothing was done to an untrained model that could have broken it.

    Args:
        records: those of the row, one a seed.
        start: what the trainings started from.
    """
    trained = [record for record in records if record.kind == "trained"]
    names = list(dict.fromkeys(name for record in trained for name in record.evaluation))
    found = {
        one.fault: [
            fault
            for name in names
            if (fault := _fault(name, one, healths_of(trained, name), _health(start, name))) is not None
        ]
        for one in MEASURES
    }
    return tuple(f"{fault} ({'; '.join(columns)})" for fault, columns in found.items() if columns)


def healths_of(records: Sequence[Record], column: str) -> list[Health]:
    """The health of each record's answers in a column, of those that have one."""
    return [health for record in records if (health := _health(record, column)) is not None]


def _health(record: Record | None, column: str) -> Health | None:
    result = None if record is None else record.evaluation.get(column)
    return None if result is None else result.health


def _fault(column: str, one: Measure, healths: Sequence[Health], start: Health | None) -> str | None:
    low, high = one.bounds(start)
    values = [value for health in healths if (value := one.value(health)) is not None]
    bad = [value for value in values if not low <= value <= high]
    if not bad:
        return None
    worst = max(bad, key=lambda value: max(low - value, value - high))
    of_start = None if start is None else one.value(start)
    compared = "no untrained student to compare with" if of_start is None else f"the student's {one.text(of_start)}"
    seeds = f", {len(bad)} of {len(values)} seeds, the worst is shown" if len(values) > 1 else ""
    return f"{one.text(worst)} on {column}, {compared}{seeds}"


class HealthTable(NamedTuple):
    """Header, cells as text, and notes: the health of every run's answers in every column that generates text."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...]


NOTES = (
    "Means over the seeds. End by themselves: share of the answers with a stop string or an end token before the task's "
    "limit of tokens. In form: share in the form that the suite's column expects, or that the filter of its score could "
    "read.",
    "Mean length: in characters, which compare across tokenizers; in brackets, times the untrained student's. Repeated "
    "4-grams: share of an answer's groups of four words that occurred in it before, mean over answers.",
    f"Unhealthy: a training with a seed whose share is worse than the untrained student's by more than {100 * FALL:.0f} "
    f"points, or whose mean length is outside {LENGTHS[0]} to {LENGTHS[1]:.0f} times the student's (where at least "
    f"{100 * ENDS:.0f} % of the student's answers end by themselves, and half are in form).",
)
NO_ANSWERS = "No health of answers: no column of the suite generates text, or an older version made these records."


def health_table(runs: Mapping[str, Sequence[Record]]) -> HealthTable:
    """One line for each run and column that generated text.

    Args:
        runs: the records of each run, one a seed.
    """
    every = [record for records in runs.values() for record in records]
    start = start_of(every)
    columns = list(dict.fromkeys(name for record in every for name in record.evaluation))
    rows = []
    for run, records in runs.items():
        for name in columns:
            if healths := healths_of(records, name):
                wrong = any(
                    _fault(name, one, healths, _health(start, name)) is not None
                    for one in MEASURES
                    if records[0].kind == "trained"
                )
                rows.append((run, name, *_cells(healths, _health(start, name)), "unhealthy" if wrong else NOTHING))
    header = ("", "Column", *(one.title for one in MEASURES), "Judged")
    return HealthTable(header, rows, NOTES if rows else (NO_ANSWERS,))


def _cells(healths: Sequence[Health], start: Health | None) -> list[str]:
    cells = texts(healths)
    if start is not None and start.characters:
        times = float(np.mean([health.characters for health in healths])) / start.characters
        cells[2] += f" ({times:.2f} ×)"
    return cells


def texts(healths: Sequence[Health]) -> list[str]:
    """Each measure of `MEASURES` as text, its mean over seeds; a dash where it is not known."""
    found = [[value for health in healths if (value := one.value(health)) is not None] for one in MEASURES]
    return [
        one.text(float(np.mean(values))) if values else NOTHING for one, values in zip(MEASURES, found, strict=True)
    ]
