"""The recipe of a rehearsal: an ordinary one, with tiny models, few pairs and documents, one seed and few trials."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ctpd.core.errors import UserError
from ctpd.core.roles import ROLES, Role
from ctpd.pipeline.methods import Method
from ctpd.pipeline.references import External, external_model
from ctpd.recipe import ModelSpec, Recipe
from ctpd.rehearsal.standins import write_adapter, write_model
from ctpd.train.config import Schedule

RECIPE, STORE = "rehearsal.yaml", "store"
"""In the folder of a rehearsal: its recipe and its artifacts."""
PAIRS_PER_STEP = 4
STEPS = 2
"""Optimizer steps of a training: in the first the learning rate is 0."""
SPARE = 4  # pairs beyond those of the steps: a template may refuse some
DOCUMENTS = 1
"""Documents of each task."""
BATCH = 1  # few documents have very different lengths: the logits of padding would take gigabytes
TRIALS = 2
S = TypeVar("S", bound=Schedule)


def write_recipe(recipe: Recipe, folder: Path, *, suites: Mapping[str, str], models: Mapping[Role, ModelSpec]) -> Path:
    """Write the recipe of a rehearsal.

    Args:
        recipe: the recipe that is rehearsed.
        folder: where the file is written.
        suites: name of a suite -> the suite in its place, where columns were left out.
        models: teacher and student with stand-ins for their models (`stand_ins`).

    Returns:
        The file.
    """
    shared = recipe.shared
    per_step = _pairs_per_step(recipe)
    shortened = {role: _quick_phases(models[role], per_step) for role in ROLES}
    evaluation = shared.evaluation
    changes: dict[str, Any] = {
        "teacher": shortened["teacher"],
        "student": shortened["student"],
        "train": _quick(shared.train, per_step),
        # The shortest pairs: rows are as good as any for trying what is done with them, and it is done soon.
        "data": shared.data.model_copy(
            update={"select": "shortest", "limit": STEPS * per_step + SPARE, "max_dropped": 0.5}
        ),
        "evaluation": evaluation.model_copy(
            update={"suite": suites.get(evaluation.suite, evaluation.suite), "limit": DOCUMENTS, "batch_size": BATCH}
        ),
        "seeds": shared.seeds[:1],
    }
    tune = recipe.tune
    if tune is not None:
        fewer = {
            "trials": TRIALS,
            "seeds": tune.seeds[:2],
            "suite": suites.get(tune.suite, tune.suite),
            "limit": DOCUMENTS,
        }
        tune = tune.model_copy(update=fewer)
    derived = recipe.model_copy(update={"shared": shared.model_copy(update=changes), "tune": tune})
    plain = derived.model_dump(mode="json", exclude_defaults=True, exclude={"launch"})
    path = folder / RECIPE
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")  # JSON is YAML
    return path


def stand_ins(recipe: Recipe, folder: Path, *, local: bool) -> dict[Role, ModelSpec]:
    """Write a stand-in for every ready-made model of a recipe; models that it pretrains itself have fewer steps.

    Args:
        recipe: the recipe.
        folder: where the models are written.
        local: read of the hub only what its cache holds.

    Returns:
        Teacher and student with the directories of their stand-ins.

    Raises:
        UserError: one cannot be made.
    """
    return {role: _StandIns(role, folder / role, local).of(_spec(recipe, role)) for role in ROLES}


def _spec(recipe: Recipe, role: Role) -> ModelSpec:
    return recipe.shared.teacher if role == "teacher" else recipe.shared.student


class _StandIns:
    """The models of one role."""

    def __init__(self, role: Role, folder: Path, local: bool) -> None:
        self.role, self.folder, self.local = role, folder, local
        self._seed = 0

    def of(self, spec: ModelSpec) -> ModelSpec:
        """The block with stand-ins."""
        if spec.pretrain is not None:
            steps = min(spec.pretrain.steps, STEPS)
            changes: dict[str, Any] = {"pretrain": spec.pretrain.model_copy(update={"steps": steps})}
        else:
            assert spec.model is not None
            given = external_model(spec.model, revision=spec.revision, role=self.role)
            changes = {"model": str(self._model(given, "model")), "revision": None}
        base = Path(changes["model"]) if "model" in changes else None
        base = self._phase(spec, "sft", base, changes)
        for name in ("positive", "negative"):  # adapters of the contrastive pair belong on the SFT model
            self._phase(spec, name, base, changes)
        return spec.model_copy(update=changes)

    def _phase(self, spec: ModelSpec, name: str, base: Path | None, changes: dict[str, Any]) -> Path | None:
        """Put the stand-in of a phase's ready-made model into ``changes``; returns the model that it leaves."""
        location = getattr(spec, name)
        if not isinstance(location, str) or location == "skip":
            return base
        changes[name], made = self._ready_made(location, name, base)
        return made

    def _ready_made(self, location: str, name: str, base: Path | None) -> tuple[str, Path | None]:
        """The stand-in of a ready-made model or adapter, and the model whose class the next adapters are made for."""
        given = external_model(location, revision=None, role=f"{self.role} ({name})")
        if not given.is_adapter:
            path = self._model(given, name)
            return str(path), path
        if base is None:
            raise UserError("an adapter for a model that the recipe pretrains cannot be rehearsed", where=location)
        write_adapter(given, base, self.folder / name)
        return str(self.folder / name), base

    def _model(self, given: External, name: str) -> Path:
        self._seed += 1
        write_model(given, self.folder / name, seed=self._seed, local=self.local)
        return self.folder / name


def _pairs_per_step(recipe: Recipe) -> int:
    """Few pairs, in whole micro-batches of every method: whatever the recipe says is a multiple of these, too."""
    methods = [Method.make(run.method, dict(run.params), source=recipe.name) for run in recipe.runs.values()]
    fixed = [method.requires.micro_batch for method in methods]
    whole = math.lcm(*(number for number in fixed if number is not None))
    return whole * math.ceil(PAIRS_PER_STEP / whole)


def _quick(schedule: S, per_step: int) -> S:
    changes = {"epochs": 1, "pairs_per_step": min(schedule.pairs_per_step, per_step), "evaluations_per_epoch": 1}
    return schedule.model_copy(update=changes)


def _quick_phases(spec: ModelSpec, per_step: int) -> ModelSpec:
    return spec.model_copy(update={name: _quick(phase, per_step) for name, phase in _phases(spec)})


def _phases(spec: ModelSpec) -> Iterator[tuple[str, Schedule]]:
    for name in ("sft", "positive", "negative"):
        phase = getattr(spec, name)
        if isinstance(phase, Schedule):
            yield name, phase
