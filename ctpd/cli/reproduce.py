"""`ctpd run --from-record`: the recipe of a record, and how the new record agrees with it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.options import refuse
from ctpd.core.errors import UserError
from ctpd.core.printing import json_text, printable

if TYPE_CHECKING:
    from ctpd.app import Experiment
    from ctpd.core.store import Store
    from harness.record import Record

FOLDER = "from-records"  # in a store: the recipes of records that were reproduced


def recipe_of_record(file: Path, store: Path) -> "tuple[Record, str]":
    """The record, and the file in the store to which the recipe of its row and seed was written.

    Raises:
        UserError: it is no record, or one without a recipe; the store cannot be written to.
    """
    from harness.files import file_stem
    from harness.record import Record
    from harness.reproduction import recipe_text

    refuse("only", "seed", "limit", because="the record says which run, seed and documents it is of")
    record = Record.read(file)
    text = recipe_text(record, source=str(file))
    name = f"{record.recipe}.{record.run}.{record.seed}"
    target = store / FOLDER / f"{file_stem(name)}.yaml"
    new = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        os.replace(new, target)
    except OSError as error:
        raise UserError(
            f"the record's recipe cannot be written ({error.strerror})",
            where=str(target),
            fix="Give another --store, which this user may write to",
        ) from error
    return record, str(target)


def check_reproducible(record: "Record", file: Path, experiment: "Experiment", store: "Store") -> None:
    """Refuse, before anything is run, what would reproduce nothing.

    Raises:
        UserError: data, models or parameters are not those of the record; or the store holds the record itself.
    """
    from harness.record import Record
    from harness.reproduction import check_same_inputs

    stage = experiment.records[0]
    check_same_inputs(record, stage.head.record, source=str(file))
    if store.has(stage.kind, stage.key) and Record.read(_path(experiment, store)) == record:
        raise UserError(
            f"the store {store.root} holds this very record, so nothing would be run again",
            where=str(file),
            fix="Give `--store` with a new folder",
        )


def show_agreement(record: "Record", experiment: "Experiment", store: "Store", *, as_json: bool) -> bool:
    """Print how the new record agrees with the old one; returns whether all of it is the same, but for rounding."""
    from harness.record import Record
    from harness.reproduction import agreements, made_otherwise

    found = Record.read(_path(experiment, store))
    compared, facts = agreements(record, found), made_otherwise(record, found)
    same = all(one.is_same for one in compared)
    if as_json:
        rows: list[dict[str, Any]] = [one._asdict() | {"verdict": one.verdict} for one in compared]
        click.echo(json_text({"same": same, "measurements": rows, "made_otherwise": facts}))
        return same
    from ctpd.cli.terminal import rendered, table

    lines = [(one.name, _number(one.recorded), _number(one.found), one.verdict) for one in compared]
    click.echo(f"{printable(record.title)} of {printable(record.recipe)}, beside its record:\n")
    click.echo(rendered(table(["", "record", "here", ""], lines, right=(1, 2))))
    if facts:
        shown = ", ".join(f"{name} ({there} there, {here} here)" for name, (there, here) in facts.items())
        click.echo(f"\nMade otherwise: {printable(shown)}.")
    return same


def _path(experiment: "Experiment", store: "Store") -> Path:
    from ctpd.pipeline.stages.record import RECORD

    stage = experiment.records[0]
    return store.open(stage.kind, stage.key) / RECORD


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
