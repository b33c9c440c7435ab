"""The commands about recipes: run, train, eval, compare, recipes, init."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.execute import RUNNING, Flags, Wanted, execute, opened, prepared
from ctpd.cli.hub import ask_hub, needs_hub
from ctpd.cli.launch import started_by_user
from ctpd.cli.options import execution, given, parted, refuse, variables
from ctpd.cli.samples import write_samples
from ctpd.cli.scores import refuse_unmeasured, show_scores
from ctpd.cli.tables import Shown, show_chosen, show_tables
from ctpd.core.errors import NotReproduced
from ctpd.core.printing import command, json_text
from ctpd.core.userfiles import exists, user_path

if TYPE_CHECKING:
    from ctpd.app import Experiment
    from ctpd.cli.scores import Results
    from ctpd.core.store import Store
    from ctpd.pipeline.stages.evaluate import EvaluateStage

_OF_A_MODEL = (  # options of `eval --model` alone
    *("suite", "data_root", "precision", "batch_size"),
    *("chat_template", "template_variable", "think_end_token"),
)


@click.command()
@click.argument("recipe", required=False)
@click.option(
    "--from-record",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Instead of a recipe: train and evaluate the row of this record again, and say whether it measures the same; "
    "exit code 1 if not.",
)
@execution(*RUNNING, "samples")
def run(recipe: str | None, *, from_record: Path | None, **values: Any) -> None:
    """Train, evaluate and compare everything in RECIPE that is missing; print the main table.

    --only and --seed choose what is built; the tables show all runs that there are. Tables of a --limit have a folder of
    their own.
    """
    flags = prepared(**values)
    refuse_with_plan(flags)
    if from_record is not None:
        if recipe is not None:
            raise click.UsageError("Give a RECIPE or --from-record, one of them.")
        _reproduce(from_record, flags)
        return
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE'.")
    experiment, store = opened(recipe, flags)
    if not flags.plan and started_by_user():
        _ask_hub(experiment, store)
        experiment.check_suite(store)
    wanted = Wanted.of(experiment, store, lambda chosen: chosen.records)
    if execute(wanted, store, experiment.recipe.launch, flags, project=experiment.recipe.name):
        chosen = experiment.decided(store)
        if flags.samples is not None:
            write_samples(_evaluations(chosen), store, flags.samples)
        show_tables(chosen, store, Shown(as_json=flags.as_json, main_only=True))
        refuse_unmeasured(_results(_evaluations(chosen), store))


def _reproduce(file: Path, flags: Flags) -> None:
    from ctpd.cli.reproduce import check_reproducible, recipe_of_record, show_agreement

    refuse("samples", because="it is for a recipe: run the one that was written into the store")
    record, recipe = recipe_of_record(file, flags.store)
    experiment, store = opened(recipe, flags)
    if started_by_user():
        check_reproducible(record, file, experiment, store)
        if not flags.plan:
            _ask_hub(experiment, store)
            experiment.check_suite(store)
    wanted = Wanted(first=experiment.records)
    if execute(wanted, store, experiment.recipe.launch, flags, project=experiment.recipe.name):
        same = show_agreement(record, experiment, store, as_json=flags.as_json)
        refuse_unmeasured(_results(_evaluations(experiment), store))
        if not same:
            raise NotReproduced(f"{file}: the record was not reproduced, as the last lines say.")


@click.command()
@click.argument("recipe")
@execution(*(name for name in RUNNING if name != "limit"))
def train(recipe: str, **values: Any) -> None:
    """Train every run of RECIPE."""
    flags = prepared(**values)
    refuse_with_plan(flags)
    experiment, store = opened(recipe, flags)
    if not flags.plan and started_by_user():
        _ask_hub(experiment, store)
    wanted = Wanted.of(experiment, store, lambda chosen: chosen.training)
    if not execute(wanted, store, experiment.recipe.launch, flags, project=experiment.recipe.name):
        return
    runs = experiment.decided(store).runs
    trained: list[dict[str, Any]] = [
        {"run": run.name, "seed": run.seed, "key": getattr(run.model.newest, "key", None)} for run in runs
    ]
    if flags.as_json:
        click.echo(json_text(trained))
        return
    from ctpd.cli.terminal import rendered, table

    rows = [
        (item["run"], "-" if item["seed"] is None else str(item["seed"]), item["key"] or "ready-made")
        for item in trained
    ]
    click.echo(rendered(table(["run", "seed", "key"], rows, right=(1,))))
    exporting = command("export", "KEY", "--to", "DIR", store=store.root)
    click.echo(f"\nThe models are in {store.root}; `{exporting}` writes one as a plain directory.")


@click.command("eval")
@click.argument("recipe", required=False)
@click.option("--model", help="Any model directory, or hub id@revision, instead of a recipe.")
@click.option("--suite", default="card", show_default=True, help="With --model: the suite.")
@click.option("--data-root", type=click.Path(path_type=Path), help="With --model: a folder that mirrors the hub.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="With --model: of the weights.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="With --model: requests in one forward pass.",
)
@click.option("--chat-template", is_flag=True, help="With --model: render prompts with the tokenizer's chat template.")
@click.option(
    "--template-variable",
    multiple=True,
    metavar="NAME=VALUE",
    help="With --chat-template: a variable of it, such as enable_thinking=false; may be repeated.",
)
@click.option(
    "--think-end-token", help="With --model: what it generates up to this text, such as </think>, is not scored."
)
@execution(*RUNNING, "samples")
def evaluate(recipe: str | None, *, model: str | None, **values: Any) -> None:
    """Evaluate what RECIPE has trained, training what is missing; or any --model."""
    if (recipe is None) == (model is None):
        raise click.UsageError("Give a RECIPE or --model, one of them.")
    protocol = {name: values.pop(name) for name in _OF_A_MODEL}
    flags = prepared(**values)
    refuse_with_plan(flags)
    if model is not None:
        refuse("only", "seed", because="a --model is one model, not a recipe with runs and seeds")
        refuse("report_to", because="nothing is trained with --model")
        _evaluate_model(model, protocol, flags)
        return
    assert recipe is not None
    refuse(*_OF_A_MODEL, because="the RECIPE says it in its `evaluation` block")
    experiment, store = opened(recipe, flags)
    if not flags.plan and started_by_user():
        _ask_hub(experiment, store)
        experiment.check_suite(store)
    wanted = Wanted.of(
        experiment, store, lambda chosen: [one for columns in chosen.evaluations.values() for one in columns.values()]
    )
    if execute(wanted, store, experiment.recipe.launch, flags, project=experiment.recipe.name):
        named = _evaluations(experiment.decided(store))
        if flags.samples is not None:
            write_samples(named, store, flags.samples)
        show_scores(_results(named, store), as_json=flags.as_json)


def _ask_hub(experiment: "Experiment", store: "Store") -> None:
    """Say before anything is run where the hub is needed and does not answer."""
    missing = bool(experiment.later) or any(not store.has(stage.kind, stage.key) for stage in experiment.records)
    if missing and needs_hub(experiment.recipe.shared, experiment.suite):
        ask_hub()


def refuse_with_plan(flags: Flags) -> None:
    """Refuse --rebuild with --plan: a plan does not look for damage, so its hits would mislead."""
    if flags.plan:
        refuse("rebuild", because="--plan checks no artifact and builds none")
        refuse("samples", because="--plan writes nothing")


@click.command()
@click.argument("recipe")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["txt", "md", "csv", "tex", "html"]),
    default=("txt",),
    help="What to print; may be repeated. All formats are written.",
)
@click.option(
    "--to", type=click.Path(path_type=Path), help="Keep tables and records in this folder, apart from the store."
)
@click.option(
    "--published",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="CSV of scores that others reported (`row` and names of columns), shown as marked rows of the main table.",
)
@execution("store", "only", "seed", "limit", "json")
def compare(recipe: str, *, formats: tuple[str, ...], to: Path | None, published: Path | None, **values: Any) -> None:
    """Write every table of RECIPE in every format, and the report, from records alone; print one format.

    With --only or --seed, print the tables of these rows alone, and write nothing.
    """
    flags = prepared(**values)
    if flags.as_json and given("formats"):
        raise click.UsageError("--format does nothing here: --json prints JSON.")
    if flags.as_json:
        refuse("published", because="--json prints our numbers alone")
    shown = Shown(formats=formats, as_json=flags.as_json, published=published)
    experiment, store = opened(recipe, flags)
    if experiment.is_narrowed:
        refuse("to", because="--only and --seed show a part of the tables, and write nothing")
        show_chosen(experiment, store, shown)
    else:
        show_tables(experiment, store, shown, to=to)


@click.command()
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a recipe, for editors.")
@click.option("--show", metavar="NAME", help="Print this recipe's file.")
@click.option("--copy", metavar="NAME", help="Copy this recipe's file, to change it.")
@click.option("--to", type=click.Path(path_type=Path), help="With --copy: the new file [default: NAME.yaml].")
@execution("json")
def recipes(*, schema: bool, show: str | None, copy: str | None, to: Path | None, as_json: bool) -> None:
    """List the shipped recipes; print or copy one."""
    from ctpd.recipe import load_recipe, shipped_recipes

    if (schema, show is not None, copy is not None).count(True) > 1:
        raise click.UsageError("Give --schema, --show or --copy, one of them.")
    if copy is None:
        refuse("to", because="it names the file of --copy")
    if schema:
        refuse("as_json", because="a schema is JSON")
        from ctpd.recipe.schema import schema_file

        click.echo(schema_file().read_text(encoding="utf-8"), nl=False)
        return
    if show is not None or copy is not None:
        refuse("as_json", because="a recipe is YAML")
        _show_or_copy(show, copy, to)
        return
    found = {name: load_recipe(name).about for name in shipped_recipes()}
    if as_json:
        click.echo(json_text(found))
        return
    from ctpd.cli.terminal import rendered, table

    click.echo(rendered(table(["", ""], list(found.items()))))


@click.command()
@click.option("--teacher", required=True, help="Model directory, or hub id@revision.")
@click.option("--student", required=True, help="Model directory, or hub id@revision.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Pairs: jsonl, json, parquet or csv; a file, a folder or a pattern.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN",
    help="A column of the data under our name, such as prompt=question, where init does not recognise them; may be repeated.",
)
@click.option("--encoding", metavar="NAME", help="The encoding of data that are not UTF-8, such as cp1252.")
@click.option("--to", type=click.Path(path_type=Path), default="recipe.yaml", show_default=True)
@execution()
def init(teacher: str, student: str, data: Path, columns: tuple[str, ...], encoding: str | None, to: Path) -> None:
    """Write a recipe for your own pair of models and data; say what of the data is read."""
    from ctpd.cli.template import write_recipe

    named = dict(parted(column, option="--column", form="NAME=COLUMN, such as prompt=question") for column in columns)
    click.echo(write_recipe(to, teacher=teacher, student=student, data=data, columns=named, encoding=encoding))
    click.echo(f"Wrote {to}. Read it through, then: {shlex.join(['ctpd', 'run', str(to), '--plan'])}")


def _show_or_copy(show: str | None, copy: str | None, to: Path | None) -> None:
    from ctpd.cli.template import copy_recipe, shipped_text

    if show is not None:
        click.echo(shipped_text(show), nl=False)
        return
    assert copy is not None
    target = Path(f"{copy}.yaml") if to is None else to
    copy_recipe(copy, target)
    click.echo(f"Wrote {target}. Change it, and its name, then: {shlex.join(['ctpd', 'run', str(target), '--plan'])}")


def _evaluations(experiment: "Experiment") -> "dict[str, dict[str, EvaluateStage]]":
    """The evaluations of each run, by its title."""
    return {run.title: experiment.evaluations[number] for number, run in enumerate(experiment.runs)}


def _results(named: "Mapping[str, Mapping[str, EvaluateStage]]", store: "Store") -> "Results":
    from ctpd.pipeline.stages.evaluate import read_result

    return {
        title: {name: read_result(store.open(stage.kind, stage.key)) for name, stage in columns.items()}
        for title, columns in named.items()
    }


def _evaluate_model(model: str, protocol: dict[str, Any], flags: Flags) -> None:
    from ctpd.core.store import Store
    from ctpd.pipeline.evaluations import Prompting, check_columns, evaluation_stage
    from ctpd.pipeline.references import Model, external_model
    from ctpd.recipe import EvaluationSpec, LaunchSpec, checked_variables
    from harness.suites import load_suite

    name, _, revision = (model, "", "") if exists(user_path(model)) else model.partition("@")
    root = external_model(name, revision=revision or None, role="--model option", in_recipe=False)
    data_root = protocol["data_root"]
    spec = EvaluationSpec(
        suite=protocol["suite"],
        limit=flags.limit,
        batch_size=protocol["batch_size"],
        chat_template=protocol["chat_template"],
        precision=protocol["precision"],
        data_root=None if data_root is None else str(data_root.absolute()),
    )
    if protocol["template_variable"] and not spec.chat_template:
        raise click.UsageError("--template-variable needs --chat-template.")
    prompting = Prompting(
        checked_variables(variables(protocol["template_variable"], option="--template-variable")),
        protocol["think_end_token"],
    )
    columns = load_suite(spec.suite).columns
    stages = {
        column.name: evaluation_stage(Model(root, root), column, spec, prompting=prompting, title=name)
        for column in columns
    }
    store = Store(flags.store)
    missing = [one for one in columns if not store.has(stages[one.name].kind, stages[one.name].key)]
    if not flags.plan and started_by_user():
        if missing and (revision or data_root is None):
            ask_hub()
        check_columns(missing, spec, store)
    if execute(Wanted(first=list(stages.values())), store, LaunchSpec(), flags):
        if flags.samples is not None:
            write_samples({model: stages}, store, flags.samples)
        show_scores(_results({model: stages}, store), as_json=flags.as_json)
