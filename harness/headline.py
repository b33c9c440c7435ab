"""The main result in a few sentences, from the numbers alone, with what the design of the comparison does not support."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.formats import p_text, percent_interval
from harness.meanings import DISTILLATION, FAMILIES, PREFERENCE, PREFERENCE_DISTILLATION, meaning
from harness.record import Record
from harness.sheet import AVERAGE, Row, Table
from harness.statistics import Interval

SPACE = "\N{NO-BREAK SPACE}"
COMPARED = (PREFERENCE, PREFERENCE_DISTILLATION, DISTILLATION)
"""Families that a reader expects in a comparison of preference distillation; those that are absent are named."""
MOST_NAMES = 4


class Headline(NamedTuple):
    """The result, and what limits it: sentences."""

    result: list[str]
    limits: list[str]


def headline(table: Table, runs: Mapping[str, Sequence[Record]]) -> Headline:
    """What the main table shows, and how far that goes.

    Args:
        table: the finished table.
        runs: the records of each run.
    """
    limits = [*_untested(table), *_seeds(table), *_families(table, runs), *_below_start(table), *_unhealthy(table)]
    if any(row.missing or row.missing_seeds for row in table.rows):
        limits.append("Some runs are missing: see below the table.")
    return Headline([*_partial(table), *_best(table)], limits)


def _partial(table: Table) -> Iterator[str]:
    if table.partial:
        yield "Evaluated on a part of the documents only."


def _best(table: Table) -> Iterator[str]:
    best = _ranked(table, 1)
    if not best:
        return
    yield f"Best {AVERAGE}: {_names(best)}, {_percent(best[0])}."
    first = best[0]
    if first.difference is not None:
        yield f"{_difference(first, table.base_label or '')}."
        if not _is_clear(first.difference):
            yield "That is no clear difference: the interval holds zero."


def _untested(table: Table) -> Iterator[str]:
    best, second = _ranked(table, 1), _ranked(table, 2)
    if best and second and second[0].run != table.spec.base and table.base_label is not None:
        yield (
            f"Only differences to {table.base_label} are tested, and not whether {_names(best)} is better than "
            f"{_names(second)} ({_percent(second[0])})."
        )


def _seeds(table: Table) -> Iterator[str]:
    seeds = sorted({seed for row in table.rows for seed in row.seeds if seed is not None})
    if len(seeds) == 1:
        yield f"One training seed ({seeds[0]}): this compares the models as trained; another seed could order them otherwise."
        return
    if len(seeds) > 1:
        yield f"Means over {len(seeds)} training seeds."


def _families(table: Table, runs: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    found: dict[str, list[Row]] = {}
    for row in table.rows:
        family = meaning(runs[row.run][0]).family if row.run in runs else None
        if family is not None:
            found.setdefault(family, []).append(row)
    if not found:
        return
    yield f"Trained rows: {'; '.join(f'{name} ({_names(rows)})' for name, rows in found.items())}."
    absent = [name for name in COMPARED if name not in found]
    if absent:
        told = " and ".join(f"{name} ({FAMILIES[name]})" for name in absent)
        yield f"Not compared here: {told}."


def _below_start(table: Table) -> Iterator[str]:
    """Rows whose Average lies below that of the untrained student."""
    below = [row for row in table.rows if row.start is not None and row.start.is_below]
    if below:
        yield f"Below the model that they started from: {_all_names(below)}."


def _unhealthy(table: Table) -> Iterator[str]:
    unhealthy = [row for row in table.rows if row.faults]
    if unhealthy:
        yield f"Unhealthy answers: {_all_names(unhealthy)}, see below the table."


def _ranked(table: Table, rank: int) -> list[Row]:
    return [row for row in table.rows if (cell := row.cells[-1]) is not None and cell.rank == rank]


def _average(row: Row) -> float | None:
    return None if row.cells[-1] is None else row.cells[-1].mean


def _percent(row: Row) -> str:
    average = _average(row)
    assert average is not None
    return f"{100 * average:.2f}{SPACE}%"


def _names(rows: Sequence[Row]) -> str:
    """Labels in a sentence; of many the first ones and how many more there are."""
    labels = [row.label for row in rows]
    if len(labels) > MOST_NAMES:
        return f"{', '.join(labels[: MOST_NAMES - 1])} and {len(labels) - MOST_NAMES + 1} more"
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _all_names(rows: Sequence[Row]) -> str:
    return ", ".join(row.label for row in rows)


def _difference(row: Row, base: str) -> str:
    text = f"Difference to {base}: {percent_interval(row.difference)} points (95{SPACE}%)"
    if row.has_one_training:
        return f"{text}, of one seed: another training could move it further"
    p_value = _equals(p_text(row.p_value, is_bound=row.p_is_bound))
    return f"{text}, p{SPACE}{p_value} after Holm's correction"


def _is_clear(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0


def _equals(text: str) -> str:
    return text if text.startswith(("<", "≤")) else f"={SPACE}{text}"
