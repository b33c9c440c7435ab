"""The commands about artifacts and the environment: export, store, doctor."""

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from ctpd.cli.options import execution


@click.command()
@click.argument("key")
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The new directory.")
@click.option("--merge", is_flag=True, help="Merge LoRA adapters into the weights.")
@execution("store")
def export(key: str, *, to: Path, merge: bool, store: Path) -> None:
    """Write the trained model KEY (the beginning of a key is enough) as a plain transformers directory."""
    from ctpd.core.store import Store
    from ctpd.export import export_model

    click.echo(export_model(Store(store), key, to=to, merge=merge))


@click.group()
def store() -> None:
    """List and remove artifacts."""


@store.command()
@execution("store", "json")
def du(*, store: Path, as_json: bool) -> None:
    """List the artifacts and their sizes, largest first."""
    from ctpd.core.store import Store

    opened = Store(store)
    opened.check_marked()
    found = opened.artifacts()
    if as_json:
        click.echo(json.dumps([{"stage": a.stage, "key": a.key, "bytes": a.bytes} for a in found]))
        return
    from ctpd.cli.terminal import rendered, table

    rows = [(_mebibytes(artifact.bytes), f"{artifact.stage}/{artifact.key}") for artifact in found]
    total = (_mebibytes(sum(a.bytes for a in found)), f"{_counted(len(found), 'artifact')} in {store}")
    click.echo(rendered(table(["", ""], [*rows, total], right=(0,))))


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
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@execution("store")
def gc(recipes: tuple[str, ...], *, store: Path, dry_run: bool) -> None:
    """Remove everything that none of RECIPES needs, and what interrupted builds left."""
    from ctpd.app import plan
    from ctpd.core.store import Store

    opened = Store(store)
    if dry_run:
        opened.check_marked()
    else:
        opened.check_removable()
    kept = {stage.key for recipe in recipes for stage in plan(recipe).stages}
    sizes = {(artifact.stage, artifact.key): artifact.bytes for artifact in opened.artifacts()}
    partials = [(path.parent.name, path.name.removesuffix(".partial")) for path in opened.partials()]
    num_artifacts, num_partials, num_busy, freed = 0, 0, 0, 0
    for stage, key in sorted({*sizes, *partials}):
        if key in kept:
            continue
        with contextlib.nullcontext(True) if dry_run else opened.try_lock(stage, key) as free:
            if not free:
                num_busy += 1
                continue
            if not dry_run:
                opened.remove(stage, key)
        num_artifacts += (stage, key) in sizes
        num_partials += (stage, key) in partials
        freed += sizes.get((stage, key), 0)
    verb = "Would remove" if dry_run else "Removed"
    what = f"{_counted(num_artifacts, 'artifact')} and {_counted(num_partials, 'partial build')}"
    click.echo(f"{verb} {what}, {_mebibytes(freed)}.")
    if num_busy:
        click.echo(f"Left {num_busy} that other processes are working on.")


@click.command()
@execution("json")
def doctor(*, as_json: bool) -> None:
    """Check the environment: versions, devices, threads, offline settings."""
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
    if as_json:
        click.echo(json.dumps(facts))
        return
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
