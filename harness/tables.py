"""Tables from records alone: means over seeds, ranks, and differences to a named base. No torch, no lm_eval.

Scores stay fractions here; ``harness/formats.py`` writes them as percentages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from harness.comparability import check_comparable
from harness.footnotes import footnotes
from harness.health import faults, start_of
from harness.published import load_published
from harness.record import ColumnResult, Record
from harness.sheet import Cell, Row, Table, TableSpec
from harness.statistics import (
    LEAST_P,
    Floats,
    Interval,
    McNemar,
    bootstrap_differences,
    difference_per_document,
    holm,
    mcnemar,
    spread,
    t_interval,
)

Runs = Mapping[str, Mapping[int | None, Record]]
"""Records by run and seed; the seed is None for a model that is not trained per seed, such as the teacher."""


def build_tables(
    records: Sequence[Record],
    specs: Sequence[TableSpec],
    *,
    columns: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Table]:
    """Build every table from the records of one recipe.

    Args:
        records: one per run and seed; runs that no table shows are allowed.
        specs: the tables.
        columns: the suite's column names in order; by default those of the records, in the order of the first.
        seeds: the seeds that the recipe asks for; by default all that occur. Those that a row lacks are shown missing.

    Raises:
        UserError: no records, records that may not be compared, or a spec whose base is not among its rows.
    """
    if not records:
        raise UserError("there are no records to make tables of", fix="Run the recipe first: `ctpd run RECIPE`")
    check_comparable(records)
    if columns is None:
        columns = tuple({name: None for record in records for name in (*record.evaluation, *record.unmeasured)})
    if seeds is None:
        seeds = sorted({record.seed for record in records if record.seed is not None})
    runs: dict[str, dict[int | None, Record]] = {}
    for record in records:
        runs.setdefault(record.run, {})[record.seed] = record
    return [build_table(runs, spec, columns=tuple(columns), seeds=tuple(seeds)) for spec in specs]


def build_table(runs: Runs, spec: TableSpec, *, columns: tuple[str, ...], seeds: tuple[int, ...]) -> Table:
    """Build one table from records that were checked (``check_comparable``); see ``build_tables``."""
    names = [run for _, run in spec.rows]
    for run in (*spec.unranked, *([spec.base] if spec.base is not None else [])):
        if run not in names:
            raise UserError(
                f"the run '{run}' is no row.{nearest(run, names)}",
                where=f"table '{spec.name}'",
                fix=f"Name one of its rows: {', '.join(names)}",
            )
    shown = [record for run in names for record in runs.get(run, {}).values()]
    averaged = tuple(name for name in columns if not any(name in record.unmeasured for record in shown))
    rows = [
        _row(label, run, runs.get(run, {}), columns=columns, averaged=averaged, seeds=seeds) for label, run in spec.rows
    ]
    rows = _with_differences(_with_ranks(rows, spec.unranked), runs, spec.base, averaged)
    start = start_of([record for records in runs.values() for record in records.values()])
    rows = [replace(row, faults=faults(list(runs.get(row.run, {}).values()), start)) for row in rows]
    published = load_published(spec.published) if spec.published is not None else None
    results = _one_result_each(shown, columns)
    return Table(
        spec=spec,
        columns=columns,
        rows=tuple(rows),
        partial=tuple(name for name, one in results.items() if one.protocol.num_docs < one.protocol.num_total),
        footnotes=tuple(footnotes(spec, rows, shown, results)),
        published=published,
    )


def _one_result_each(records: Sequence[Record], columns: Sequence[str]) -> dict[str, ColumnResult]:
    """A result of each column that some record has; comparable ones differ in their scores alone."""
    found = ((name, [record.evaluation[name] for record in records if name in record.evaluation]) for name in columns)
    return {name: results[0] for name, results in found if results}


def _row(
    label: str,
    run: str,
    records: Mapping[int | None, Record],
    *,
    columns: tuple[str, ...],
    averaged: tuple[str, ...],
    seeds: tuple[int, ...],
) -> Row:
    """One row; its Average is over the columns that can be measured on the models of all rows."""
    cells = [_cell(list(_values(records, name).values())) or _unmeasured(records, name) for name in columns]
    average = _cell(list(_averages(records, averaged).values()))
    if not averaged and records:
        average = Cell(None, None, len(records), unmeasured=True)
    measured = tuple(sorted(records, key=lambda seed: (seed is not None, seed)))
    seedless = None in records
    return Row(
        label=label,
        run=run,
        cells=(*cells, average),
        seeds=measured,
        missing_seeds=() if seedless or not records else tuple(seed for seed in seeds if seed not in records),
        missing=not records,
    )


def _cell(values: Sequence[float]) -> Cell | None:
    """The mean over seeds; one seed that is not finite makes the cell not finite."""
    if not values:
        return None
    if not np.isfinite(values).all():
        return Cell(None, None, len(values))
    return Cell(float(np.mean(values)), spread(values), len(values))


def _unmeasured(records: Mapping[int | None, Record], column: str) -> Cell | None:
    """The cell of a column that cannot be measured on the models of a row; None if it is just missing."""
    number = sum(column in record.unmeasured for record in records.values())
    return Cell(None, None, number, unmeasured=True) if number else None


def _with_ranks(rows: Sequence[Row], unranked: Sequence[str]) -> list[Row]:
    """Mark the best and the second best of each column, at the precision that is shown; equal scores share a rank."""
    ranked = [row for row in rows if row.run not in unranked and not row.missing and row.is_finite]

    def shown(cell: Cell | None) -> float | None:
        return None if cell is None or cell.mean is None else round(cell.mean, 4)

    orders = [
        sorted({value for row in ranked if (value := shown(row.cells[i])) is not None}, reverse=True)[:2]
        for i in range(len(rows[0].cells) if rows else 0)
    ]

    def rank(row: Row, i: int, cell: Cell | None) -> Cell | None:
        if cell is None or row not in ranked or len(orders[i]) < 2 or shown(cell) not in orders[i]:
            return cell
        return cell._replace(rank=orders[i].index(round(cell.mean or 0.0, 4)) + 1)

    return [replace(row, cells=tuple(rank(row, i, cell) for i, cell in enumerate(row.cells))) for row in rows]


def _with_differences(rows: Sequence[Row], runs: Runs, base: str | None, columns: tuple[str, ...]) -> list[Row]:
    """Add what compares each row with the base: intervals, p-values, and McNemar's tests."""
    if not columns or base is None or base not in runs or not all(row.is_finite for row in rows if row.run == base):
        return list(rows)
    base_scores = {name: _scores(runs[base], name) for name in columns}
    compared = []
    per_column: dict[str, list[Floats]] = {name: [] for name in columns}
    tests: dict[str, dict[str, dict[int | None, McNemar]]] = {}
    for row in rows:
        scores = {name: _scores(runs.get(row.run, {}), name) for name in columns}
        if (
            row.run == base
            or not row.is_finite
            or not all(_overlap(scores[name], base_scores[name]) for name in columns)
        ):
            continue
        compared.append(row.run)
        tests[row.run] = {name: _mcnemar(scores[name], base_scores[name]) for name in columns}
        for name in columns:
            per_column[name].append(difference_per_document(scores[name], base_scores[name]))
    if not compared:
        return list(rows)
    found = bootstrap_differences({name: np.stack(values, axis=1) for name, values in per_column.items()})
    p_values, tests, order = holm(found.p_values), _corrected(tests), {run: i for i, run in enumerate(compared)}
    # What the smallest p-values decide, which are bounds, is a bound as well.
    least = holm([0.0 if p <= LEAST_P else p for p in found.p_values])

    def compare(row: Row) -> Row:
        if (i := order.get(row.run)) is None:
            return row
        return replace(
            row,
            difference=found.average[i],
            differences={name: found.columns[name][i] for name in columns},
            p_value=p_values[i],
            p_is_bound=least[i] < p_values[i],
            seed_difference=_seed_difference(runs[row.run], runs[base], columns),
            mcnemar=tests[row.run],
        )

    return [compare(row) for row in rows]


def _seed_difference(
    system: Mapping[int | None, Record], base: Mapping[int | None, Record], columns: tuple[str, ...]
) -> Interval | None:
    """The t-interval over the differences of the seeds' Averages; a system without seeds meets all of the other's."""
    left, right = _averages(system, columns), _averages(base, columns)
    seeds = sorted(seed for seed in {**left, **right} if seed is not None)
    pairs = [(left.get(seed, left.get(None)), right.get(seed, right.get(None))) for seed in seeds]
    return t_interval([a - b for a, b in pairs if a is not None and b is not None])


def _averages(records: Mapping[int | None, Record], columns: tuple[str, ...]) -> dict[int | None, float]:
    """The Average of every seed that has all of these columns."""
    if not columns:
        return {}
    values = [_values(records, name) for name in columns]
    return {
        seed: float(np.mean([of_column[seed] for of_column in values]))
        for seed in records
        if all(seed in of_column for of_column in values)
    }


def _values(records: Mapping[int | None, Record], column: str) -> dict[int | None, float]:
    """The score of every seed that has one in a column; NaN where it, or the score of a document, is not finite."""
    found = {seed: record.evaluation[column] for seed, record in records.items() if column in record.evaluation}
    return {
        seed: math.nan if result.value is None or not result.is_finite else result.value
        for seed, result in found.items()
    }


def _mcnemar(system: Mapping[int | None, Floats], base: Mapping[int | None, Floats]) -> dict[int | None, McNemar]:
    """The test of every seed that both have; a system without seeds meets all of the other's."""
    found = {}
    for seed in sorted(set(system) | set(base), key=lambda seed: (seed is not None, seed)):
        left, right = system.get(seed, system.get(None)), base.get(seed, base.get(None))
        if left is not None and right is not None and (test := mcnemar(left, right)) is not None:
            found[seed] = test
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


def _scores(records: Mapping[int | None, Record], column: str) -> dict[int | None, Floats]:
    """Per-document scores [D] of one column by seed, for the seeds that have it."""
    return {
        seed: np.array([document.score for document in records[seed].evaluation[column].documents], dtype=np.float64)
        for seed in _values(records, column)
    }


def _overlap(left: Mapping[int | None, Floats], right: Mapping[int | None, Floats]) -> bool:
    """Whether two systems can be paired: a common seed, or one of them without seeds."""
    return bool(left and right and (None in left or None in right or set(left) & set(right)))
