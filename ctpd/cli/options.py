"""The execution flags, each defined once; no flag changes what is computed, except that --limit evaluates less.

A flag that would do nothing is refused (`refuse`). With --plan the flags that say how to execute are accepted: it shows
the stages of the same command.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ctpd.core.printing import DEFAULT_STORE

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

OPTIONS: dict[str, Decorator] = {
    "store": click.option(
        "--store", type=click.Path(path_type=Path), envvar="CTPD_STORE", default=DEFAULT_STORE, show_default=True,
        help="Folder of the artifacts (also $CTPD_STORE).",
    ),
    "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    "num_processes": click.option(
        "--num-processes", type=click.IntRange(min=1), metavar="N",
        help="Train and score with N processes, each on its own GPU [default: the recipe's `launch` block].",
    ),
    "jobs": click.option(
        "--jobs", type=click.IntRange(min=1), default=1, metavar="J",
        help="Build J independent stages at a time, each in a process of its own, on the GPUs in turn.",
    ),
    "offline": click.option("--offline", is_flag=True, help="Never ask the hub for anything."),
    "only": click.option("--only", multiple=True, metavar="RUN", help="Only this run; may be repeated."),
    "seed": click.option("--seed", multiple=True, type=int, help="Only this seed; may be repeated."),
    "plan": click.option("--plan", is_flag=True, help="Show stages, hits and misses; run nothing."),
    "limit": click.option("--limit", type=click.IntRange(min=1), help="Evaluate only so many documents of each task."),
    "rebuild": click.option("--rebuild", is_flag=True, help="Check every artifact and rebuild damaged ones."),
    "report_to": click.option("--report-to", multiple=True, help="A logger of transformers, e.g. tensorboard or wandb."),
    "log_dir": click.option(
        "--log-dir", type=click.Path(path_type=Path),
        help="With --report-to: the folder that loggers write files into [default: `logs` in the store].",
    ),
    "samples": click.option(
        "--samples", type=click.Path(path_type=Path), metavar="DIR",
        help="Copy the answers that evaluations keep into this folder, as sample files in lm-eval's format.",
    ),
    "quiet": click.option("--quiet", is_flag=True, help="No progress."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    "debug": click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
}  # fmt: skip


def variables(given: Sequence[str], *, option: str) -> dict[str, Any]:
    """`NAME=VALUE` of a repeated option, with the value as a recipe's YAML would have it."""
    import yaml

    found = {}
    for item in given:
        name, value = parted(item, option=option, form="NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.UsageError(f"{option}: the value of '{item}' is not YAML.") from error
    return found


def parted(item: str, *, option: str, form: str) -> tuple[str, str]:
    """What stands before and after the first `=` of an option's value, which is of the given form."""
    name, sign, value = item.partition("=")
    if not (sign and name):
        raise click.UsageError(f"{option}: '{item}' is not {form}.")
    return name, value


def execution(*names: str) -> Decorator:
    """Add the named flags to a command, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed((*names, "debug")):
            function = OPTIONS[name](function)
        return function

    return decorate


def given(name: str) -> bool:
    """Whether the user has written the parameter ``name`` on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def refuse(*names: str, because: str) -> None:
    """Refuse the parameters ``names`` where they would do nothing.

    Raises:
        click.UsageError: one of them is on the command line.
    """
    for name in names:
        if given(name):
            flag = name.removeprefix("as_").replace("_", "-")
            raise click.UsageError(f"--{flag} does nothing here: {because}.")


def prepare(*, offline: bool, device: str = "auto") -> str:
    """Set what the libraries read once, when they are imported; call it before them. Returns the device to use.

    `cuda:N` hides all other GPUs, because the trainer takes the first one that it sees; the device is `cuda` then.
    In one of several processes, and where CUDA is in use already, nothing is hidden.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return device
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return device
    visible = visible_gpu(int(number))
    if visible is None:
        return device  # `check_device` refuses it
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return "cuda"


def visible_gpu(number: int) -> str | None:
    """The value of CUDA_VISIBLE_DEVICES that shows one GPU of those that this process sees; None if it sees fewer."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not seen:
        return str(number)
    names = seen.split(",")
    return names[number] if number < len(names) else None
