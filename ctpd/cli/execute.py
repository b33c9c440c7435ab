"""How the commands about a recipe run it: their flags, the plan, this process or several."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.options import prepare, refuse
from ctpd.core.printing import command, json_text, printable

if TYPE_CHECKING:
    from ctpd.app import Experiment
    from ctpd.core.store import Store
    from ctpd.pipeline.estimates import Cost
    from ctpd.pipeline.graph import Graph, PlanLine
    from ctpd.pipeline.runtime import Runtime
    from ctpd.pipeline.stage import Stage
    from ctpd.recipe import LaunchSpec

LATER = "chosen later"  # in a plan, in the place of the key of a stage whose values the trials are still to choose
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
    samples: Path | None = None
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

    store = Store(flags.store)
    return Experiment(recipe, only=flags.only, seeds=flags.seed, limit=flags.limit, store=store), store


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a command builds: ``first``, and then what is known after that.

    Attributes:
        first: stages that are known now; of a recipe with `tune`, the choices of the trials.
        then: called when they are built; None where they are all.
        planned: all stages that are known now.
        later: for a plan, stages like those that follow when the trials have chosen.
    """

    first: "Sequence[Stage]"
    then: "Callable[[], Sequence[Stage]] | None" = None
    planned: "Sequence[Stage]" = ()
    later: "Sequence[Stage]" = ()

    @classmethod
    def of(
        cls, experiment: "Experiment", store: "Store", stages: "Callable[[Experiment], Sequence[Stage]]"
    ) -> "Wanted":
        """What a command about a recipe wants: ``stages`` of the experiment, after the choices of its trials."""
        if experiment.search is None:
            return cls(first=stages(experiment))
        return cls(
            first=experiment.choices,
            then=lambda: stages(experiment.decided(store)),
            planned=stages(experiment),
            later=stages(experiment.outlook) if experiment.later else (),
        )

    def phases(self) -> "Iterator[Graph]":
        """What is built, one graph after the other: each is known when the one before has been built."""
        from ctpd.pipeline.graph import Graph

        yield Graph(self.first)
        if self.then is not None:
            yield Graph(self.then())


def execute(wanted: Wanted, store: "Store", launch: "LaunchSpec", flags: Flags, *, project: str = "ctpd") -> bool:
    """Build what is wanted, or show it with --plan; returns whether this process has results to print.

    Args:
        wanted: the targets; what they need is built, too.
        store: where artifacts are.
        launch: the recipe's block.
        flags: of the command.
        project: the name under which loggers file the trainings: the recipe's.

    Raises:
        UserError: no such device or logger; flags that contradict each other.
    """
    from ctpd.cli.launch import processes_to_start, started_by_user
    from ctpd.core.processes import processes
    from ctpd.pipeline.graph import Graph
    from ctpd.pipeline.model_checks import check_models
    from ctpd.pipeline.notes import plan_notes, refuse_trainings
    from ctpd.pipeline.runtime import LOGS, Runtime
    from ctpd.train.loggers import check_loggers

    graph = Graph([*wanted.first, *wanted.planned])
    outlook = Graph([*graph.targets, *wanted.later])
    count = processes_to_start(launch, num_processes=flags.num_processes, jobs=flags.jobs)
    refuse_trainings(outlook.missing(store), num_processes=max(count, processes().world_size))
    of_models = check_models(outlook.missing(store), local=flags.plan) if started_by_user() else []
    if flags.plan:
        lines = [*graph.plan(store), *_later(graph, outlook, store)]
        notes = [*plan_notes(outlook), *(f"{note}." for note in of_models), *_pairs_hint(graph, flags)]
        _print_plan(lines, notes, as_json=flags.as_json)
        return False
    device = _checked_device(flags, count=count)
    if not flags.quiet:
        click.echo("".join(f"Note: {printable(note)}.\n" for note in of_models), nl=False, err=True)
    check_loggers(flags.report_to, flags.log_dir, default=store.root / LOGS)
    runtime = Runtime.of(launch, device=device, report_to=flags.report_to, log_dir=flags.log_dir, project=project)
    built = _build(wanted, store, flags, runtime, count=count)
    if built is None:
        return False  # rank 0 of the launch has printed
    processes().destroy_process_group()
    if not flags.quiet and processes().is_main:
        num, left = built
        click.echo(f"{num} stage{'' if num == 1 else 's'} built, {left} not needed or already there.\n", err=True)
    return processes().is_main


def _build(wanted: Wanted, store: "Store", flags: Flags, runtime: "Runtime", *, count: int) -> tuple[int, int] | None:
    """Build in this process, with helpers, or in a launch; the stages built and left, None if a launch has done it."""
    from ctpd.cli.launch import helpers, run_launched
    from ctpd.core.temporary import kept_in
    from ctpd.pipeline.build import build_missing
    from ctpd.pipeline.progress import Progress

    argv, built, keys, alone = click.get_current_context().find_root().obj, 0, set[str](), True
    several, renew = count > 1 or flags.jobs > 1, flags.samples is not None
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_in(store.root))
        for graph in wanted.phases():
            if several:
                graph.check(
                    store, rebuild=flags.rebuild, renew=renew
                )  # here, once: no process may remove what another reads
                if alone and graph.missing(store):
                    if count > 1:
                        run_launched(argv, count=count, device=runtime.device)
                        return None
                    stack.enter_context(helpers(argv, jobs=flags.jobs, device=runtime.device, quiet=flags.quiet))
                    alone = False
            progress, rebuild = Progress(quiet=flags.quiet), flags.rebuild and not several
            built += build_missing(graph, store, runtime=runtime, progress=progress, rebuild=rebuild, renew=renew)
            keys |= {stage.key for stage in graph.stages}
    return built, len(keys) - built


def _later(graph: "Graph", outlook: "Graph", store: "Store") -> "list[PlanLine]":
    """The stages that follow when the trials have chosen."""
    from ctpd.pipeline.estimates import Estimates
    from ctpd.pipeline.graph import PlanLine

    known, estimates = {stage.key for stage in graph.stages}, Estimates(store)
    return [
        PlanLine(one.label, one.kind, None, hit=False, cost=estimates.of(one))
        for one in outlook.stages
        if one.key not in known
    ]


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
        click.echo(json_text([_plain(line) for line in lines]))
        return
    from rich.text import Text

    from ctpd.cli.terminal import rendered, table

    shown = any(line.cost is not None for line in lines)
    costs = [_costs(line) if shown else () for line in lines]
    rows = [
        (Text(*_state(line)), (line.key or LATER)[:12], *cost, line.label)
        for line, cost in zip(lines, costs, strict=True)
    ]
    heads = ["", "key", *(["time", "memory", "disk"] if shown else []), "stage"]
    click.echo(rendered(table(heads, rows, right=(2, 3, 4) if shown else ())))
    known = [line for line in lines if line.key is not None]
    hits = sum(line.hit for line in known)
    click.echo("\n" + "".join(f"Note: {printable(note)}\n" for note in notes), nl=False)
    later = len(lines) - len(known)
    more = f" {later} stages follow when the trials have chosen their values." if later else ""
    click.echo(f"{len(known)} stages: {hits} hits, {len(known) - hits} misses.{more} Nothing was run.")
    if hits < len(lines):
        click.echo(_whole_cost([line.cost for line in lines if not line.hit]))


def _state(line: "PlanLine") -> tuple[str, str]:
    """Whether a stage is in the store, in a word and its style."""
    if line.failed:
        return "failed", "red"
    return ("hit", "") if line.hit else ("later" if line.key is None else "miss", "yellow")


def _plain(line: "PlanLine") -> dict[str, object]:
    """A line for --json."""
    found: dict[str, object] = {"stage": line.kind, "label": line.label, "key": line.key, "hit": line.hit}
    cost = None if line.cost is None else line.cost._asdict()
    return found | {"estimate": cost}


def _costs(line: "PlanLine") -> tuple[str, str, str]:
    from harness.costs import duration, mebibytes

    if line.cost is None:
        return "", "", ""
    seconds, memory, disk = line.cost
    return duration(seconds), "" if memory is None else mebibytes(memory), mebibytes(disk / 2**20)


def _whole_cost(costs: "Sequence[Cost | None]") -> str:
    """What the misses may take in all."""
    from ctpd.pipeline.estimates import total
    from harness.costs import duration, mebibytes

    seconds, memory, disk, unknown = total(costs)
    if unknown == len(costs):
        return "No estimate of time and memory: this store has built nothing like it, with these models and data."
    most = "" if memory is None else f", {mebibytes(memory)} of memory in the largest training"
    rest = f"; {unknown} stages, like which this store has built nothing, are not counted" if unknown else ""
    return (
        f"Estimated from the most similar stages of this store: {duration(seconds)} one after another{most}, "
        f"{mebibytes(disk / 2**20)} of disk{rest}."
    )
