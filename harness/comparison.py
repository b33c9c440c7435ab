"""From records to the tables, figures and report of a recipe: what `compare` shows. Nothing is computed for it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ctpd.recipe import Recipe, ablation_run
from harness import figures
from harness.contents import contents
from harness.files import file_stem
from harness.formats import REPORTED, WRITTEN, frame_csv, view_text, write_table
from harness.published import read_reported
from harness.record import Record
from harness.report import write_report as write
from harness.search_table import tuning_frame, tuning_view
from harness.sheet import AVERAGE, Table, TableSpec
from harness.tables import build_tables

REPORT, FIGURES, TUNING = "report.html", "figures", "tuning"


def differing_versions(records: Iterable[Record]) -> dict[str, list[str]]:
    """Packages that were not the same for all records, with the versions found."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.provenance.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: sorted(versions) for package, versions in found.items() if len(versions) > 1}


def tables(
    recipe: Recipe, records: Sequence[Record], *, columns: Sequence[str], only: Sequence[str] | None = None
) -> list[Table]:
    """Every table that the recipe declares, from records alone; with ``only``, the rows of these runs alone."""
    specs = table_specs(recipe)
    if only is not None:
        specs = [chosen for spec in specs if (chosen := _chosen(spec, only)).rows]
    return build_tables(records, specs, columns=columns, seeds=recipe.shared.seeds)


def with_reported(made: Sequence[Table], path: Path) -> list[Table]:
    """The tables with a user's file of published numbers as marked rows of the main one, which is the first.

    Raises:
        UserError: the file is wrong; see ``read_reported``.
    """
    first, *others = made
    reported = read_reported(path, (*first.columns, AVERAGE))
    note = f"Rows with {REPORTED}: reported by others ({path.name}), not measured here; neither ranked nor compared."
    return [replace(first, reported=reported, footnotes=(*first.footnotes, note)), *others]


def _chosen(spec: TableSpec, only: Sequence[str]) -> TableSpec:
    """A table with the rows of some runs, without what lies beside them."""
    rows = tuple((label, run) for label, run in spec.rows if run in only)
    unranked = tuple(run for run in spec.unranked if run in only)
    return replace(spec, rows=rows, base=spec.base if spec.base in only else None, unranked=unranked, published=None)


def table_specs(recipe: Recipe) -> list[TableSpec]:
    """The tables that a recipe declares; the untrained teacher is shown, but not ranked."""
    teachers = {name for name, role in recipe.untrained.items() if role == "teacher"}
    specs = []
    for name, entry in recipe.tables.items():
        if entry.ablation is not None:
            labels = recipe.ablations[entry.ablation].values
            rows = tuple((label, ablation_run(entry.ablation, label)) for label in labels)
            base = None if entry.base is None else ablation_run(entry.ablation, entry.base)
        else:
            rows, base = tuple((run, run) for run in entry.rows), entry.base
        specs.append(
            TableSpec(
                name,
                entry.caption,
                rows,
                base=base,
                note=entry.note,
                unranked=tuple(run for _, run in rows if run in teachers),
                published=entry.published,
            )
        )
    return specs


def write_tables(made: Iterable[Table], folder: Path) -> list[Path]:
    """Markdown, CSV, LaTeX and HTML of every table; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for table in made for path in write_table(table, folder)]


def write_tuning(records: Sequence[Record], folder: Path) -> list[Path]:
    """The table of all trials in the same formats, where something was tuned; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in WRITTEN:
        if (text := tuning_text(records, kind)) is not None:
            paths.append(folder / f"{TUNING}.{kind}")
            paths[-1].write_text(text, encoding="utf-8", newline="\n")
    return paths


def tuning_text(records: Sequence[Record], kind: str) -> str | None:
    """The table of all trials in one format; None where nothing was tuned."""
    shown = tuning_view(records)
    if shown is None:
        return None
    return frame_csv(tuning_frame(records)) if kind == "csv" else view_text(shown, kind, name=TUNING)


def write_report(recipe: Recipe, made: Sequence[Table], records: Sequence[Record], folder: Path) -> Path:
    """The report beside the tables, in one file; returns it."""
    path = folder / REPORT
    write(contents(made, records), records, path, title=recipe.name, about=recipe.about)
    return path


def write_figures(made: Sequence[Table], records: Sequence[Record], folder: Path) -> list[Path]:
    """The report's figures as SVG, PDF and PNG, in a folder beside the tables; returns the files."""
    return figures.write_figures(contents(made, records).figures, folder / FIGURES)


def write_records(records: Iterable[Record], folder: Path) -> list[Path]:
    """Keep each record as a file of its own, named by run and seed; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for record in records:
        seed = "" if record.seed is None else f".seed{record.seed}"
        paths.append(folder / f"{file_stem(record.run)}{seed}.json")
        record.write(paths[-1])
    return paths
