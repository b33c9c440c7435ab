"""The composition: a recipe's runs with their evaluations and records, and the public `run` and `plan`."""

import os
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from ctpd.core.printing import command
from ctpd.core.processes import processes
from ctpd.core.store import Artifact, Store
from ctpd.core.temporary import kept_in
from ctpd.core.userfiles import user_path
from ctpd.pipeline.build import build_missing
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.notes import refuse_idle
from ctpd.pipeline.plan import SharedStages
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.records import record_head
from ctpd.pipeline.references import Model
from ctpd.pipeline.runs import PlannedRun, plan_runs
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.evaluate import ColumnTask, EvaluateStage, Mirror, Protocol
from ctpd.pipeline.stages.generate import generated_by
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.record import RECORD, Head, RecordStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.pipeline.stages.weights import WeightsStage
from ctpd.pipeline.stages.world import WorldStage
from ctpd.recipe import EvaluationSpec, Recipe, load_recipe
from harness.record import Record
from harness.suites import Column, Suite, load_suite

if TYPE_CHECKING:
    from harness.sheet import Table


class Experiment:
    """A recipe with its stages. Making one plans everything and computes nothing.

    Args:
        recipe: a shipped name or a path.
        only: keep these runs and untrained rows.
        seeds: keep these seeds.
        limit: number of documents of each task to evaluate; overrides the recipe's.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str],
        *,
        only: Sequence[str] = (),
        seeds: Sequence[int] = (),
        limit: int | None = None,
    ) -> None:
        self.source, self.limit = str(recipe), limit
        self.is_narrowed = bool(only or seeds)
        self.recipe = _narrowed(load_recipe(recipe), seeds=seeds, limit=limit, source=self.source)
        self.stages = SharedStages(self.recipe.shared, source=self.source)
        runs = list(plan_runs(self.recipe, self.stages, source=self.source))
        self.runs = _chosen(runs, only, source=self.source)

    @cached_property
    def whole(self) -> "Experiment":
        """The same recipe with all of its runs and seeds: what tables are made of, whatever was chosen to be built."""
        return Experiment(self.source, limit=self.limit) if self.is_narrowed else self

    @cached_property
    def suite(self) -> Suite:
        """The columns to evaluate."""
        return load_suite(self.recipe.shared.evaluation.suite)

    @cached_property
    def training(self) -> list[Stage]:
        """The stages that make the evaluated models; ready-made models have none."""
        return [run.model.newest for run in self.runs if isinstance(run.model.newest, Stage)]

    @cached_property
    def weights(self) -> dict[str, WeightsStage]:
        """The importance weights of each run that has some, by its title."""
        found = {run.title: run.training.weights for run in self.runs if run.training is not None}
        return {title: stage for title, stage in found.items() if stage is not None}

    @cached_property
    def evaluations(self) -> dict[int, dict[str, EvaluateStage]]:
        """Index of the run -> column -> evaluation."""
        return {
            number: {column.name: self._evaluation(run, column) for column in self.suite.columns}
            for number, run in enumerate(self.runs)
        }

    @cached_property
    def records(self) -> list[RecordStage]:
        """One record per run and seed."""
        return [self._record(run, self.evaluations[number]) for number, run in enumerate(self.runs)]

    def check_suite(self, store: Store) -> None:
        """Load the tasks that are still to be evaluated, so that missing data is reported before hours of training.

        Raises:
            UserError: an unknown task, one that runs code, another version than the suite's, missing data.
        """
        stages = [(name, stage) for columns in self.evaluations.values() for name, stage in columns.items()]
        missing = {name for name, stage in stages if not store.has(stage.kind, stage.key)}
        columns = [column for column in self.suite.columns if column.name in missing]
        check_columns(columns, self.recipe.shared.evaluation, store)

    def _evaluation(self, run: PlannedRun, column: Column) -> EvaluateStage:
        spec = self.recipe.shared.evaluation
        world = self.stages.world if spec.data_root == "testbed" else None
        precision = spec.precision or self.recipe.shared.precision
        return evaluation_stage(run.model, column, spec, precision=precision, title=run.title, world=world)

    def _record(self, run: PlannedRun, evaluations: Mapping[str, EvaluateStage]) -> RecordStage:
        pairs = self.stages.pairs if run.training is None else run.training.pairs
        newest = run.model.newest
        return RecordStage(
            label=f"record: {run.title}",
            head=Head(record_head(run, self.recipe, self.stages, suite=self.suite.name), run.method),
            pairs=pairs,
            evaluations=evaluations,
            generated=generated_by(pairs),
            training=newest if isinstance(newest, TrainStage | PretrainStage) else None,
            weights=None if run.training is None else run.training.weights,
        )


def run(
    recipe: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str] = "runs",
    runtime: Runtime | None = None,
    quiet: bool = True,
) -> "list[Table]":
    """Train, evaluate and compare everything that is missing; return the tables.

    It runs in this process, or in the processes of the launcher that started it; `launch.num_processes` of the recipe
    starts none.

    Args:
        recipe: a shipped name or a path.
        store: the folder of the artifacts.
        runtime: how to execute.
        quiet: print nothing.

    Raises:
        UserError: anything wrong with the recipe, the data or the models.
    """
    from harness.comparison import tables  # pandas: a plan does not need it

    experiment, artifacts = Experiment(recipe), Store(Path(store))
    runtime = runtime or Runtime.of(experiment.recipe.launch, project=experiment.recipe.name)
    graph = Graph(experiment.records)
    refuse_idle(graph)
    experiment.check_suite(artifacts)
    with kept_in(artifacts.root):
        build_missing(graph, artifacts, runtime=runtime, progress=Progress(quiet=quiet))
    processes().destroy_process_group()
    columns = [column.name for column in experiment.suite.columns]
    return tables(experiment.recipe, read_records(experiment, artifacts), columns=columns)


def plan(recipe: str | os.PathLike[str]) -> Graph:
    """The graph of all stages of a recipe; nothing is computed."""
    return Graph(Experiment(recipe).records)


def check_columns(columns: Sequence[Column], spec: EvaluationSpec, store: Store) -> None:
    """Load the tasks of columns that are to be evaluated, which finds what is wrong with them before anything is run.

    Args:
        columns: of a suite.
        spec: the protocol.
        store: which keeps temporary files.

    Raises:
        UserError: an unknown task, one that runs code, another version than the suite's, missing data.
    """
    is_testbed = spec.data_root == "testbed"
    if is_testbed:  # the recipe itself writes the data; tasks of the user's own may run code
        columns = [column for column in columns if column.folder is not None]
    if not columns:
        return
    from harness.evaluate import check_code, check_column

    root = None if spec.data_root is None else user_path(spec.data_root)
    with kept_in(store.root):
        for column in columns:
            allowed = column.task in spec.allow_code
            if not is_testbed:
                check_column(column, data_root=root, allow_code=allowed)
            elif not allowed:
                check_code(column)


def evaluation_stage(
    model: Model,
    column: Column,
    spec: EvaluationSpec,
    *,
    precision: str,
    title: str,
    world: WorldStage | None = None,
) -> EvaluateStage:
    """The stage that evaluates one model on one column with a recipe's evaluation settings.

    Args:
        precision: number format of the weights in evaluation.
        title: the model's name in the stage's label.
        world: the testbed whose documents are read; None for the hub, or the mirror that ``spec`` names.
    """
    documents: WorldStage | Mirror | None = world
    if world is None and spec.data_root is not None:
        documents = Mirror.of(spec.data_root, column)
    return EvaluateStage(
        label=f"evaluate: {title} on {column.name}",
        protocol=Protocol(
            limit=spec.limit,
            batch_size=spec.batch_size,
            chat_template=spec.chat_template,
            precision=precision,
            backend=spec.backend,
            lm_eval=_lm_eval_version(),
            allow_code=column.task in spec.allow_code,
        ),
        task=ColumnTask.of(column, documents),
        model=model,
        documents=documents,
    )


@cache
def _lm_eval_version() -> str:
    return metadata.version("lm_eval")  # reads the file system on every call


def read_records(experiment: Experiment, store: Store) -> list[Record]:
    """Read the records that are in the store.

    Raises:
        UserError: there is none.
    """
    found = _recorded(experiment, store)
    if not found:
        raise _no_records(experiment, store)
    return [Record.read(store.open(stage.kind, stage.key) / RECORD) for stage in found]


def _recorded(experiment: Experiment, store: Store) -> list[RecordStage]:
    return [stage for stage in experiment.records if store.has(stage.kind, stage.key)]


def _no_records(experiment: Experiment, store: Store) -> UserError:
    others = [other for other in evaluated_parts(experiment.source, store) if other.limit != experiment.limit]
    limits = [other.limit for other in others if other.limit is not None and _recorded(other, store)]
    if limits:
        words = ["compare", experiment.source, "--limit", str(limits[0])]
        what = f"the store {store.root} holds records of this recipe that were made with `--limit {limits[0]}` alone"
        return UserError(what, where=experiment.source, fix=f"Run `{command(*words, store=store.root)}`")
    return UserError(
        f"the store {store.root} holds no record of this recipe",
        where=experiment.source,
        fix=f"Run `{command('run', experiment.source, store=store.root)}` first, or give another --store",
    )


def evaluated_parts(recipe: str | os.PathLike[str], store: Store) -> list[Experiment]:
    """The recipe as it is, and with each `--limit` that evaluations in the store were made with."""
    found = {_limit_of(store, artifact) for artifact in store.artifacts("evaluate")}
    limits = sorted(limit for limit in found if limit is not None)
    return [Experiment(recipe), *(Experiment(recipe, limit=limit) for limit in limits)]


def _limit_of(store: Store, artifact: Artifact) -> int | None:
    try:
        limit = store.manifest(artifact.stage, artifact.key)["identity"]["protocol"].get("limit")
    except (UserError, LookupError):
        return None
    return limit if isinstance(limit, int) else None


def missing_runs(experiment: Experiment, store: Store) -> list[PlannedRun]:
    """The runs whose record is not in the store."""
    stages = zip(experiment.runs, experiment.records, strict=True)
    return [run for run, stage in stages if not store.has(stage.kind, stage.key)]


def _narrowed(recipe: Recipe, *, seeds: Sequence[int], limit: int | None, source: str) -> Recipe:
    shared = recipe.shared
    unknown = sorted(set(seeds) - set(shared.seeds))
    if unknown:
        raise UserError(f"the recipe has no seed {unknown[0]}", where=source, fix=f"Its seeds are {list(shared.seeds)}")
    if seeds:
        shared = shared.model_copy(update={"seeds": tuple(seed for seed in shared.seeds if seed in seeds)})
    if limit is not None:
        evaluation = shared.evaluation.model_copy(update={"limit": limit})
        shared = shared.model_copy(update={"evaluation": evaluation})
    return recipe.model_copy(update={"shared": shared})


def _chosen(runs: list[PlannedRun], only: Sequence[str], *, source: str) -> list[PlannedRun]:
    names = list(dict.fromkeys(run.name for run in runs))
    for name in only:
        if name not in names:
            raise UserError(
                f"the recipe has no run '{name}'.{nearest(name, names)}",
                where=source,
                fix=f"Its runs are {', '.join(names)}",
            )
    return [run for run in runs if not only or run.name in only]
