"""Loggers of `transformers`: which of them can be used here, and where they write a training's metrics."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpd.core.config import nearest
from ctpd.core.errors import UserError

_NOT_KEPT = {"codecarbon"}  # loggers that write beside the resume states, which are removed


@dataclass(frozen=True, kw_only=True)
class LogTarget:
    """Where loggers write one training; no key and no number depends on it.

    Attributes:
        folder: of all loggers that write files.
        project: the recipe's name.
        run: the training's name, as in progress lines.
        key: of the training's artifact: trainings of one name with other settings have files of their own.
    """

    folder: Path
    project: str
    run: str
    key: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that loggers read, for what `TrainingArguments` cannot say."""
        folder, project = self.folder.absolute(), _plain(self.project)
        return {
            "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard" / project / _plain(self.run) / self.key[:12]),
            "WANDB_DIR": str(folder),  # wandb makes the folder `wandb` in it
            "WANDB_PROJECT": project,
            "TRACKIO_DIR": str(folder / "trackio"),
            "MLFLOW_EXPERIMENT_NAME": project,
        }

    @property
    def arguments(self) -> dict[str, str]:
        """The arguments of `TrainingArguments` that name the project and the run."""
        return {"project": _plain(self.project), "run_name": self.run}


def check_loggers(names: Sequence[str], folder: Path | None, *, default: Path | None = None) -> None:
    """Refuse what cannot log, before anything is computed; make the ``folder`` that the user has named.

    Args:
        names: of loggers.
        folder: that the user has named; None for ``default``.
        default: where logs are written otherwise. A logger may read its folder when it is imported, which this does.

    Raises:
        UserError: an unknown logger, or one whose package is not installed or cannot be imported.
        OSError: the folder cannot be made.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    logs = folder or default
    target = None if logs is None else LogTarget(folder=logs, project="", run="", key="")
    loggers = {name: made for name, made in INTEGRATION_TO_CALLBACK.items() if name not in _NOT_KEPT}
    for name in names:
        if name not in loggers:
            raise UserError(
                f"`--report-to {name}` is not a logger.{nearest(name, loggers)}",
                fix=f"The loggers are {', '.join(sorted(loggers))}",
            )
        if name not in get_available_reporting_integrations():
            raise UserError(
                f"`--report-to {name}` needs a package that is not installed",
                fix=f"Install it (for most loggers: `pip install {name}`), or leave the flag out",
            )
        try:
            with logging_to(target):
                loggers[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"`--report-to {name}` does not work here: {error}",
                fix="Install its package anew, or leave the flag out",
            ) from error
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def logging_to(target: LogTarget | None) -> Iterator[None]:
    """While the block runs, loggers that are made write to ``target``; a variable that the user has set stays.

    A run of wandb that was opened in the block is finished with it, so that the next training has one of its own.
    """
    values = {} if target is None else target.variables
    added = {name: value for name, value in values.items() if name not in os.environ}
    had_run = _wandb_run() is not None
    os.environ.update(added)
    try:
        yield
    finally:
        _remove(added)
        run = _wandb_run()
        if run is not None and not had_run:
            run.finish()


def _remove(added: Mapping[str, str]) -> None:
    for name in added:
        os.environ.pop(name, None)


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _plain(name: str) -> str:
    """The name with `_` in place of what a file system or a logger's server refuses."""
    return re.sub(r"[^\w .,()=+-]", "_", name).strip(" .") or "_"
