"""The composition: a recipe's runs with their evaluations and records, and the public `run` and `plan`."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from ctpd.core.printing import command
from ctpd.core.processes import processes
from ctpd.core.roles import Role
from ctpd.core.store import Artifact, Store
from ctpd.core.temporary import kept_in
from ctpd.pipeline.build import build_missing
from ctpd.pipeline.evaluations import Prompting, check_columns, evaluation_stage
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.model_checks import check_models
from ctpd.pipeline.notes import refuse_trainings
from ctpd.pipeline.plan import SharedStages
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.records import record_head
from ctpd.pipeline.references import Model
from ctpd.pipeline.runs import PlannedRun, plan_runs
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.choice import ChoiceStage
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.pipeline.stages.generate import generated_by
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.record import RECORD, Head, RecordStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.pipeline.stages.weights import WeightsStage
from ctpd.pipeline.tuning import Search
from ctpd.recipe import EvaluationSpec, Recipe, load_recipe
from harness.record import Record
from harness.suites import Suite, load_suite

if TYPE_CHECKING:
    from harness.sheet import Table


class Experiment:
    """A recipe with its stages. Making one plans everything and computes nothing.

    In a recipe with `tune`, the stages of a run are known when its trials have chosen its values: `runs` are those that are
    known, `later` the others, `choices` what is to be built for them first. `decided` is the experiment after that.

    Args:
        recipe: a shipped name or a path.
        only: keep these runs and untrained rows.
        seeds: keep these seeds; trials have seeds of their own.
        limit: number of documents of each task to evaluate; overrides the recipe's, but not that of trials.
        store: where the choices of trials are read; None for none.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str],
        *,
        only: Sequence[str] = (),
        seeds: Sequence[int] = (),
        limit: int | None = None,
        store: Store | None = None,
    ) -> None:
        self.source, self.limit, self.only = str(recipe), limit, tuple(only)
        self.is_narrowed = bool(only or seeds)
        whole = load_recipe(recipe)
        self.recipe = _narrowed(whole, seeds=seeds, limit=limit, source=self.source)
        self.stages = SharedStages(self.recipe.shared, source=self.source)
        self.search = (
            None if whole.tune is None else Search(whole, self.stages, evaluations=self._columns, source=self.source)
        )
        self._plan(store)

    def _plan(self, store: Store | None) -> None:
        """Plan the runs, with what trials have chosen as far as the store has it."""
        self.store = store
        chosen = {} if self.search is None else self.search.chosen(store)
        values = chosen if self.search is None else {**self.search.outlook(), **chosen}
        runs = _chosen(
            list(plan_runs(self.recipe, self.stages, source=self.source, chosen=values)), self.only, self.source
        )
        waiting = {run for run, chooser in self._choosers.items() if chooser not in chosen}
        self.runs = [run for run in runs if run.name not in waiting]
        self.later = [run for run in runs if run.name in waiting]

    @property
    def _choosers(self) -> Mapping[str, str]:
        return {} if self.search is None else self.search.choosers

    def decided(self, store: Store) -> "Experiment":
        """This experiment with the choices that the store has now."""
        return self if self.search is None else self._copy(lambda other: other._plan(store))

    @cached_property
    def outlook(self) -> "Experiment":
        """This experiment with all runs, those that wait for a choice at their first trial's values: to plan, not to build."""

        def add(other: "Experiment") -> None:
            other.runs, other.later = [*self.runs, *self.later], []

        return self._copy(add)

    def _copy(self, change: "Callable[[Experiment], None]") -> "Experiment":
        other = copy.copy(self)
        for name in ("whole", "outlook", "training", "weights", "evaluations", "records"):
            other.__dict__.pop(name, None)
        change(other)
        return other

    @cached_property
    def whole(self) -> "Experiment":
        """The same recipe with all of its runs and seeds: what tables are made of, whatever was chosen to be built."""
        return Experiment(self.source, limit=self.limit, store=self.store) if self.is_narrowed else self

    @property
    def choices(self) -> list[ChoiceStage]:
        """What trials choose for the runs: to be built before the runs that wait for it are known."""
        if self.search is None:
            return []
        names = dict.fromkeys(
            self._choosers[run.name] for run in (*self.runs, *self.later) if run.name in self._choosers
        )
        return [self.search.choices[name] for name in names]

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
            number: self._columns(run.model, self.suite, self.recipe.shared.evaluation, run.title, run.role)
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
        if self.search is not None and not all(store.has(one.kind, one.key) for one in self.choices):
            _check_missing(self.search.suite, self.search.evaluations(), self.search.protocol, store)
        stages = [item for columns in self.outlook.evaluations.values() for item in columns.items()]
        _check_missing(self.suite, stages, self.recipe.shared.evaluation, store)

    def _columns(
        self, model: Model, suite: Suite, spec: EvaluationSpec, title: str, role: Role = "student"
    ) -> dict[str, EvaluateStage]:
        """The evaluation of a model on each column of a suite, prompted as the recipe prompts its teacher or student."""
        of_model = self.stages.spec(role)
        prompting = Prompting(of_model.template_variables, of_model.think_end_token)
        world = self.stages.world if spec.data_root == "testbed" else None
        spec = spec.model_copy(update={"precision": spec.precision or self.recipe.shared.precision})
        return {
            column.name: evaluation_stage(model, column, spec, prompting=prompting, title=title, world=world)
            for column in suite.columns
        }

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
            choice=self.search.choices[self._choosers[run.name]]
            if self.search and run.name in self._choosers
            else None,
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

    artifacts = Store(Path(store))
    experiment = Experiment(recipe, store=artifacts)
    runtime = runtime or Runtime.of(experiment.recipe.launch, project=experiment.recipe.name)
    missing = Graph(experiment.outlook.records).missing(artifacts)
    refuse_trainings(missing, num_processes=processes().world_size)
    experiment.check_suite(artifacts)
    notes = check_models(missing, local=False) if processes().is_main else []
    progress = Progress(quiet=quiet)
    for note in notes:
        progress.note(f"Note: {note}.")
    with kept_in(artifacts.root):
        if experiment.search is not None:
            build_missing(Graph(experiment.choices), artifacts, runtime=runtime, progress=progress)
            experiment = experiment.decided(artifacts)
        build_missing(Graph(experiment.records), artifacts, runtime=runtime, progress=progress)
    processes().destroy_process_group()
    columns = [column.name for column in experiment.suite.columns]
    return tables(experiment.recipe, read_records(experiment, artifacts), columns=columns)


def plan(recipe: str | os.PathLike[str], *, store: str | os.PathLike[str] | None = None) -> Graph:
    """The graph of all stages of a recipe; nothing is computed.

    Args:
        recipe: a shipped name or a path. With `tune`, the stages of a run are known when its trials have chosen.
        store: where the choices are read; without it, or before they are there, the graph has the trials alone.
    """
    experiment = Experiment(recipe, store=None if store is None else Store(Path(store)))
    return Graph([*experiment.choices, *experiment.records])


def _check_missing(
    suite: Suite, stages: Iterable[tuple[str, EvaluateStage]], spec: EvaluationSpec, store: Store
) -> None:
    missing = {name for name, stage in stages if not store.has(stage.kind, stage.key)}
    check_columns([column for column in suite.columns if column.name in missing], spec, store)


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
    return [Experiment(recipe, store=store), *(Experiment(recipe, limit=limit, store=store) for limit in limits)]


def _limit_of(store: Store, artifact: Artifact) -> int | None:
    try:
        limit = store.manifest(artifact.stage, artifact.key)["identity"]["protocol"].get("limit")
    except (UserError, LookupError):
        return None
    return limit if isinstance(limit, int) else None


def missing_runs(experiment: Experiment, store: Store) -> list[PlannedRun]:
    """The runs whose record is not in the store, those included whose trials have not chosen yet."""
    stages = zip(experiment.runs, experiment.records, strict=True)
    return [*(run for run, stage in stages if not store.has(stage.kind, stage.key)), *experiment.later]


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


def _chosen(runs: list[PlannedRun], only: Sequence[str], source: str) -> list[PlannedRun]:
    names = list(dict.fromkeys(run.name for run in runs))
    for name in only:
        if name not in names:
            raise UserError(
                f"the recipe has no run '{name}'.{nearest(name, names)}",
                where=source,
                fix=f"Its runs are {', '.join(names)}",
            )
    return [run for run in runs if not only or run.name in only]
