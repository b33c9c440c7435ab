"""Tables from records alone: means over seeds, ranks, and differences to a named base. No torch, no lm_eval.

Scores stay fractions here; ``harness/formats.py`` writes them as percentages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from harness.comparability import check_comparable
from harness.differences import Runs, values_of, with_differences, with_ranks, with_start
from harness.footnotes import UNHEALTHY_MARK, footnotes
from harness.health import faults, start_of
from harness.published import load_published
from harness.record import ColumnResult, Record
from harness.sheet import Cell, Row, Table, TableSpec
from harness.statistics import spread


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
    rows = _with_places(rows, spec.unranked)
    if averaged:
        rows = with_start(with_differences(rows, runs, spec.base, averaged), runs, averaged)
        rows = with_ranks(rows, runs, averaged, shown=columns) if spec.base is not None else rows
    rows = _with_faults(rows, runs)
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
    cells = [_cell(list(values_of(records, name).values())) or _unmeasured(records, name) for name in columns]
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


def _with_faults(rows: Sequence[Row], runs: Runs) -> list[Row]:
    """Mark the rows whose models give unhealthy answers."""
    start = start_of([record for records in runs.values() for record in records.values()])
    found = [faults(list(runs.get(row.run, {}).values()), start) for row in rows]
    return [
        replace(row, faults=wrong, marks=(*row.marks, UNHEALTHY_MARK)) if wrong else row
        for row, wrong in zip(rows, found, strict=True)
    ]


def _with_places(rows: Sequence[Row], unranked: Sequence[str]) -> list[Row]:
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


def _averages(records: Mapping[int | None, Record], columns: tuple[str, ...]) -> dict[int | None, float]:
    """The Average of every seed that has all of these columns."""
    if not columns:
        return {}
    values = [values_of(records, name) for name in columns]
    return {
        seed: float(np.mean([of_column[seed] for of_column in values]))
        for seed in records
        if all(seed in of_column for of_column in values)
    }
