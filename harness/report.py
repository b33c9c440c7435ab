"""One HTML file with everything that a comparison shows: tables, figures, costs, examples and provenance.

It is made from finished tables and their records, and is complete in itself: no script, nothing loaded from elsewhere.
What a record lacks (weights, margins, a training) is left out of the figure that would show it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import html
from harness.contents import Contents, by_run
from harness.costs import cost_table
from harness.formats import p_text, percent_interval
from harness.health import health_table
from harness.provenance import provenance_of
from harness.record import Record
from harness.search_table import tuning_view
from harness.sheet import AVERAGE, Row, Table


def write_report(contents: Contents, records: Sequence[Record], path: Path, *, title: str, about: str) -> None:
    """Write the report of a recipe.

    Args:
        contents: what the finished tables and their records show; the first table is the main one.
        records: those that the tables were made from.
        path: of the file.
        title: of the page, the recipe's name.
        about: the recipe's one sentence.
    """
    path.write_text(report(contents, records, title=title, about=about), encoding="utf-8", newline="\n")


def report(contents: Contents, records: Sequence[Record], *, title: str, about: str) -> str:
    """The report as HTML; see ``write_report``."""
    return html.render(
        "report.html",
        title=title,
        about=about,
        summary=list(_summary(contents.tables[0].table)),
        sections=contents.tables,
        tuning=tuning_view(records),
        curves=contents.curves,
        weights=contents.weights,
        health=health_table(by_run(records)),
        costs=cost_table(by_run(records)),
        provenance=provenance_of(records),
    )


def _summary(table: Table) -> Iterator[str]:
    """The main result in a sentence or two, from the numbers alone."""
    if table.partial:
        yield "Evaluated on a part of the documents only."
    best = [row for row in table.rows if (cell := row.cells[-1]) is not None and cell.rank == 1]
    for row in best[:1]:
        cell = row.cells[-1]
        assert cell is not None
        assert cell.mean is not None
        names = " and ".join(row.label for row in best)
        yield f"Best {AVERAGE}: {names}, {100 * cell.mean:.2f}\N{NO-BREAK SPACE}%."
        if row.difference is not None:
            yield f"{_difference(row, table.base_label or '')}."
    below = [row.label for row in table.rows if row.start is not None and row.start.is_below]
    if below:
        yield f"Below the model that they started from: {', '.join(below)}."
    unhealthy = [row.label for row in table.rows if row.faults]
    if unhealthy:
        yield f"Unhealthy answers: {', '.join(unhealthy)}, see below the table."
    if any(row.missing or row.missing_seeds for row in table.rows):
        yield "Some runs are missing: see below the table."


def _difference(row: Row, base: str) -> str:
    text = f"Difference to {base}: {percent_interval(row.difference)} points (95\N{NO-BREAK SPACE}%)"
    if row.has_one_training:
        return f"{text}, of one seed: another training could move it further"
    p_value = _equals(p_text(row.p_value, is_bound=row.p_is_bound))
    return f"{text}, p\N{NO-BREAK SPACE}{p_value} after Holm's correction"


def _equals(text: str) -> str:
    return text if text.startswith(("<", "≤")) else f"=\N{NO-BREAK SPACE}{text}"
