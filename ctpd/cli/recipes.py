"""The commands about recipes: run, train, eval, compare, recipes, init."""

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.launch import started_by_user
from ctpd.cli.options import DEFAULT_STORE, execution

if TYPE_CHECKING:
    from ctpd.app import Experiment
    from ctpd.core.store import Store
    from ctpd.pipeline.graph import Stage
    from ctpd.pipeline.runs import PlannedRun
    from ctpd.recipe import LaunchSpec
    from harness.record import ColumnResult

RUNNING = (
    "store", "device", "num_processes", "jobs", "offline", "only", "seed", "limit", "plan", "rebuild", "report_to", "quiet",
    "json",
)  # fmt: skip


@click.command()
@click.argument("recipe")
@execution(*RUNNING)
def run(recipe: str, *, as_json: bool, plan: bool, **flags: Any) -> None:
    """Train, evaluate and compare everything in RECIPE that is missing; print the main table."""
    experiment, store = _experiment(recipe, **flags)
    if not plan and started_by_user():
        experiment.check_suite(store)
    if _execute(experiment.records, store, experiment.recipe.launch, plan=plan, as_json=as_json, **flags):
        _print_tables(experiment, store, formats=("txt",), as_json=as_json, first_only=True)


@click.command()
@click.argument("recipe")
@execution(*(name for name in RUNNING if name != "limit"))
def train(recipe: str, *, as_json: bool, plan: bool, **flags: Any) -> None:
    """Train every run of RECIPE."""
    experiment, store = _experiment(recipe, **flags)
    if not _execute(experiment.training, store, experiment.recipe.launch, plan=plan, as_json=as_json, **flags):
        return
    made = [{"run": r.name, "seed": r.seed, "key": getattr(r.model.newest, "key", None)} for r in experiment.runs]
    if as_json:
        click.echo(json.dumps(made))
        return
    for item in made:
        key = item["key"]
        click.echo(
            f"{item['run']:<28} seed {item['seed'] if item['seed'] is not None else '-'}   {key or 'ready-made'}"
        )
    click.echo(f"\nThe models are in {store.root}; `ctpd export KEY --to DIR` writes one as a plain directory.")


@click.command("eval")
@click.argument("recipe", required=False)
@click.option("--model", help="Any model directory or hub id, instead of a recipe.")
@click.option("--suite", default="card", show_default=True, help="With --model: the suite.")
@click.option("--data-root", type=click.Path(path_type=Path), help="With --model: a folder that mirrors the hub.")
@execution(*RUNNING)
def evaluate(
    recipe: str | None,
    *,
    model: str | None,
    suite: str,
    data_root: Path | None,
    as_json: bool,
    plan: bool,
    **flags: Any,
) -> None:
    """Evaluate what RECIPE has trained, training what is missing; or any --model."""
    if (recipe is None) == (model is None):
        raise click.UsageError("Give a RECIPE or --model, one of them.")
    if model is not None:
        _evaluate_model(model, suite, data_root=data_root, as_json=as_json, plan=plan, **flags)
        return
    assert recipe is not None
    experiment, store = _experiment(recipe, **flags)
    if not plan and started_by_user():
        experiment.check_suite(store)
    stages = [stage for columns in experiment.evaluations.values() for stage in columns.values()]
    if _execute(stages, store, experiment.recipe.launch, plan=plan, as_json=as_json, **flags):
        named = {run.title: experiment.evaluations[i] for i, run in enumerate(experiment.runs)}
        _print_scores(named, store, as_json=as_json)


@click.command()
@click.argument("recipe")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["txt", "md", "csv", "tex", "html"]), default=("txt",)
)
@click.option(
    "--to", type=click.Path(path_type=Path), help="Keep tables and records in this folder, apart from the store."
)
@execution("store", "only", "seed", "limit", "json")
def compare(recipe: str, *, formats: tuple[str, ...], to: Path | None, as_json: bool, **flags: Any) -> None:
    """Write every table of RECIPE in every format, the figures and the report, from records alone; print one format."""
    experiment, store = _experiment(recipe, **flags)
    _print_tables(experiment, store, formats=formats, as_json=as_json, to=to)


@click.command()
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a recipe, for editors.")
@execution("json")
def recipes(*, schema: bool, as_json: bool) -> None:
    """List the shipped recipes."""
    from ctpd.recipe import load_recipe, shipped_recipes

    if schema:
        from ctpd.recipe.schema import schema_file

        click.echo(schema_file().read_text(encoding="utf-8"), nl=False)
        return
    found = {name: load_recipe(name).about for name in shipped_recipes()}
    width = max(map(len, found))
    click.echo(json.dumps(found) if as_json else "\n".join(f"{name:<{width}} {about}" for name, about in found.items()))


@click.command()
@click.option("--teacher", required=True, help="Model directory, or hub id@revision.")
@click.option("--student", required=True, help="Model directory, or hub id@revision.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Pairs: jsonl, json, parquet or csv.")
@click.option("--to", type=click.Path(path_type=Path), default="recipe.yaml", show_default=True)
@execution()
def init(teacher: str, student: str, data: Path, to: Path) -> None:
    """Write a recipe for your own pair of models and data."""
    from ctpd.cli.template import write_recipe

    write_recipe(to, teacher=teacher, student=student, data=data)
    click.echo(f"Wrote {to}. Read it through, then: ctpd run {to} --plan")


def _experiment(recipe: str, *, store: Path, offline: bool = False, **flags: Any) -> "tuple[Experiment, Store]":
    _go_offline(offline)
    from ctpd.app import Experiment
    from ctpd.core.store import Store

    limit = flags.get("limit")
    return Experiment(recipe, only=flags.get("only", ()), seeds=flags.get("seed", ()), limit=limit), Store(store)


def _go_offline(offline: bool) -> None:
    """Before the libraries are imported: they read it once."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _execute(
    targets: "Sequence[Stage]", artifacts: "Store", launch: "LaunchSpec", /, *, plan: bool, as_json: bool, rebuild: bool,
    quiet: bool, num_processes: int | None, jobs: int, **flags: Any,
) -> bool:  # fmt: skip
    """Run the graph of ``targets``, or show it with ``plan``; says whether this process has results to print."""
    from ctpd.cli.launch import helpers, processes_to_start, run_launched
    from ctpd.core.processes import processes
    from ctpd.pipeline.build import build_missing
    from ctpd.pipeline.graph import Graph
    from ctpd.pipeline.progress import Progress
    from ctpd.pipeline.runtime import Runtime

    graph = Graph(targets)
    if plan:
        _print_plan(graph.plan(artifacts), as_json=as_json)
        return False
    count = processes_to_start(launch, num_processes=num_processes, jobs=jobs)
    device, argv = flags["device"], click.get_current_context().find_root().obj
    beside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if count > 1 or jobs > 1:
        graph.check(artifacts, rebuild=rebuild)  # here, once: no process may remove what another reads
        rebuild = False
        if graph.missing(artifacts) and count > 1:
            run_launched(argv, count=count, device=device)
            return False  # the first of them has printed
        if graph.missing(artifacts):
            beside = helpers(argv, jobs=jobs, device=device, quiet=quiet)
    runtime = Runtime.of(launch, device=device, report_to=flags["report_to"])
    with beside:
        built = build_missing(graph, artifacts, runtime=runtime, progress=Progress(quiet=quiet), rebuild=rebuild)
    processes().destroy_process_group()
    if not quiet and processes().is_main:
        click.echo(
            f"{built} stage{'s' if built != 1 else ''} built, {len(graph.stages) - built} not needed or already there.\n",
            err=True,
        )
    return processes().is_main


def _print_plan(lines: Sequence[Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([{"stage": x.kind, "label": x.label, "key": x.key, "hit": x.hit} for x in lines]))
        return
    for line in lines:
        click.echo(f"{'hit ' if line.hit else 'miss'}  {line.key[:12]}  {line.label}")
    hits = sum(line.hit for line in lines)
    click.echo(f"\n{len(lines)} stages: {hits} hits, {len(lines) - hits} misses. Nothing was run.")


def _print_tables(
    experiment: "Experiment", store: "Store", *, formats: Sequence[str], as_json: bool, first_only: bool = False,
    to: Path | None = None,
) -> None:  # fmt: skip
    """Write every table, print them all or the main one; with ``to`` keep the records beside them."""
    from ctpd import app
    from harness import comparison
    from harness.formats import FORMATS, json_rows

    records = app.read_records(experiment, store)
    for package, versions in comparison.differing_versions(records).items():
        click.echo(f"Warning: the records were made with {package} {' and '.join(versions)}.", err=True)
    for lost in app.missing_runs(experiment, store):
        click.echo(f"Missing: {lost.title}. Bring it with: {_bringing(experiment, lost, store)}", err=True)
    made = comparison.tables(experiment.recipe, records, columns=[c.name for c in experiment.suite.columns])
    folder = (store.root / "tables" if to is None else to) / experiment.recipe.name
    written = comparison.write_tables(made, folder)
    report = comparison.write_report(experiment.recipe, made, records, folder)
    if not first_only:  # `run` leaves them to `compare`: they take longer than everything else that it prints
        comparison.write_figures(made, records, folder)
    if to is not None:
        comparison.write_records(records, folder / "records")
    if as_json:
        click.echo(json.dumps({table.spec.name: json_rows(table) for table in made}, allow_nan=False))
        return
    for kind in formats:
        click.echo("\n\n".join(FORMATS[kind](table) for table in (made[:1] if first_only else made)))
    names = [path.name for path in written] + ([] if first_only else [f"{comparison.FIGURES}/"])
    click.echo(f"\nWritten to {folder}: {', '.join(names)}\nReport: {report}")


def _bringing(experiment: "Experiment", lost: "PlannedRun", store: "Store") -> str:
    """The command that makes the record of one run, to be pasted into a shell."""
    words = ["ctpd", "run", experiment.source, "--only", lost.name]
    words += [] if lost.seed is None else ["--seed", str(lost.seed)]
    words += [] if experiment.limit is None else ["--limit", str(experiment.limit)]
    words += [] if str(store.root) == DEFAULT_STORE else ["--store", str(store.root)]
    return shlex.join(words)


def _print_scores(named: "dict[str, dict[str, Stage]]", store: "Store", *, as_json: bool) -> None:
    from ctpd.pipeline.stages.evaluate import read_result

    scores = {
        title: {name: read_result(store.path(s.kind, s.key)) for name, s in columns.items()}
        for title, columns in named.items()
    }
    if as_json:
        values = {title: {name: one.value for name, one in columns.items()} for title, columns in scores.items()}
        click.echo(json.dumps(values, allow_nan=False))
        return
    for title, columns in scores.items():
        parts = [f"{name} {_score(one)}" for name, one in columns.items()]
        click.echo(f"{title:<32} {'   '.join(parts)}")


def _score(result: "ColumnResult") -> str:
    """A score in percent; it says so where it is no number or of a part of the documents."""
    value = "not finite" if result.value is None else f"{100 * result.value:.2f}"
    return value if result.limit is None else f"{value} (partial)"


def _evaluate_model(model: str, suite: str, *, data_root: Path | None, as_json: bool, plan: bool, **flags: Any) -> None:
    _go_offline(flags["offline"])
    from ctpd.app import evaluation_stage
    from ctpd.core.store import Store
    from ctpd.pipeline.references import Model, external_model
    from ctpd.recipe import EvaluationSpec, LaunchSpec
    from harness.suites import load_suite

    name, _, revision = model.partition("@")
    root = external_model(name, revision=revision or None, role="--model option")
    spec = EvaluationSpec(suite=suite, limit=flags["limit"], data_root=None if data_root is None else str(data_root))
    stages = {
        column.name: evaluation_stage(Model(root, root), column, spec, precision="float32", title=name)
        for column in load_suite(suite).columns
    }
    store = Store(flags["store"])
    if _execute(list(stages.values()), store, LaunchSpec(), plan=plan, as_json=as_json, **flags):
        _print_scores({model: stages}, store, as_json=as_json)
