"""One HTML file with everything that a comparison shows: tables, figures, costs, examples and provenance.

It is made from finished tables and their records, and is complete in itself: no script, nothing loaded from elsewhere.
What a record lacks (weights, margins, a training) is left out of the figure that would show it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from harness import figures, html
from harness.costs import CostTable, cost_table
from harness.examples import Example, examples_of
from harness.figures import Bars, Curve, Estimate, Point
from harness.formats import View, p_text, percent_interval, view
from harness.provenance import Provenance, provenance_of
from harness.record import Clamp, LogEntry, Record, SideWeights, WeightsSummary
from harness.sheet import AVERAGE, Row, Table

Side = Literal["chosen", "rejected"]

CURVES = (
    ("loss", "Loss", "each method's own, on its own scale"),
    ("rewards/margins", "Reward margin", "chosen minus rejected, beta included"),
    ("rewards/accuracies", "Reward accuracy", "share of pairs with a positive margin"),
)
"""What is drawn of a training's history: key, title, remark. The same key with ``eval_`` gives the circles."""


class TableSection(NamedTuple):
    """A table with what belongs to it. ``forest`` and the others are empty where the records give nothing to show."""

    anchor: str
    table: View
    forest: str
    column_forests: list[str]
    tests: list[tuple[str, ...]]


class CurveSection(NamedTuple):
    """The training curves of one table's rows: ``legend`` pairs a row's label with the classes of its line, ``figures``
    are title, remark and figure."""

    caption: str
    legend: list[tuple[str, str]]
    figures: list[tuple[str, str, str]]


class WeightSection(NamedTuple):
    """The weights that some runs share, as histograms and as examples."""

    runs: str
    figure: str
    facts: list[str]
    examples: list[Example]


def write_report(tables: Sequence[Table], records: Sequence[Record], path: Path, *, title: str, about: str) -> None:
    """Write the report of a recipe.

    Args:
        tables: finished; the first is the main one.
        records: those that the tables were made from.
        path: of the file.
        title: of the page, the recipe's name.
        about: the recipe's one sentence.
    """
    path.write_text(report(tables, records, title=title, about=about), encoding="utf-8", newline="\n")


def report(tables: Sequence[Table], records: Sequence[Record], *, title: str, about: str) -> str:
    """The report as HTML; see ``write_report``."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.run, []).append(record)
    costs: CostTable = cost_table(runs)
    provenance: Provenance = provenance_of(records)
    return html.render(
        "report.html",
        title=title,
        about=about,
        summary=list(_summary(tables[0])),
        sections=[_table_section(number, table) for number, table in enumerate(tables)],
        curves=[section for table in tables if (section := _curve_section(table, runs)).figures],
        weights=_weight_sections(runs),
        costs=costs,
        provenance=provenance,
    )


def _summary(table: Table) -> Iterator[str]:
    """The main result in a sentence or two, from the numbers alone."""
    if table.partial:
        yield "Evaluated on a part of the documents only."
    best = [row for row in table.rows if (cell := row.cells[-1]) is not None and cell.rank == 1]
    for row in best[:1]:
        cell = row.cells[-1]
        assert cell is not None
        names = " and ".join(row.label for row in best)
        yield f"Best {AVERAGE}: {names}, {100 * cell.mean:.2f}\N{NO-BREAK SPACE}%."
        if row.difference is not None:
            yield (
                f"Difference to {table.base_label}: {percent_interval(row.difference)} points (95\N{NO-BREAK SPACE}%), "
                f"p\N{NO-BREAK SPACE}{_equals(p_text(row.p_value))} after Holm's correction."
            )
    if any(row.missing or row.missing_seeds for row in table.rows):
        yield "Some runs are missing: see below the table."


def _equals(text: str) -> str:
    return text if text.startswith("<") else f"=\N{NO-BREAK SPACE}{text}"


def _table_section(number: int, table: Table) -> TableSection:
    compared = [row for row in table.rows if row.difference is not None and row.differences is not None]
    averages = [_estimate(row, AVERAGE) for row in compared]
    columns = {name: [_estimate(row, name) for row in compared] for name in table.columns}
    forest, column_forests = "", []
    if compared:
        unit = f"difference to {table.base_label}, percentage points"
        span = figures.reach([item for items in (averages, *columns.values()) for item in items])
        forest = figures.forest(averages, title=AVERAGE, unit=unit, span=span)
        column_forests = [figures.forest(items, title=name, unit=unit, span=span) for name, items in columns.items()]
    return TableSection(f"table-{number}", view(table), forest, column_forests, list(_tests(table)))


def _estimate(row: Row, column: str) -> Estimate:
    assert row.difference is not None
    assert row.differences is not None
    interval = row.difference if column == AVERAGE else row.differences[column]
    value, low, high = (100 * end for end in interval)
    return Estimate(row.label, value, low, high, percent_interval(interval))


def _tests(table: Table) -> Iterator[tuple[str, ...]]:
    for row in table.rows:
        for column, seeds in (row.mcnemar or {}).items():
            for seed, test in seeds.items():
                shown = "–" if seed is None else str(seed)
                yield row.label, column, shown, str(test.only_system), str(test.only_base), p_text(test.p_value)


def _curve_section(table: Table, runs: Mapping[str, Sequence[Record]]) -> CurveSection:
    """Of trained rows only: the training of an untrained one, its SFT, is not part of the comparison."""
    trained = {}
    for row in table.rows:
        records = [record for record in runs.get(row.run, ()) if record.kind == "trained"]
        histories = [record.training.history for record in records if record.training is not None]
        if histories:
            trained[row.label] = histories
    drawn: dict[str, int] = {}
    made = []
    for key, title, remark in CURVES:
        lines = []
        for style, (label, histories) in enumerate(trained.items()):
            raw, marks = _mean_curve(histories, key), _mean_curve(histories, f"eval_{key}")
            if len(raw) > 1:
                drawn[label] = style
                lines.append(Curve(label, style, raw, smoothed(raw), marks))
        if lines:
            made.append((title, remark, figures.curves(lines, title=title, x_label="step", y_label=title)))
    legend = [(label, figures.style_class(style)) for label, style in sorted(drawn.items(), key=lambda item: item[1])]
    return CurveSection(table.spec.caption.rstrip("."), legend, made)


def _mean_curve(histories: Sequence[Sequence[LogEntry]], metric: str) -> list[Point]:
    """The mean over seeds at every step that all seeds have; not a number where it was not finite for one of them."""
    by_seed = [
        {entry.step: _drawn(entry.metrics[metric]) for entry in history if metric in entry.metrics}
        for history in histories
    ]
    steps = sorted(set.intersection(*(set(values) for values in by_seed)))
    return [(step, float(np.mean([values[step] for values in by_seed]))) for step in steps]


def _drawn(value: float | None) -> float:
    return math.nan if value is None else value


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean over about a tenth of the points, centred, its window cut at both ends."""
    half = len(points) // 20
    return [
        (x, float(np.mean([y for _, y in points[max(0, i - half) : i + half + 1]]))) for i, (x, _) in enumerate(points)
    ]


def _weight_sections(runs: Mapping[str, Sequence[Record]]) -> list[WeightSection]:
    """One section for all runs whose first seed has the very same weights."""
    shared: dict[str, list[str]] = {}
    found: dict[str, tuple[WeightsSummary, int | None]] = {}
    for run, (record, *_) in runs.items():
        if record.weights is not None:
            same = record.weights.model_dump_json()
            shared.setdefault(same, []).append(run)
            found.setdefault(same, (record.weights, record.seed))
    return [_weight_section(names, *found[same]) for same, names in shared.items()]


def _weight_section(names: Sequence[str], weights: WeightsSummary, seed: int | None) -> WeightSection:
    panels = [_panel("chosen", weights.chosen, weights.clamp), _panel("rejected", weights.rejected, weights.clamp)]
    facts = [f"{weights.units:,} units, mean weight {weights.mean:.2f}"]
    facts.append(f"clamped: {weights.clamped_low:.1%} below, {weights.clamped_high:.1%} above")
    areas = {} if weights.auroc is None else {side: area for side, area in weights.auroc if area is not None}
    if areas:
        facts.append("AUROC against the known truth: " + ", ".join(f"{side} {a:.3f}" for side, a in areas.items()))
    of_seed = "" if seed is None else f", seed {seed}"
    figure = figures.histograms(panels, title=f"Weights of {', '.join(names)}{of_seed}", x_label="weight")
    return WeightSection(" · ".join(names) + of_seed, figure, facts, examples_of(weights))


def _panel(side: Side, weights: SideWeights, clamp: Clamp | None) -> Bars:
    label = f"{side} · mean {weights.mean:.2f}, sd {weights.std:.2f}"
    histogram = weights.histogram
    bounds = [] if clamp is None else _reached(clamp_bounds(clamp, side), histogram.edges)
    return Bars(label, side, histogram.counts, histogram.edges, bounds)


def clamp_bounds(clamp: Clamp, side: Side) -> list[float]:
    """The least and the greatest weight that clamping allows: ``k exp(±mu [lower, upper])``, minus in rejected responses."""
    sign = 1 if side == "chosen" else -1
    return sorted(clamp.k * math.exp(sign * clamp.mu * end) for end in (clamp.lower, clamp.upper))


def _reached(bounds: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The bounds that weights lie at: the ends of a histogram are its least and its greatest value."""
    slack = 0.01 * (edges[-1] - edges[0])
    return [bound for bound in bounds if min(abs(bound - edges[0]), abs(bound - edges[-1])) <= slack]
