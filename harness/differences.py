"""What compares the rows of a table: differences to its base, to the model that they started from, and ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from harness.record import Record
from harness.sheet import Cell, Rank, Row, Start
from harness.statistics import (
    CONFIDENCE,
    LEAST_P,
    Floats,
    McNemar,
    Paired,
    Scores,
    crossed_bootstrap,
    crossed_p_values,
    holm,
    mcnemar,
    paired,
)

Runs = Mapping[str, Mapping[int | None, Record]]
"""Records by run and seed; the seed is None for a model that is not trained per seed, such as the teacher."""

BELOW_START, CLEARLY_BELOW_START = "↓", "↓↓"
"""Marks of rows whose Average is below that of the model that they started from, and of those significantly below."""

LEVEL = 1 - CONFIDENCE


def with_differences(rows: Sequence[Row], runs: Runs, base: str | None, columns: Sequence[str]) -> list[Row]:
    """Add what compares each row with the base: intervals, p-values, and McNemar's tests."""
    pairs = {} if base is None else _paired_with(base, rows, runs, columns)
    if not pairs:
        return list(rows)
    found = crossed_bootstrap([*pairs.values(), *(pair.given_seeds() for pair in pairs.values())])
    p_values, bounds = _corrected_p_values(pairs, found.p_values[: len(pairs)])
    base_scores = _scores(runs[base or ""], columns)
    tests = _corrected({run: _mcnemar(_scores(runs[run], columns), base_scores) for run in pairs})
    order = {run: i for i, run in enumerate(pairs)}

    def compare(row: Row) -> Row:
        if (i := order.get(row.run)) is None:
            return row
        return replace(
            row,
            difference=found.average[i],
            differences={name: found.columns[name][i] for name in columns},
            paired_seeds=pairs[row.run].seeds,
            given_seeds=found.average[len(pairs) + i],
            p_value=p_values.get(row.run),
            p_is_bound=row.run in bounds,
            mcnemar=tests[row.run],
        )

    return [compare(row) for row in rows]


def with_start(rows: Sequence[Row], runs: Runs, columns: Sequence[str]) -> list[Row]:
    """Compare each trained row with the untrained student of its recipe, and mark those that are below it."""
    start = next((run for run, records in runs.items() if _kind(records) == "untrained student"), None)
    trained = [row for row in rows if _kind(runs.get(row.run, {})) == "trained"]
    pairs = {} if start is None else _paired_with(start, trained, runs, columns)
    if start is None or not pairs:
        return list(rows)
    found = crossed_bootstrap(list(pairs.values()))
    p_values, _ = _corrected_p_values(pairs, found.p_values)
    starts = {}
    for run, difference in zip(pairs, found.average, strict=True):
        is_below = _shown(difference.value) < 0
        starts[run] = Start(start, difference, is_below, is_below and p_values.get(run, 1.0) < LEVEL)

    def compare(row: Row) -> Row:
        if (found := starts.get(row.run)) is None:
            return row
        marks = (CLEARLY_BELOW_START,) if found.is_clear else (BELOW_START,) if found.is_below else ()
        return replace(row, start=found, marks=(*row.marks, *marks))

    return [compare(row) for row in rows]


def with_ranks(rows: Sequence[Row], runs: Runs, columns: Sequence[str], *, shown: Sequence[str]) -> list[Row]:
    """Add the ranks of the trained rows by each of ``columns`` and by the Average, as ``docs/statistics.md#ranks`` derives them.

    ``shown`` are all columns of the table, those that cannot be measured included: their ranks are None.

    The interval of a rank begins behind the rows that are significantly better, and ends before those that are
    significantly worse: two-sided p-values of the differences of all pairs over seeds and documents, corrected by Holm's
    method within each row.

    Reference: Mogstad, Romano, Shaikh and Wilhelm, Inference for ranks, Review of Economic Studies 91 (2024).
    """
    ranked = [row for row in rows if _is_complete(row) and _kind(runs.get(row.run, {})) == "trained"]
    scores = {row.run: _scores(runs[row.run], columns) for row in ranked}
    ranked = [row for row in ranked if all(scores[row.run].values())]
    pairs = {
        (i, j): pair
        for i, j in combinations(range(len(ranked)), 2)
        if (pair := paired(scores[ranked[i].run], scores[ranked[j].run])) is not None and not pair.has_one_training
    }
    if not pairs:
        return list(rows)
    value_QP, p_value_QP = crossed_p_values(list(pairs.values()))
    ranks: dict[str, list[Rank | None]] = {row.run: [None] * len(row.cells) for row in ranked}
    positions = [*(shown.index(name) for name in columns), len(shown)]
    for q, value_P, p_value_P in zip(positions, value_QP, p_value_QP, strict=True):
        means = [_shown(_mean(row.cells[q])) for row in ranked]
        bounds = rank_bounds(len(ranked), list(pairs), value_P, p_value_P)
        for row, mean, (low, high) in zip(ranked, means, bounds, strict=True):
            ranks[row.run][q] = Rank(1 + sum(other > mean for other in means), low, high)
    return [replace(row, ranks=tuple(ranks.get(row.run, ()))) for row in rows]


def rank_bounds(
    num_rows: int, pairs: Sequence[tuple[int, int]], value_P: Floats, p_value_P: Floats
) -> list[tuple[int, int]]:
    """First and last rank that each row may have.

    Args:
        num_rows: number of rows.
        pairs: the two rows of each comparison; pairs that are not among them decide nothing.
        value_P: difference of the first to the second.
        p_value_P: of no difference, two-sided and not corrected.
    """
    bounds = []
    for row in range(num_rows):
        own = [p for p, pair in enumerate(pairs) if row in pair]
        corrected = holm([float(p_value_P[p]) for p in own])
        # Positive where this row is better; a pair's difference is that of its first row to its second.
        clear = [
            value_P[p] * (1 if pairs[p][0] == row else -1) for p, c in zip(own, corrected, strict=True) if c < LEVEL
        ]
        better, worse = sum(value < 0 for value in clear), sum(value > 0 for value in clear)
        bounds.append((1 + better, num_rows - worse))
    return bounds


def values_of(records: Mapping[int | None, Record], column: str) -> dict[int | None, float]:
    """The score of every seed that has one in a column; NaN where it, or the score of a document, is not finite."""
    found = {seed: record.evaluation[column] for seed, record in records.items() if column in record.evaluation}
    return {
        seed: math.nan if result.value is None or not result.is_finite else result.value
        for seed, result in found.items()
    }


def _paired_with(base: str, rows: Sequence[Row], runs: Runs, columns: Sequence[str]) -> dict[str, Paired]:
    """Differences to a run of every other row that can be compared with it: finite, and with a seed in common."""
    records = runs.get(base, {})
    if not all(np.isfinite(list(values_of(records, name).values())).all() for name in columns):
        return {}
    base_scores = _scores(records, columns)
    found: dict[str, Paired] = {}
    for row in rows:
        if row.run != base and row.is_finite:
            pair = paired(_scores(runs.get(row.run, {}), columns), base_scores)
            found |= {} if pair is None else {row.run: pair}
    return found


def _corrected_p_values(pairs: Mapping[str, Paired], p_values: Sequence[float]) -> tuple[dict[str, float], set[str]]:
    """P-values by run with Holm's correction, and the runs whose p-value is a bound; none for a single training."""
    own = {run: p for (run, pair), p in zip(pairs.items(), p_values, strict=True) if not pair.has_one_training}
    corrected = dict(zip(own, holm(list(own.values())), strict=True))
    # What the smallest p-values decide, which are bounds, is a bound as well.
    least = dict(zip(own, holm([0.0 if p <= LEAST_P else p for p in own.values()]), strict=True))
    return corrected, {run for run in own if least[run] < corrected[run]}


def _mcnemar(system: Scores, base: Scores) -> dict[str, dict[int | None, McNemar]]:
    """By column the test of every seed that both have; a system without seeds meets all of the other's."""
    found: dict[str, dict[int | None, McNemar]] = {}
    for name in system:
        left, right = system[name], base[name]
        found[name] = {}
        for seed in sorted(set(left) | set(right), key=lambda seed: (seed is not None, seed)):
            ours, theirs = left.get(seed, left.get(None)), right.get(seed, right.get(None))
            if ours is not None and theirs is not None and (test := mcnemar(ours, theirs)) is not None:
                found[name][seed] = test
    return found


def _corrected(
    tests: Mapping[str, Mapping[str, Mapping[int | None, McNemar]]],
) -> dict[str, dict[str, dict[int | None, McNemar]]]:
    """The same tests by run, column and seed, their p-values corrected for all of them together."""
    flat = [test.p_value for columns in tests.values() for seeds in columns.values() for test in seeds.values()]
    p_values = iter(holm(flat))
    return {
        run: {
            name: {seed: test._replace(p_value=next(p_values)) for seed, test in seeds.items()}
            for name, seeds in columns.items()
            if seeds
        }
        for run, columns in tests.items()
    }


def _scores(records: Mapping[int | None, Record], columns: Sequence[str]) -> Scores:
    """Per-document scores [D] by column, and by seed for the seeds that have it."""
    return {
        name: {
            seed: np.array([document.score for document in records[seed].evaluation[name].documents], dtype=np.float64)
            for seed in values_of(records, name)
        }
        for name in columns
    }


def _kind(records: Mapping[int | None, Record]) -> str | None:
    return next((record.kind for record in records.values()), None)


def _is_complete(row: Row) -> bool:
    return all(cell is not None and (cell.mean is not None or cell.unmeasured) for cell in row.cells)


def _mean(cell: Cell | None) -> float:
    assert cell is not None
    assert cell.mean is not None
    return cell.mean


def _shown(score: float) -> float:
    """At the precision that a table shows."""
    return round(score, 4)
