"""What a recipe expands to: a run at every point of its grid, and a run for every value of an ablation."""

import itertools

from ctpd.core.recipe import Recipe, RunSpec


def ablation_run(ablation: str, label: str) -> str:
    """The name of the run that shows one value of an ablation."""
    return f"{ablation}: {label}"


def trials(recipe: Recipe, name: str) -> dict[str, RunSpec]:
    """A run at every point of the recipe's grid, by name; without a grid the run itself."""
    spec = recipe.runs[name]
    if not recipe.grid:
        return {name: spec}
    points = [dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]
    return {
        f"{name}: {', '.join(f'{field} {value:g}' for field, value in point.items())}": RunSpec(
            method=spec.method, params=spec.params, tuned={**spec.tuned, **point}
        )
        for point in points
    }


def expand(recipe: Recipe) -> dict[str, RunSpec]:
    """All runs by name: those of the grid, and of the ablations: the base's block with one parameter replaced."""
    runs = {trial: spec for name in recipe.runs for trial, spec in trials(recipe, name).items()}
    for name, ablation in recipe.ablations.items():
        base = recipe.runs[ablation.base]
        for label, value in ablation.values.items():
            params = {**base.params, ablation.field: value}
            runs[ablation_run(name, label)] = RunSpec(method=base.method, params=params, tuned=base.tuned)
    return runs
