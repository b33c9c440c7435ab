"""What the report of a comparison holds in addition to its tables: figures, examples and tests, computed from the records."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from harness.charts import (
    Bars,
    Curve,
    Curves,
    Estimate,
    Forest,
    Histograms,
    Named,
    Point,
    Side,
    reach,
)
from harness.examples import Example, examples_of
from harness.files import file_stem
from harness.formats import Details, View, details, p_text, percent_interval, view
from harness.meanings import design_of
from harness.record import Design, LogEntry, Record
from harness.sheet import AVERAGE, Row, Table
from harness.weights_summary import SideWeights, WeightsSummary


class Metric(NamedTuple):
    """A metric of a training's history that is drawn; the same name with ``eval_`` gives the circles.

    ``measured``: it is measured from a row's reference, which is then named beside it.
    """

    name: str
    stem: str
    title: str
    remark: str
    measured: bool = False


METRICS = (
    Metric("loss", "loss", "Loss", "each method's own, on its own scale"),
    Metric("rewards/margins", "reward-margin", "Reward margin", "chosen minus rejected, beta included", measured=True),
    Metric(
        "rewards/accuracies",
        "reward-accuracy",
        "Reward accuracy",
        "share of pairs whose margin, measured in the same way, is positive",
    ),
)


class TableSection(NamedTuple):
    """A table with what belongs to it; ``forests`` (the Average's first) and ``tests`` are empty without a base.

    ``details`` are further intervals and ranks, None where there are none.
    """

    anchor: str
    table: Table
    view: View
    details: Details | None
    forests: list[Named]
    tests: list[tuple[str, ...]]


class CurveSection(NamedTuple):
    """The training curves of one table's rows: each figure with a remark, ``legend`` their labels and styles."""

    caption: str
    legend: list[tuple[str, int]]
    figures: list[tuple[Named, str]]


class WeightSection(NamedTuple):
    """The weights that some runs share, as histograms and as examples: the first of the runs, and the others."""

    title: str
    others: str
    figure: Named
    facts: list[str]
    examples: list[Example]


class Contents(NamedTuple):
    """Everything that is shown, in the report's order."""

    tables: list[TableSection]
    curves: list[CurveSection]
    weights: list[WeightSection]

    @property
    def figures(self) -> Iterator[Named]:
        """All charts, each once."""
        for section in self.tables:
            yield from section.forests
        for curves in self.curves:
            yield from (figure for figure, _ in curves.figures)
        yield from (section.figure for section in self.weights)


def contents(tables: Sequence[Table], records: Sequence[Record]) -> Contents:
    """What to show of finished tables and of the records that they were made from."""
    runs = by_run(records)
    return Contents(
        tables=[_table_section(number, table) for number, table in enumerate(tables)],
        curves=[section for table in tables if (section := _curve_section(table, runs)).figures],
        weights=_weight_sections(runs),
    )


def by_run(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each run, in the order given."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.run, []).append(record)
    return runs


def _table_section(number: int, table: Table) -> TableSection:
    compared = [row for row in table.rows if row.difference is not None and row.differences is not None]
    measured = [name for name in table.columns if all(name in (row.differences or {}) for row in compared)]
    estimates = {name: [_estimate(row, name) for row in compared] for name in (AVERAGE, *measured)}
    forests = []
    if compared:
        unit = f"difference to {table.base_label}, percentage points"
        span = reach(item for items in estimates.values() for item in items)
        stem = f"difference--{file_stem(table.spec.name)}"
        forests = [
            Named(stem if name == AVERAGE else f"{stem}--{file_stem(name)}", Forest(name, unit, span, items))
            for name, items in estimates.items()
        ]
    return TableSection(f"table-{number}", table, view(table), details(table), forests, list(_tests(table)))


def _estimate(row: Row, column: str) -> Estimate:
    assert row.difference is not None
    assert row.differences is not None
    interval = row.difference if column == AVERAGE else row.differences[column]
    value, low, high = (100 * end for end in interval)
    is_clear = (low > 0 or high < 0) and not row.has_one_training
    return Estimate(row.title, value, low, high, percent_interval(interval), is_clear)


def _tests(table: Table) -> Iterator[tuple[str, ...]]:
    for row in table.rows:
        for column, seeds in (row.mcnemar or {}).items():
            for seed, test in seeds.items():
                shown = "–" if seed is None else str(seed)
                yield row.label, column, shown, str(test.only_system), str(test.only_base), p_text(test.p_value)


def _curve_section(table: Table, runs: Mapping[str, Sequence[Record]]) -> CurveSection:
    """Of trained rows only: the training of an untrained one, its SFT, is not part of the comparison."""
    trained, meant = {}, {}
    for row in table.rows:
        records = [record for record in runs.get(row.run, ()) if record.kind == "trained"]
        histories = [record.training.history for record in records if record.training is not None]
        if histories:
            trained[row.label], meant[row.label] = histories, design_of(records[0])
    legend: dict[str, int] = {}
    drawn = []
    for metric in METRICS:
        lines = [_curve(label, style, of_row, metric.name) for style, (label, of_row) in enumerate(trained.items())]
        lines = [line for line in lines if len(line.raw) > 1 and line.is_drawable]
        legend |= {line.label: line.style for line in lines}
        if lines:
            stem = f"training--{file_stem(table.spec.name)}--{metric.stem}"
            measured = _measured({line.label: meant[line.label] for line in lines}) if metric.measured else ""
            drawn.append((Named(stem, Curves(metric.title, "step", lines)), metric.remark + measured))
    return CurveSection(table.spec.caption.rstrip("."), sorted(legend.items(), key=lambda item: item[1]), drawn)


def _measured(designs: Mapping[str, Design | None]) -> str:
    """From whose margin the rows' are measured; one that is measured from the teacher's can begin below zero."""
    rows: dict[str, list[str]] = {}
    for label, design in designs.items():
        if design is not None and design.reference is not None:
            rows.setdefault(design.reference, []).append(label)
    teachers = rows.pop("teacher", [])
    if not teachers:
        return ""
    others = "; all other rows: from the student's before the training" if rows else ""
    return (
        f". {', '.join(teachers)}: measured from the teacher's margin, so that zero is where the student prefers the "
        f"chosen response as much as the teacher does{others}"
    )


def _curve(label: str, style: int, histories: Sequence[Sequence[LogEntry]], metric: str) -> Curve:
    raw = _mean_curve(histories, metric)
    return Curve(label, style, raw, smoothed(raw), _mean_curve(histories, f"eval_{metric}"))


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
    panels = [_panel("chosen", weights.chosen), _panel("rejected", weights.rejected)]
    facts = [f"{weights.units:,} units, mean weight {weights.mean:.2f}"]
    facts.append(f"clamped: {weights.clamped_low:.1%} below, {weights.clamped_high:.1%} above")
    facts += [] if weights.note is None else [weights.note]
    areas = {} if weights.auroc is None else {side: area for side, area in weights.auroc if area is not None}
    if areas:
        facts.append("AUROC against the known truth: " + ", ".join(f"{side} {a:.3f}" for side, a in areas.items()))
    of_seed = "" if seed is None else f", seed {seed}"
    histograms = Histograms(f"Weights of {names[0]}{of_seed}", "weight", panels)
    figure = Named(f"weights--{file_stem(names[0])}", histograms)
    return WeightSection(f"{names[0]}{of_seed}", ", ".join(names[1:]), figure, facts, examples_of(weights))


def _panel(side: Side, weights: SideWeights) -> Bars:
    label = f"{side} · mean {weights.mean:.2f}, sd {weights.std:.2f}"
    histogram = weights.histogram
    return Bars(label, side, histogram.counts, histogram.edges, _reached(weights.clamps or (), histogram.edges))


def _reached(bounds: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The bounds that weights lie at: the ends of a histogram are its least and its greatest value."""
    slack = 0.01 * (edges[-1] - edges[0])
    return [bound for bound in bounds if min(abs(bound - edges[0]), abs(bound - edges[-1])) <= slack]
