"""The trials of a recipe with `tune` as stages: trainings and evaluations on development documents, and the choices of runs."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property

from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.store import Store
from ctpd.pipeline.plan import SharedStages
from ctpd.pipeline.references import Model
from ctpd.pipeline.runs import plan_run
from ctpd.pipeline.search import Point, check_spaces, points, trial_name, tuned_runs
from ctpd.pipeline.stages.choice import ChoiceConfig, ChoiceStage, TrialStages, read_tuning
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.recipe import Chosen, EvaluationSpec, Recipe, RunSpec, TuneSpec, choosers, key_position
from harness.suites import Suite, load_suite

Evaluations = Callable[[Model, Suite, EvaluationSpec, str], dict[str, EvaluateStage]]
"""Model, suite, settings and title -> column -> evaluation."""


class Search:
    """The trials of every run that is tuned. Planning them computes nothing.

    Args:
        recipe: with `tune`.
        stages: of its `shared` block.
        evaluations: makes the stages that evaluate a model.
        source: the recipe, for errors.

    Raises:
        UserError: a space names an unknown parameter or a value out of its range; development documents that are those of
            the study.
    """

    def __init__(self, recipe: Recipe, stages: SharedStages, *, evaluations: Evaluations, source: str) -> None:
        assert recipe.tune is not None
        self.recipe, self.stages, self.source = recipe, stages, source
        self.tune: TuneSpec = recipe.tune
        self._evaluations = evaluations
        check_spaces(recipe, source=source)
        self.choosers = choosers(recipe)
        self.runs = tuned_runs(recipe)
        self.points = {name: points(space, self.tune.trials) for name, (_, space) in self.runs.items()}

    @cached_property
    def suite(self) -> Suite:
        """The development documents.

        Raises:
            UserError: no such suite, or one with a task of the study's.
        """
        suite, study = load_suite(self.tune.suite), load_suite(self.recipe.shared.evaluation.suite)
        measured = {column.task: column.name for column in study.columns}
        for column in suite.columns:
            if column.task in measured:
                raise UserError(
                    f"the task '{column.task}' is in the suite '{suite.name}' of the search and in the study's, where it is "
                    f"the column '{measured[column.task]}': what is chosen on the study's documents is not measured by them",
                    where=key_position(self.source, "tune", "suite"),
                    fix="Give a suite of other documents, such as those of a training split",
                )
        return suite

    @property
    def protocol(self) -> EvaluationSpec:
        """The study's evaluation settings, with the suite and the limit of the search."""
        changes = {"suite": self.tune.suite, "limit": self.tune.limit}
        return self.recipe.shared.evaluation.model_copy(update=changes)

    @cached_property
    def choices(self) -> dict[str, ChoiceStage]:
        """The choice of each run with trials of its own."""
        start = self._evaluated(self.stages.sft["student"], "the student")
        return {name: self._choice(name, spec, start) for name, (spec, _) in self.runs.items()}

    def chosen(self, store: Store | None) -> Chosen:
        """The values of the runs whose trials have chosen. A damaged choice is none: the command that builds it says so."""
        values: dict[str, Point] = {}
        if store is None:
            return values
        for name, stage in self.choices.items():
            if store.has(stage.kind, stage.key):
                with contextlib.suppress(DamagedArtifact):
                    values[name] = read_tuning(store.open(stage.kind, stage.key)).best.values
        return values

    def outlook(self) -> Chosen:
        """Values for a plan of the runs whose trials have not chosen yet: those of the first trial."""
        return {name: found[0] for name, found in self.points.items()}

    def evaluations(self) -> Iterator[tuple[str, EvaluateStage]]:
        """Column and stage of every evaluation on development documents."""
        for choice in self.choices.values():
            yield from choice.start.items()
            for trial in choice.trials:
                for columns in trial.evaluations:
                    yield from columns.items()

    def _choice(self, name: str, spec: RunSpec, start: dict[str, EvaluateStage]) -> ChoiceStage:
        space = self.runs[name][1]
        trials = [self._trial(name, spec, number, point) for number, point in enumerate(self.points[name], start=1)]
        return ChoiceStage(
            label=f"choice: {name}",
            config=ChoiceConfig(
                run=name, suite=self.suite.name, seeds=self.tune.seeds, asked=self.tune.trials, space=space
            ),
            trials=tuple(trials),
            start=start,
        )

    def _trial(self, name: str, spec: RunSpec, number: int, point: Point) -> TrialStages:
        title = trial_name(name, number, point)
        filled = spec.model_copy(update={"tuned": {**spec.tuned, **point}})
        found = []
        for seed in self.tune.seeds:
            run = plan_run(title, filled, seed, recipe=self.recipe, stages=self.stages, source=self.source)
            found.append(self._evaluated(run.model, run.title))
        return TrialStages(point, tuple(found))

    def _evaluated(self, model: Model, title: str) -> dict[str, EvaluateStage]:
        return self._evaluations(model, self.suite, self.protocol, title)
