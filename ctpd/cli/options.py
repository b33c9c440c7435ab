"""The execution flags, each defined once; no flag changes what is computed, except that --limit evaluates less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

DEFAULT_STORE = "runs"

OPTIONS: dict[str, Decorator] = {
    "store": click.option(
        "--store", type=click.Path(path_type=Path), envvar="CTPD_STORE", default=DEFAULT_STORE, show_default=True,
        help="Folder of the artifacts (also $CTPD_STORE).",
    ),
    "device": click.option("--device", default="auto", show_default=True, help="torch device, e.g. cpu or cuda:0."),
    "num_processes": click.option(
        "--num-processes", type=click.IntRange(min=1), metavar="N",
        help="Train and score with N processes, each on a GPU of its own [default: as the recipe's `launch` says].",
    ),
    "jobs": click.option(
        "--jobs", type=click.IntRange(min=1), default=1, metavar="J",
        help="Build J independent parts of the recipe at a time, dealt over the GPUs.",
    ),
    "offline": click.option("--offline", is_flag=True, help="Never ask the hub for anything."),
    "only": click.option("--only", multiple=True, metavar="RUN", help="Only this run; may be repeated."),
    "seed": click.option("--seed", multiple=True, type=int, help="Only this seed; may be repeated."),
    "plan": click.option("--plan", is_flag=True, help="Show stages, hits and misses; run nothing."),
    "limit": click.option("--limit", type=click.IntRange(min=1), help="Evaluate only so many documents of each task."),
    "rebuild": click.option("--rebuild", is_flag=True, help="Check every artifact and rebuild damaged ones."),
    "report_to": click.option("--report-to", multiple=True, help="A logger of transformers, e.g. tensorboard or wandb."),
    "quiet": click.option("--quiet", is_flag=True, help="No progress."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    "debug": click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
}  # fmt: skip


def execution(*names: str) -> Decorator:
    """Add the named flags to a command, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed((*names, "debug")):
            function = OPTIONS[name](function)
        return function

    return decorate
