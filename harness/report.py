"""One HTML file with everything that a comparison shows: tables, figures, costs, examples and provenance.

It is made from finished tables and their records, and is complete in itself: no script, nothing loaded from elsewhere.
What a record lacks (weights, margins, a training) is left out of the figure that would show it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import html
from harness.charts import Named
from harness.contents import Contents, by_run
from harness.costs import cost_table
from harness.formats import Details, View
from harness.headline import headline
from harness.health import health_table
from harness.meanings import FAMILIES, HEADER, design_of, line, meanings, reads_teacher
from harness.provenance import provenance_of
from harness.record import Record
from harness.search_table import tuning_view
from harness.sheet import Table
from harness.viewer import viewer


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
    runs = by_run(records)
    common = _common([section.view.notes for section in contents.tables])
    return html.render(
        "report.html",
        title=title,
        about=about,
        explained=any(_is_explained(record) for record in records),
        headline=headline(contents.tables[0].table, runs),
        sections=[_Section(*section, _without(section.view.notes, common)) for section in contents.tables],
        common=common,
        rows=_rows(runs),
        tuning=tuning_view(records),
        curves=contents.curves,
        weights=contents.weights,
        health=health_table(runs),
        viewer=viewer(runs),
        costs=cost_table(runs),
        provenance=provenance_of(records),
    )


class _Section(NamedTuple):
    """A table's section with the notes that are of this table alone."""

    anchor: str
    table: Table
    view: View
    details: Details | None
    forests: list[Named]
    tests: list[tuple[str, ...]]
    notes: list[str]


class _Rows(NamedTuple):
    """The table of what each row is, and the families of methods that occur in it with their meaning."""

    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    families: list[tuple[str, str]]


def _rows(runs: Mapping[str, Sequence[Record]]) -> _Rows:
    found = meanings(runs)
    families = {one.family for one in found}
    return _Rows(HEADER, [line(one) for one in found], [item for item in FAMILIES.items() if item[0] in families])


def _is_explained(record: Record) -> bool:
    """Whether a row measures from the teacher, or weighs by one: what the explanation at the top is about."""
    design = design_of(record)
    return design is not None and len(design.sides) == 2 and reads_teacher(record)


def _common(notes: Sequence[Sequence[str]]) -> list[str]:
    """The notes that all tables with notes share; none where there is one table, whose notes stand below it."""
    if len(notes) < 2:
        return []
    return [note for note in notes[0] if sum(note in others for others in notes) > 1]


def _without(notes: Sequence[str], common: Sequence[str]) -> list[str]:
    return [note for note in notes if note not in common]
