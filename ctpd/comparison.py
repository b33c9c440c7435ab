"""From records to the tables and the report of a recipe: what `compare` shows, and nothing is computed for it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctpd.pipeline.runs import trials
from ctpd.recipe import Recipe, ablation_run

REPORT = "report.html"


def differing_versions(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Packages that were not the same for all records, with the versions found."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record["provenance"]["versions"].items():
            found.setdefault(package, set()).add(version)
    return {package: sorted(versions) for package, versions in found.items() if len(versions) > 1}


def tables(recipe: Recipe, records: Sequence[Mapping[str, Any]], *, columns: Sequence[str]) -> list[Any]:
    """Every table that the recipe declares, from records alone."""
    from harness.tables import build_tables

    return build_tables(records, table_specs(recipe), columns=columns, seeds=recipe.shared.seeds)


def table_specs(recipe: Recipe) -> list[Any]:
    """The tables that a recipe declares; the teacher is shown, but not ranked."""
    from harness.sheet import TableSpec

    teachers = tuple(name for name, role in recipe.untrained.items() if role == "teacher")
    specs = []
    for name, entry in recipe.tables.items():
        plain = [trial for row in entry.rows for trial in (trials(recipe, row) if row in recipe.runs else [row])]
        labels = recipe.ablations[entry.ablation].values if entry.ablation else plain
        rows = tuple((label, ablation_run(entry.ablation, label) if entry.ablation else label) for label in labels)
        base = ablation_run(entry.ablation, entry.base) if entry.ablation and entry.base else entry.base
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


def write_tables(made: Iterable[Any], folder: Path) -> list[Path]:
    """Markdown, CSV, LaTeX and HTML of every table; returns the files."""
    from harness.formats import write_table

    folder.mkdir(parents=True, exist_ok=True)
    return [path for table in made for path in write_table(table, folder)]


def write_report(recipe: Recipe, made: Sequence[Any], records: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """The report beside the tables, in one file; returns it."""
    from harness.report import write_report as write

    path = folder / REPORT
    write(made, records, path, title=recipe.name, about=recipe.about)
    return path


def write_records(records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Keep the records as files of their own, named by run and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        name = re.sub(r"[^a-z0-9]+", "-", record["run"].lower()).strip("-")
        seed = "" if record["seed"] is None else f".seed{record['seed']}"
        (folder / f"{name}{seed}.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
