"""From a recipe to its runs: one a method and seed, ablations expanded as data, anchors without a training."""

from collections.abc import Iterator
from dataclasses import dataclass

from ctpd.core.recipe import Recipe, RunSpec
from ctpd.pipeline.graph import Stage
from ctpd.pipeline.references import ModelRef
from ctpd.pipeline.stages import Method, SharedStages
from ctpd.recipe.expand import expand


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One row of a table for one seed: the model to be evaluated and how it comes about.

    `method`, `spec`, `training` and `weights` are None for an anchor (teacher or student as they are).
    """

    name: str
    seed: int | None
    model: ModelRef
    method: Method | None = None
    spec: RunSpec | None = None
    training: Stage | None = None
    weights: Stage | None = None

    @property
    def title(self) -> str:
        """Name and seed, for people."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


def plan_runs(recipe: Recipe, stages: SharedStages, *, source: str) -> Iterator[PlannedRun]:
    """Every run of a recipe, anchors first, then seed by seed, so that a stopped study has whole seeds."""
    for name, role in recipe.anchors.items():
        yield PlannedRun(name, None, stages.sft[role])
    for seed in recipe.shared.seeds:
        for name, spec in expand(recipe).items():
            yield _plan_run(name, spec, seed, recipe=recipe, stages=stages, source=source)


def _plan_run(name: str, spec: RunSpec, seed: int, *, recipe: Recipe, stages: SharedStages, source: str) -> PlannedRun:
    tuned = {key: value for key, value in spec.tuned.items() if key != "learning_rate"}
    method = Method.make(spec.method, {**spec.params, **tuned}, source=f"{source}, run '{name}'")
    start, schedule = stages.sft["student"], recipe.shared.train
    label = f"{name}, seed {seed}"
    training = stages.training(
        start, method, schedule, learning_rate=spec.tuned["learning_rate"], seed=seed, label=label
    )
    model = start.trained(training, adapter=schedule.lora is not None)
    return PlannedRun(name, seed, model, method, spec, training, stages.weights(method, seed=seed, label=label))
