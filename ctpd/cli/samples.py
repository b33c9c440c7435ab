"""`--samples`: the kept answers of evaluations as sample files in lm-eval's own format."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctpd.core import disk

if TYPE_CHECKING:
    from ctpd.core.store import Store
    from ctpd.pipeline.stages.evaluate import EvaluateStage

REBUILD = "add --rebuild to evaluate these again"


def write_samples(named: "Mapping[str, Mapping[str, EvaluateStage]]", store: "Store", folder: Path) -> None:
    """Copy the sample files of evaluations to ``folder/MODEL/COLUMN/samples_TASK.jsonl``, and say so on standard error.

    Args:
        named: by the model's title and the column's name; those that are not in the store are left out.
        store: where the evaluations are.
        folder: is made; files of the same names are replaced.

    Raises:
        UserError: the folder cannot be written to.
    """
    from ctpd.pipeline.stages.evaluate import SAMPLES
    from harness.files import file_stem

    written, lacking = 0, 0
    for title, columns in named.items():
        for name, stage in columns.items():
            if not store.has(stage.kind, stage.key):
                continue
            kept = store.path(stage.kind, stage.key) / SAMPLES
            if not kept.is_dir():
                lacking += not stage.is_whole(store.path(stage.kind, stage.key))
                continue
            written += 1
            _copy(kept, folder / file_stem(title) / file_stem(name))
    click.echo(f"Sample files of {written} evaluations: {folder}", err=True)
    if lacking:
        click.echo(f"Note: {lacking} evaluations were made before answers were kept: {REBUILD}.", err=True)


def _copy(kept: Path, target: Path) -> None:
    try:
        shutil.copytree(kept, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    except OSError as error:
        found = disk.explained(error, folder=target)
        if found is None:
            raise
        raise found from error
