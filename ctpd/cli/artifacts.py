"""The commands about artifacts and the environment: export, store, doctor."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.options import execution, refuse
from ctpd.core.errors import NotReproduced
from ctpd.core.printing import json_text, printable

if TYPE_CHECKING:
    from ctpd.cli.determinism import Compared


@click.command()
@click.argument("key")
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The new directory.")
@click.option("--merge", is_flag=True, help="Merge LoRA adapters into the weights.")
@click.option(
    "--with-base", is_flag=True, help="Of a LoRA training, write the model that the adapter belongs to beside it."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Number format of the weights [default: as trained]."
)
@execution("store")
def export(key: str, *, to: Path, store: Path, **form: Any) -> None:
    """Write the trained model KEY (the beginning of a key is enough) as a plain transformers or PEFT directory.

    The tokenizer comes with it, and where the recipe has a plain template, that as the tokenizer's chat template.
    """
    from ctpd.core.store import Store
    from ctpd.export import ExportForm, export_model

    if form["merge"]:
        refuse("with_base", because="with --merge the weights are whole")
    click.echo(export_model(Store(store), key, to=to, form=ExportForm(**form)))


@click.group()
def store() -> None:
    """List and remove artifacts."""


@store.command()
@execution("store", "json")
def du(*, store: Path, as_json: bool) -> None:
    """List the artifacts, largest first: size, key, and what each is."""
    from ctpd.core.store import Store
    from ctpd.inspection.artifacts import artifact_label

    opened = Store(store)
    opened.check_marked()
    found = [(artifact, artifact_label(opened, artifact)) for artifact in opened.artifacts()]
    if as_json:
        rows = [{"stage": a.stage, "key": a.key, "bytes": a.bytes, "label": label} for a, label in found]
        click.echo(json_text(rows))
        return
    from ctpd.cli.terminal import rendered, table

    lines = [(_mebibytes(artifact.bytes), f"{artifact.stage}/{artifact.key}", label) for artifact, label in found]
    total = (_mebibytes(sum(a.bytes for a, _ in found)), f"{_counted(len(found), 'artifact')} in {store}", "")
    click.echo(rendered(table(["", "", ""], [*lines, total], right=(0,))))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@store.command()
@click.argument("keys", nargs=-1, required=True)
@execution("store")
def rm(keys: tuple[str, ...], *, store: Path) -> None:
    """Remove the artifacts KEYS; a later run builds them again where it needs them."""
    from ctpd.core.errors import UserError
    from ctpd.core.store import Store

    opened = Store(store)
    opened.check_removable()
    for artifact in [opened.find(key) for key in keys]:
        with opened.try_lock(artifact.stage, artifact.key) as free:
            if not free:
                raise UserError(
                    f"another process is working on {artifact.stage}/{artifact.key}", fix="Wait until it has finished"
                )
            opened.remove(artifact.stage, artifact.key)
        click.echo(f"Removed {artifact.stage}/{artifact.key}")


@store.command()
@click.argument("recipes", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@execution("store")
def gc(recipes: tuple[str, ...], *, store: Path, dry_run: bool) -> None:
    """Remove everything that none of RECIPES needs, and what interrupted builds left.

    Evaluations and records that `--limit` made of RECIPES are kept.
    """
    from ctpd.app import evaluated_parts
    from ctpd.cli.terminal import rendered, table
    from ctpd.core.store import Store
    from ctpd.inspection.artifacts import artifact_label
    from ctpd.pipeline.graph import Graph

    opened = Store(store)
    if dry_run:
        opened.check_marked()
    else:
        opened.check_removable()
    parts = [part for recipe in recipes for part in evaluated_parts(recipe, opened)]
    kept = {stage.key for part in parts for stage in Graph([*part.choices, *part.records]).stages}
    unneeded = {(a.stage, a.key): (a.bytes, artifact_label(opened, a)) for a in opened.artifacts() if a.key not in kept}
    partials = [(path.parent.name, path.name.removesuffix(".partial")) for path in opened.partials()]
    left = [(stage, key) for stage, key in partials if key not in kept]
    lines, removed, num_busy = [], set(), 0
    for stage, key in sorted({*unneeded, *left}):
        with contextlib.nullcontext(True) if dry_run else opened.try_lock(stage, key) as free:
            if not free:
                num_busy += 1
                continue
            if not dry_run:
                opened.remove(stage, key)
        size, label = unneeded.get((stage, key), (0, "an interrupted build"))
        lines.append((_mebibytes(size), f"{stage}/{key}", label))
        removed.add((stage, key))
    if lines:
        click.echo(rendered(table(["", "", ""], lines, right=(0,))))
    what = f"{_counted(len(removed & {*unneeded}), 'artifact')} and {_counted(len(removed & {*left}), 'partial build')}"
    freed = sum(size for one, (size, _) in unneeded.items() if one in removed)
    click.echo(f"{'Would remove' if dry_run else 'Removed'} {what}, {_mebibytes(freed)}.")
    if num_busy:
        click.echo(f"Left {num_busy} that other processes are working on.")


@click.command()
@click.option(
    "--deterministic", is_flag=True, help="Train a small model twice, and say whether all numbers are the same."
)
@execution("json")
def doctor(*, deterministic: bool, as_json: bool) -> None:
    """Check the environment: versions, devices, threads, offline settings.

    --deterministic takes about half a minute; its exit code is 1 where numbers differ.
    """
    import os

    import torch

    from ctpd.pipeline.runtime import versions

    facts: dict[str, Any] = {
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "not set"),
    }
    compared = _made_twice() if deterministic else []
    is_same = not any(one.differing for one in compared)
    if deterministic:
        facts["deterministic"] = {"same": is_same, "stages": [one._asdict() for one in compared]}
    if as_json:
        click.echo(json_text(facts))
    else:
        _print_facts(facts)
        if deterministic:
            _print_compared(compared)
    if not is_same:
        raise NotReproduced("The same training gives other numbers each time on this machine.")


def _made_twice() -> "list[Compared]":
    from ctpd.cli.determinism import twice

    return twice()


def _print_compared(compared: "Sequence[Compared]") -> None:
    """Whether a training that was made twice is the same, and which of its stages are not."""
    different = [one for one in compared if one.differing]
    made = f"A small training was made twice, in two processes and folders: of its {len(compared)} stages"
    if not different:
        click.echo(f"{made} all are the same, bit for bit.")
        return
    click.echo(f"{made} {len(different)} differ; the first of them is where to look.")
    for one in different:
        gap = f"; logged numbers differ by up to {one.gap:.1e} of their size" if one.gap else ""
        click.echo(f"  {printable(one.stage)}: {printable(', '.join(one.differing))}{gap}")


def _print_facts(facts: Mapping[str, Any]) -> None:
    from ctpd.cli.terminal import rendered, table

    rows = [
        *facts["versions"].items(),
        ("device", f"{facts['device']}, {facts['threads']} of {facts['cores']} cores"),
        ("offline", f"HF_HUB_OFFLINE={facts['HF_HUB_OFFLINE']}"),
    ]
    click.echo(rendered(table(["", ""], rows)))
    missing = sorted({"torch", "transformers", "lm_eval", "peft", "accelerate", "datasets"} - set(facts["versions"]))
    if missing:
        click.echo(f"Missing: {', '.join(missing)}. Run `make setup`.")
    else:
        click.echo("Everything that ctpd needs is here.")
