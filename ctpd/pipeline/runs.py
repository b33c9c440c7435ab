"""From a recipe to its runs: one per method and seed, ablations expanded, and the untrained rows."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ctpd.core.roles import Role
from ctpd.pipeline.methods import Method
from ctpd.pipeline.plan import SharedStages, Training
from ctpd.pipeline.references import Model
from ctpd.pipeline.stages.train import TrainStage
from ctpd.recipe import Recipe, RunSpec, ablation_run


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
        """Name and seed, for people."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


def trials(recipe: Recipe, name: str) -> dict[str, RunSpec]:
    """A run at every point of the recipe's grid, by name; without a grid the run itself."""
    spec = recipe.runs[name]
    if not recipe.grid:
        return {name: spec}
    points = [dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]
    return {
        f"{name}: {', '.join(f'{field} {_written(value)}' for field, value in point.items())}": RunSpec(
            method=spec.method, params=spec.params, tuned={**spec.tuned, **point}
        )
        for point in points
    }


def _written(value: float) -> str:
    """A number in six digits, or in as many as tell it from every other."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def expand(recipe: Recipe) -> dict[str, RunSpec]:
    """All runs by name: those of the grid, and of the ablations: the base's block with one parameter replaced.

    The replaced parameter may stand in the base's `params` or `tuned`; the ablation's value takes its place.
    """
    runs = {trial: spec for name in recipe.runs for trial, spec in trials(recipe, name).items()}
    for name, ablation in recipe.ablations.items():
        base = recipe.runs[ablation.base]
        for label, value in ablation.values.items():
            params, tuned = dict(base.params), dict(base.tuned)
            block = tuned if ablation.field == "learning_rate" else params
            tuned.pop(ablation.field, None)
            block[ablation.field] = value
            runs[ablation_run(name, label)] = RunSpec(method=base.method, params=params, tuned=tuned)
    return runs


def plan_runs(recipe: Recipe, stages: SharedStages, *, source: str) -> Iterator[PlannedRun]:
    """Every run of a recipe: untrained rows first, then seed by seed, so that a stopped study has whole seeds."""
    for name, role in recipe.untrained.items():
        yield PlannedRun(name, None, role, stages.sft[role])
    for seed in recipe.shared.seeds:
        for name, spec in expand(recipe).items():
            yield _plan_run(name, spec, seed, recipe=recipe, stages=stages, source=source)


def _plan_run(name: str, spec: RunSpec, seed: int, *, recipe: Recipe, stages: SharedStages, source: str) -> PlannedRun:
    tuned = {key: value for key, value in spec.tuned.items() if key != "learning_rate"}
    method = Method.make(spec.method, {**spec.params, **tuned}, source=f"{source}, run '{name}'")
    start, schedule = stages.sft["student"], recipe.shared.train
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
    model = start.trained(training, adapter=schedule.lora is not None)
    return PlannedRun(name, seed, "student", model, method, spec, training)
