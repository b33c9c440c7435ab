"""The tables of a recipe: which are made and printed, the folder that they are written to, how missing rows are built."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctpd.cli.unwritten import report_unwritten
from ctpd.core.printing import command, json_text, printable

if TYPE_CHECKING:
    from ctpd.app import Experiment
    from ctpd.core.store import Store
    from ctpd.pipeline.runs import PlannedRun
    from harness.record import Record
    from harness.sheet import Table

OWNERS = ".recipes.json"  # beside the folders of tables: which recipe wrote each


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is printed of the tables: JSON, or some of `harness.formats.FORMATS`; all of the tables, or the main one.

    `published` is a file of numbers that others reported, as rows of the main table.
    """

    formats: Sequence[str] = ("txt",)
    as_json: bool = False
    main_only: bool = False
    published: Path | None = None


def show_tables(experiment: "Experiment", store: "Store", shown: Shown, *, to: Path | None = None) -> None:
    """Make every table from the records of all runs; write the tables and the report; print.

    Of an experiment with chosen runs or seeds this shows the others, too: the choice says what is built.

    Args:
        experiment: the recipe.
        store: where the records are.
        shown: what is printed. The figures are left out with the main table alone: they take longer than all else.
        to: write there, with the records; None for the store's folder of tables.
    """
    from ctpd import app
    from harness import comparison

    whole = experiment.whole
    records = app.read_records(whole, store)
    _warn(experiment, records, store)
    made = _tables(whole, records, published=shown.published)
    root, written = store.root / "tables" if to is None else to, ""
    try:
        folder = _folder(root, whole)
        written_files = [*comparison.write_tables(made, folder), *comparison.write_tuning(records, folder)]
        names = [path.name for path in written_files]
        report = comparison.write_report(whole.recipe, made, records, folder)
        if not shown.main_only:
            comparison.write_figures(made, records, folder)
            names.append(f"{comparison.FIGURES}/")
        if to is not None:
            comparison.write_records(records, folder / "records")
        written = f"\nWritten to {folder}: {', '.join(names)}\nReport: {report}"
    except OSError as error:
        report_unwritten(error, root, recipe=experiment.source, store=store.root, required=not shown.main_only)
    _print(made, records, shown)
    if written and not shown.as_json:
        click.echo(written)


def show_chosen(experiment: "Experiment", store: "Store", shown: Shown) -> None:
    """Print the tables of the chosen runs and seeds alone, without the other rows; nothing is written."""
    from ctpd import app

    records = app.read_records(experiment, store)
    _warn(experiment, records, store)
    only = [run.name for run in experiment.outlook.runs]
    _print(_tables(experiment, records, only=only, published=shown.published), records, shown)
    if not shown.as_json:
        click.echo("\nOnly the chosen rows, and so nothing was written.")


def _tables(
    experiment: "Experiment",
    records: "Sequence[Record]",
    *,
    only: Sequence[str] | None = None,
    published: Path | None = None,
) -> "list[Table]":
    from harness import comparison

    columns = [column.name for column in experiment.suite.columns]
    made = comparison.tables(experiment.recipe, records, columns=columns, only=only)
    return made if published is None else comparison.with_reported(made, published)


def _print(made: "Sequence[Table]", records: "Sequence[Record]", shown: Shown) -> None:
    from harness.comparison import TUNING, tuning_text
    from harness.formats import FORMATS, json_rows
    from harness.search_table import tuning_rows

    if shown.as_json:
        trials = tuning_rows(records)
        click.echo(
            json_text({table.spec.name: json_rows(table) for table in made} | ({TUNING: trials} if trials else {}))
        )
        return
    for kind in shown.formats:
        texts = [FORMATS[kind](table) for table in (made[:1] if shown.main_only else made)]
        trials_text = None if shown.main_only else tuning_text(records, kind)
        click.echo("\n\n".join(texts if trials_text is None else [*texts, trials_text]))


def _warn(experiment: "Experiment", records: "Sequence[Record]", store: "Store") -> None:
    """Say on standard error how to build what is missing, and whether versions differ."""
    from ctpd import app
    from harness import comparison

    for package, versions in comparison.differing_versions(records).items():
        click.echo(printable(f"Warning: the records were made with {package} {' and '.join(versions)}."), err=True)
    lost = app.missing_runs(experiment, store)
    for run in lost:
        click.echo(f"Missing: {printable(run.title)}. To build it: {_building(experiment, run, store)}", err=True)
    others = len(app.missing_runs(experiment.whole, store)) - len(lost)
    if others:
        words = ["run", experiment.source, *_limit(experiment)]
        what = f"{others} further run{'s' if others > 1 else ''} of the recipe"
        click.echo(f"Missing: {what}. To build all: {command(*words, store=store.root)}", err=True)


def _building(experiment: "Experiment", lost: "PlannedRun", store: "Store") -> str:
    """The command that builds the record of one run."""
    words = ["run", experiment.source, "--only", lost.name]
    words += [] if lost.seed is None else ["--seed", str(lost.seed)]
    return command(*words, *_limit(experiment), store=store.root)


def _limit(experiment: "Experiment") -> list[str]:
    return [] if experiment.limit is None else ["--limit", str(experiment.limit)]


def _folder(root: Path, experiment: "Experiment") -> Path:
    """The folder of a recipe's tables, by its name; another recipe of the same name has one with a number.

    Tables of an evaluation with `--limit` have a folder of their own.
    """
    from harness.files import file_stem

    name = file_stem(experiment.recipe.name) + ("" if experiment.limit is None else f".limit-{experiment.limit}")
    owners = _owners(root)
    mine = _source(experiment.source, root)
    names = [name if number == 1 else f"{name}-{number}" for number in range(1, len(owners) + 2)]
    own = [one for one in names if owners.get(one) == mine]
    free = [one for one in names if one not in owners or _is_gone(owners[one], root)]
    chosen = (own or free)[0]
    if chosen != name:
        click.echo(
            f"Note: {root / name} holds the tables of another recipe named '{printable(experiment.recipe.name)}', "
            f"{printable(owners[name])}; those of this one are in {root / chosen}. Give one of the two another `name`.",
            err=True,
        )
    if owners.get(chosen) != mine:
        root.mkdir(parents=True, exist_ok=True)
        new = root / f"{OWNERS}.{os.getpid()}"
        new.write_text(json.dumps(owners | {chosen: mine}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, root / OWNERS)
    return root / chosen


def _owners(root: Path) -> dict[str, str]:
    """Folder of tables -> the recipe that wrote it; empty where the file is not there or cannot be read."""
    try:
        found: dict[str, str] = json.loads((root / OWNERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _source(recipe: str, root: Path) -> str:
    """A shipped recipe's name, or the path of a recipe's file from the folder of the tables."""
    from ctpd.recipe import shipped_recipes

    return (
        f"shipped: {recipe}" if recipe in shipped_recipes() else os.path.relpath(Path(recipe).resolve(), root.resolve())
    )


def _is_gone(source: str, root: Path) -> bool:
    """Whether a recipe's file does not exist any more: it was moved, perhaps."""
    return not source.startswith("shipped: ") and not (root / source).is_file()
