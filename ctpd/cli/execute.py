"""How the commands about a recipe run it: their flags, the plan, this process or several."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.options import prepare, refuse
from ctpd.core.printing import command, json_text, printable

if TYPE_CHECKING:
    from ctpd.app import Experiment
    from ctpd.core.store import Store
    from ctpd.pipeline.graph import Graph, PlanLine
    from ctpd.pipeline.stage import Stage
    from ctpd.recipe import LaunchSpec

RUNNING = (
    "store",
    "device",
    "num_processes",
    "jobs",
    "offline",
    "only",
    "seed",
    "limit",
    "plan",
    "rebuild",
    "report_to",
    "log_dir",
    "quiet",
    "json",
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The values of the flags of `RUNNING` (`ctpd.cli.options.OPTIONS` explains them); a command may have fewer.

    `usable_device` is what `prepare` made of `device`.
    """

    store: Path
    device: str = "auto"
    num_processes: int | None = None
    jobs: int = 1
    offline: bool = False
    only: tuple[str, ...] = ()
    seed: tuple[int, ...] = ()
    limit: int | None = None
    plan: bool = False
    rebuild: bool = False
    report_to: tuple[str, ...] = ()
    log_dir: Path | None = None
    quiet: bool = False
    as_json: bool = False
    usable_device: str = "auto"


def prepared(**values: Any) -> Flags:
    """The flags of a command; call it before the libraries are imported, since it sets what they read once."""
    flags = Flags(**values)
    if not flags.report_to:
        refuse("log_dir", because="--report-to names no logger")
    return dataclasses.replace(flags, usable_device=prepare(offline=flags.offline, device=flags.device))


def opened(recipe: str, flags: Flags) -> "tuple[Experiment, Store]":
    """The part of a recipe that the flags choose, and the store."""
    from ctpd.app import Experiment
    from ctpd.core.store import Store

    return Experiment(recipe, only=flags.only, seeds=flags.seed, limit=flags.limit), Store(flags.store)


def execute(
    targets: "Sequence[Stage]", store: "Store", launch: "LaunchSpec", flags: Flags, *, project: str = "ctpd"
) -> bool:
    """Run the graph of ``targets``, or show it with --plan; returns whether this process has results to print.

    Args:
        targets: what is wanted; what they need is built, too.
        store: where artifacts are.
        launch: the recipe's block.
        flags: of the command.
        project: the name under which loggers file the trainings: the recipe's.

    Raises:
        UserError: no such device or logger; flags that contradict each other.
    """
    from ctpd.cli.launch import helpers, processes_to_start, run_launched
    from ctpd.core.processes import processes
    from ctpd.core.temporary import kept_in
    from ctpd.pipeline.build import build_missing
    from ctpd.pipeline.graph import Graph
    from ctpd.pipeline.notes import plan_notes, refuse_idle
    from ctpd.pipeline.progress import Progress
    from ctpd.pipeline.runtime import Runtime
    from ctpd.train.loggers import check_loggers

    graph = Graph(targets)
    refuse_idle(graph)
    if flags.plan:
        _print_plan(graph.plan(store), [*plan_notes(graph), *_pairs_hint(graph, flags)], as_json=flags.as_json)
        return False
    count = processes_to_start(launch, num_processes=flags.num_processes, jobs=flags.jobs)
    device = _checked_device(flags, count=count)
    check_loggers(flags.report_to, flags.log_dir)
    rebuild, argv = flags.rebuild, click.get_current_context().find_root().obj
    runtime = Runtime.of(launch, device=device, report_to=flags.report_to, log_dir=flags.log_dir, project=project)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_in(store.root))
        if count > 1 or flags.jobs > 1:
            graph.check(store, rebuild=rebuild)  # here, once: no process may remove what another reads
            rebuild = False
            if graph.missing(store) and count > 1:
                run_launched(argv, count=count, device=device)
                return False  # rank 0 has printed
            if graph.missing(store):
                stack.enter_context(helpers(argv, jobs=flags.jobs, device=device, quiet=flags.quiet))
        built = build_missing(graph, store, runtime=runtime, progress=Progress(quiet=flags.quiet), rebuild=rebuild)
    processes().destroy_process_group()
    if not flags.quiet and processes().is_main:
        left = len(graph.stages) - built
        click.echo(f"{built} stage{'' if built == 1 else 's'} built, {left} not needed or already there.\n", err=True)
    return processes().is_main


def _checked_device(flags: Flags, *, count: int) -> str:
    """The device to run on, checked before the first stage.

    Raises:
        UserError: there is none of that name, or it is one device for ``count`` processes.
    """
    from ctpd.core.processes import processes
    from ctpd.pipeline.runtime import check_device, one_device_for_all

    if count > 1 and flags.device not in ("auto", "cpu", "cuda"):
        raise one_device_for_all(flags.device, count)
    if count == processes().world_size == 1:  # for several, `run_launched` counts the GPUs
        check_device(flags.usable_device)
    return flags.usable_device


def _pairs_hint(graph: "Graph", flags: Flags) -> list[str]:
    """Where to see what each model will read, of a recipe with pairs."""
    recipe = click.get_current_context().params.get("recipe")
    if recipe is None or not any(stage.kind == "pairs" for stage in graph.stages):
        return []
    return [f"What each model reads of the pairs: {command('inspect', 'pairs', recipe, store=flags.store)}"]


def _print_plan(lines: "Sequence[PlanLine]", notes: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        click.echo(json_text([{"stage": x.kind, "label": x.label, "key": x.key, "hit": x.hit} for x in lines]))
        return
    from rich.text import Text

    from ctpd.cli.terminal import rendered, table

    states = {True: Text("hit"), False: Text("miss", style="yellow")}
    rows = [(states[line.hit], line.key[:12], line.label) for line in lines]
    click.echo(rendered(table(["", "key", "stage"], rows)))
    hits = sum(line.hit for line in lines)
    click.echo("\n" + "".join(f"Note: {printable(note)}\n" for note in notes), nl=False)
    click.echo(f"{len(lines)} stages: {hits} hits, {len(lines) - hits} misses. Nothing was run.")
