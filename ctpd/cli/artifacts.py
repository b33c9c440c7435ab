"""The commands about artifacts and the environment: export, store, doctor."""

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
    """Look after the artifacts."""


@store.command()
@execution("store", "json")
def du(*, store: Path, as_json: bool) -> None:
    """What is there, largest first."""
    from ctpd.core.store import Store

    found = Store(store).artifacts()
    if as_json:
        click.echo(json.dumps([{"stage": a.stage, "key": a.key, "bytes": a.bytes} for a in found]))
        return
    for artifact in found:
        click.echo(f"{artifact.bytes / 2**20:>10.1f} MiB  {artifact.stage}/{artifact.key}")
    click.echo(f"{sum(a.bytes for a in found) / 2**20:>10.1f} MiB  {len(found)} artifacts in {store}")


@store.command()
@click.argument("keys", nargs=-1, required=True)
@execution("store")
def rm(keys: tuple[str, ...], *, store: Path) -> None:
    """Remove the artifacts KEYS; what needs them is made anew by the next run."""
    from ctpd.core.store import Store

    opened = Store(store)
    for artifact in [opened.find(key) for key in keys]:
        opened.remove(artifact.stage, artifact.key)
        click.echo(f"Removed {artifact.stage}/{artifact.key}")


@store.command()
@click.argument("recipes", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@execution("store")
def gc(recipes: tuple[str, ...], *, store: Path, dry_run: bool) -> None:
    """Remove everything that none of RECIPES needs, and what interrupted builds left."""
    import shutil

    from ctpd.app import plan
    from ctpd.core.store import Store

    opened = Store(store)
    kept = {stage.key for recipe in recipes for stage in plan(recipe).stages}
    gone = [artifact for artifact in opened.artifacts() if artifact.key not in kept]
    partials = [path for path in opened.partials() if path.name.removesuffix(".partial") not in kept]
    for artifact in gone:
        if not dry_run:
            opened.remove(artifact.stage, artifact.key)
    for path in partials:
        if not dry_run:
            shutil.rmtree(path)
    freed = sum(artifact.bytes for artifact in gone) / 2**20
    click.echo(
        f"{'Would remove' if dry_run else 'Removed'} {len(gone)} artifacts and {len(partials)} partial builds, {freed:.1f} MiB."
    )


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
    for name, version in facts["versions"].items():
        click.echo(f"{name:<14} {version}")
    click.echo(f"{'device':<14} {facts['device']}, {facts['threads']} of {facts['cores']} cores")
    click.echo(f"{'offline':<14} HF_HUB_OFFLINE={facts['HF_HUB_OFFLINE']}")
    missing = sorted({"torch", "transformers", "lm_eval", "peft", "accelerate", "datasets"} - set(facts["versions"]))
    click.echo(
        f"Missing: {', '.join(missing)}. Run `make setup`." if missing else "Everything that ctpd needs is here."
    )
