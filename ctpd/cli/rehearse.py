"""`ctpd rehearse`: a whole recipe in minutes, with tiny models, and the page that says what will run."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.hub import ask_hub, needs_hub
from ctpd.cli.options import execution, parted, prepare, refuse
from ctpd.core.errors import UserError
from ctpd.core.printing import json_text, printable

if TYPE_CHECKING:
    from ctpd.rehearsal.outcome import Problem, Rehearsal, Row

SUSTAINED = 100e12
"""Operations a second of one device for the total in hours: a round figure, which the page names."""


@click.command()
@click.argument("recipe")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value of a key of the recipe, such as shared.teacher.model=models/big; may be repeated.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the rehearsal's store, tables and report in this folder [default: a temporary one in the store].",
)
@execution("store", "device", "offline", "quiet", "json")
def rehearse(recipe: str, *, changes: tuple[str, ...], keep: Path | None, **values: Any) -> None:
    """Try the whole of RECIPE in minutes: what will run, what will not and why, and how much it takes.

    Real tokenizers, templates, pairs and tasks; tiny random models of the same classes in the place of the recipe's, whose
    directories need no weights. All pairs are prepared; everything else runs on a few of them, through to tables and report.
    Exit code 2 if something will not run.
    """
    device = prepare(offline=values["offline"], device=values["device"])
    if keep is not None:
        refuse("store", because="--keep names the folder of the rehearsal")
    with _folder(keep, values["store"]) as folder:
        found = _rehearsed(recipe, changes, folder, device=device, quiet=values["quiet"])
        click.echo(json_text(plain(found)) if values["as_json"] else page(found))
    if keep is not None and not values["as_json"]:
        click.echo(
            f"\nKept in {printable(str(keep))}: the recipe that was run, its models, tables and report, and the store."
        )
    if not found.will_run:
        number = len(found.problems)
        what = f"the recipe will not run as it is: {number} problem{'s' if number > 1 else ''}, which the page lists"
        raise UserError(what, where=recipe, fix="Mend them and rehearse it again")


@contextlib.contextmanager
def _folder(keep: Path | None, store: Path) -> Iterator[Path]:
    """The folder of the rehearsal, which is removed unless it is kept.

    Raises:
        UserError: ``keep`` holds something else.
    """
    from ctpd.core.temporary import kept_in, temporary_folder
    from ctpd.core.userfiles import exists
    from ctpd.rehearsal.derive import RECIPE, STORE

    if keep is None:
        with kept_in(store), temporary_folder("rehearsal") as folder:
            yield folder
        return
    known = any(exists(keep / name) for name in (RECIPE, STORE))
    if exists(keep) and not known and any(keep.iterdir()):
        raise UserError(
            "the folder holds something else than an earlier rehearsal",
            where=str(keep),
            fix="Give --keep another folder",
        )
    yield keep.absolute()


def _rehearsed(recipe: str, changes: Sequence[str], folder: Path, *, device: str, quiet: bool) -> "Rehearsal":
    from ctpd.app import Experiment
    from ctpd.pipeline.progress import Progress
    from ctpd.pipeline.runtime import Runtime, check_device

    with _changed(recipe, changes, folder) as source:
        experiment = Experiment(source)
        hub = needs_hub(experiment.recipe.shared, experiment.suite) and ask_hub()
        from ctpd.rehearsal import rehearse as rehearsing  # which imports the hub's client: the hub was asked before

        check_device(device)
        runtime = Runtime(device=device, project=experiment.recipe.name)
        found = rehearsing.rehearse(experiment, folder, runtime=runtime, progress=Progress(quiet=quiet), hub=hub)
    found.recipe = recipe
    return found


@contextlib.contextmanager
def _changed(recipe: str, changes: Sequence[str], folder: Path) -> Iterator[str]:
    """The recipe, or the file of a copy with other values of some keys, whose errors are said of the recipe.

    Raises:
        UserError: there is no such recipe, or a change is no value; in the block, an error in the copy.
    """
    from ctpd.recipe.load import parsed_recipe

    if not changes:
        yield recipe
        return
    data = parsed_recipe(recipe)
    for change in changes:
        _set(data, change)
    path = folder / "changed.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    try:
        yield str(path)
    except UserError as error:
        if error.where is None or not error.where.startswith(str(path)):
            raise
        raise UserError(error.what, where=f"{recipe} with --set", fix=error.fix) from error


def _set(data: dict[str, Any], change: str) -> None:
    """Give the key of a recipe another value; a block that is not there is made."""
    from ctpd.core.config import parse_yaml

    keys, text = parted(change, option="--set", form="KEY=VALUE")
    if not all(keys.split(".")):
        raise click.UsageError(f"--set: '{change}' is not KEY=VALUE.")
    value = parse_yaml(f"value: {text}", source=f"--set {keys}").get("value")
    *blocks, last = keys.split(".")
    for name in blocks:
        below = data.get(name)
        if not isinstance(below, dict):
            below = data[name] = {}
        data = below
    data[last] = value


def plain(found: "Rehearsal") -> dict[str, Any]:
    """The page as JSON's own types; memory in bytes of one device."""
    return {
        "recipe": found.recipe,
        "will_run": found.will_run,
        "stages": [row._asdict() for row in found.rows],
        "problems": [problem._asdict() for problem in found.problems],
        "not_rehearsed": [problem._asdict() for problem in found.unknown],
        "notes": found.notes,
        "pairs": found.pairs,
        "operations": found.operations,
        "processes": found.processes,
        "sharded": found.sharded,
        "seconds": found.seconds,
    }


def page(found: "Rehearsal") -> str:
    """The page: what will run, what will not and why, how much."""
    parts = [_verdict(found), _stages(found.rows), *_how_much(found)]
    parts += _listed("Will not run", found.problems)
    parts += _listed("Could not be rehearsed", found.unknown)
    if found.notes:
        parts.append("\n".join(f"Note: {printable(note)}" for note in found.notes))
    return "\n\n".join(parts)


def _verdict(found: "Rehearsal") -> str:
    from harness.costs import duration

    if found.will_run:
        said = "everything that could be tried will run" if found.unknown else "it will run"
    else:
        said = f"it will not run as it is: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"
    return f"Rehearsal of {printable(found.recipe)}: {said}. Rehearsed in {duration(found.seconds)}."


def _stages(rows: "Sequence[Row]") -> str:
    from rich.text import Text

    from ctpd.cli.terminal import rendered, table
    from ctpd.rehearsal.costs import gib, operations_text

    lines = [
        (
            Text(row.state, style="" if row.state == "ran" else "yellow" if row.state == "not tried" else "red"),
            _number(row),
            "" if row.memory is None else gib(row.memory),
            "" if row.operations is None else operations_text(row.operations),
            row.label,
        )
        for row in rows
    ]
    heads = ["rehearsed", "stages", "memory", "operations", "stage"]
    return rendered(table(heads, lines, right=(1, 2, 3)))


def _number(row: "Row") -> str:
    if row.tried < row.stages:
        return f"{row.tried} of {row.stages}"
    return "" if row.stages == 1 else str(row.stages)


def _how_much(found: "Rehearsal") -> Iterator[str]:
    """The pairs, the sum of the operations, and what these figures are."""
    from ctpd.rehearsal.costs import operations_text
    from harness.costs import duration

    if found.pairs is not None:
        pairs = found.pairs
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in pairs["dropped"].items())
        yield (
            f"Pairs: {pairs['pairs']:,} are used{f', dropped: {dropped}' if dropped else ''}; "
            f"{pairs['tokens']['teacher']:,} tokens of the teacher, {pairs['tokens']['student']:,} of the student, "
            f"{pairs['spans']:,} spans."
        )
    alone = found.processes == 1
    devices = "a device that sustains" if alone else f"{found.processes} devices that sustain"
    how = (
        "" if alone else ", with the trained model sharded (FSDP)" if found.sharded else ", with the whole model (DDP)"
    )
    hours = duration(found.operations / SUSTAINED / found.processes)
    yield (
        f"In all {operations_text(found.operations)}: {hours} on {devices} {SUSTAINED / 1e12:.0f} TFLOP/s. "
        f"Computed for the real models, not measured (docs/scale.md). Memory is that of one device{how}. Operations: 2 N a token "
        "forward, 4 N backward, and attention; requests of tasks as long as those that were tried."
    )


def _listed(title: str, problems: "Sequence[Problem]") -> list[str]:
    if not problems:
        return []
    return [f"{title}:\n" + "\n".join(f"- {printable(one.where)}: {printable(one.text)}" for one in problems)]
