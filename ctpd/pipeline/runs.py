"""Plan the runs of a recipe: one per method and seed, ablations expanded, and the untrained rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from ctpd.core.errors import UserError
from ctpd.core.roles import Role
from ctpd.pipeline.methods import Method
from ctpd.pipeline.plan import SharedStages, Training
from ctpd.pipeline.references import Model
from ctpd.pipeline.stages.train import TrainStage
from ctpd.recipe import Chosen, Recipe, RunSpec, expand, run_position


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One row of a table for one seed: the model that is evaluated, and the training that makes it.

    `method`, `spec` and `training` are None for an untrained row (teacher or student as they are); `role` says whose
    model it is.
    """

    name: str
    seed: int | None
    role: Role
    model: Model
    method: Method | None = None
    spec: RunSpec | None = None
    training: TrainStage | None = None

    @property
    def title(self) -> str:
        """Name and seed, for display."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


def plan_runs(
    recipe: Recipe, stages: SharedStages, *, source: str, chosen: Chosen | None = None
) -> Iterator[PlannedRun]:
    """Every run of a recipe: untrained rows first, then seed by seed, so that an interrupted study has complete seeds.

    Args:
        recipe: the recipe.
        stages: of its `shared` block.
        source: the recipe, for errors.
        chosen: the values of each run that is tuned.
    """
    for name, role in recipe.untrained.items():
        yield PlannedRun(name, None, role, stages.sft[role])
    for seed in recipe.shared.seeds:
        for name, spec in expand(recipe, chosen).items():
            yield plan_run(name, spec, seed, recipe=recipe, stages=stages, source=source)


def plan_run(name: str, spec: RunSpec, seed: int, *, recipe: Recipe, stages: SharedStages, source: str) -> PlannedRun:
    """One run with one seed: a row of a table, or a trial of one.

    Raises:
        UserError: wrong parameters, which the error places in the recipe; files or models that cannot be read.
    """
    tuned = {key: value for key, value in spec.tuned.items() if key != "learning_rate"}
    start, schedule = stages.sft["student"], recipe.shared.train
    try:
        method = Method.make(spec.method, {**spec.params, **tuned}, source=source)
        training = stages.training(
            "student",
            start,
            Training(
                method=method,
                schedule=schedule,
                learning_rate=float(spec.tuned["learning_rate"]),
                seed=seed,
                label=f"{name}, seed {seed}",
            ),
        )
    except UserError as error:
        if error.where != source:  # of another block, a file or a model, which the error names
            raise
        raise UserError(error.what, where=run_position(source, name), fix=error.fix) from error
    model = start.trained(training, adapter=schedule.lora is not None)
    return PlannedRun(name, seed, "student", model, method, spec, training)
