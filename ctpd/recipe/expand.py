"""What a recipe expands to: a run for every value of an ablation; with `tune`, whose trials choose the values of a run."""

from collections.abc import Mapping

from ctpd.core.config import Number
from ctpd.recipe.model import AblationSpec, Recipe, RunSpec, ablation_run

Chosen = Mapping[str, Mapping[str, Number]]
"""Run -> the values that its trials chose."""


def expand(recipe: Recipe, chosen: Chosen | None = None) -> dict[str, RunSpec]:
    """All runs by name. A run of an ablation is its base run with one parameter replaced.

    The parameter may be given in the base's `params` or `tuned`; the ablation's value replaces it.

    Args:
        recipe: the recipe.
        chosen: what trials chose, as if it stood in `tuned`; a row of an ablation has the base's values, or its own.
    """
    chosen = chosen or {}
    runs = {name: _filled(spec, chosen.get(name, {})) for name, spec in recipe.runs.items()}
    for name, ablation in recipe.ablations.items():
        for label, value in ablation.values.items():
            row = ablation_run(name, label)
            own = recipe.runs[ablation.base] if ablation.tune else runs[ablation.base]
            runs[row] = ablated(_filled(own, chosen.get(row, {})), ablation, value)
    return runs


def ablated(base: RunSpec, ablation: AblationSpec, value: object) -> RunSpec:
    """The base run of an ablation with one of its values."""
    params, tuned = dict(base.params), dict(base.tuned)
    block = tuned if ablation.field == "learning_rate" else params
    tuned.pop(ablation.field, None)
    block[ablation.field] = value  # type: ignore[assignment]
    return base.model_copy(update={"params": params, "tuned": tuned})


def choosers(recipe: Recipe) -> dict[str, str]:
    """Run -> the run whose trials choose its values: itself, or the base of its ablation. Runs that are not tuned are left out."""
    if recipe.tune is None:
        return {}
    found = {name: name for name, spec in recipe.runs.items() if spec.tune}
    for name, ablation in recipe.ablations.items():
        if ablation.base in found:
            rows = [ablation_run(name, label) for label in ablation.values]
            found |= {row: row if ablation.tune else ablation.base for row in rows}
    return found


def _filled(spec: RunSpec, values: Mapping[str, Number]) -> RunSpec:
    return spec.model_copy(update={"tuned": {**spec.tuned, **values}}) if values else spec
