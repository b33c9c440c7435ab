"""What is said when the tables cannot be written, as in a store that is read-only."""

from pathlib import Path

import click

from ctpd.core import disk
from ctpd.core.printing import command


def report_unwritten(error: OSError, folder: Path, *, recipe: str, store: Path, required: bool) -> None:
    """Say on standard error that the tables are only printed, and how to write them elsewhere.

    Raises:
        UserError: it was the command's purpose to write them.
        OSError: ``error``, if it says nothing about the folder.
    """
    if disk.explained(error, folder=folder) is None:
        raise error
    what = f"the tables cannot be written ({disk.reason(error)})"
    elsewhere = command("compare", recipe, "--to", "DIR", store=store)
    if required:
        raise disk.DiskError(what, where=str(folder), fix=f"Name another folder: `{elsewhere}`") from error
    click.echo(f"Note: {what}: {folder}. They are only printed; `{elsewhere}` writes them.", err=True)
