"""What a recipe expands to: a run at every point of its grid, and a run for every value of an ablation."""

import itertools

from ctpd.recipe.model import Recipe, RunSpec, ablation_run


def trials(recipe: Recipe, name: str) -> dict[str, RunSpec]:
    """A run at every point of the recipe's grid, by name; without a grid the run itself."""
    spec = recipe.runs[name]
    if not recipe.grid:
        return {name: spec}
    points = [dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]
    return {
        f"{name}: {', '.join(f'{field} {_formatted(value)}' for field, value in point.items())}": RunSpec(
            method=spec.method, params=spec.params, tuned={**spec.tuned, **point}
        )
        for point in points
    }


def _formatted(value: float) -> str:
    """Format a number with six digits, or with as many as identify it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def expand(recipe: Recipe) -> dict[str, RunSpec]:
    """All runs by name. A run of an ablation is its base run with one parameter replaced.

    The parameter may be given in the base's `params` or `tuned`; the ablation's value replaces it.
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
