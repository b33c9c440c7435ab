"""Which points of its space each run of a recipe with `tune` is tried at (docs/statistics.md#choosing-hyper-parameters)."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from ctpd.core.config import Number, Tunable, nearest
from ctpd.core.errors import UserError
from ctpd.pipeline.methods import Method, params_type
from ctpd.recipe import Recipe, RunSpec, Space, ablated, ablation_run, choosers, key_position
from harness.tuning import number_text

LEARNING_RATE = "learning_rate"
MOST_POINTS = 10_000  # of a space: all are ordered for the trials
Point = Mapping[str, Number]


def declared(method: str) -> dict[str, tuple[Number, ...]]:
    """The parameters of a method that are marked `Tunable`, with their values.

    Raises:
        UserError: unknown method.
    """
    fields = params_type(method).model_fields
    marks = {name: [mark for mark in field.metadata if isinstance(mark, Tunable)] for name, field in fields.items()}
    return {name: found[0].values for name, found in marks.items() if found}


def tuned_runs(recipe: Recipe) -> dict[str, tuple[RunSpec, Space]]:
    """Every run with trials of its own: what is fixed, and its space. A parameter in its `params` is not varied."""
    owners = dict.fromkeys(choosers(recipe).values())
    found: dict[str, tuple[RunSpec, Space]] = {
        name: (spec, _space(recipe, spec)) for name, spec in recipe.runs.items() if name in owners
    }
    for name, ablation in recipe.ablations.items():
        for label, value in ablation.values.items():
            if (row := ablation_run(name, label)) in owners:
                spec = ablated(recipe.runs[ablation.base], ablation, value)
                space = _space(recipe, spec)
                found[row] = (spec, {**space, **{field: (fixed,) for field, fixed in spec.tuned.items()}})
    return found


def check_spaces(recipe: Recipe, *, source: str) -> None:
    """Refuse what a space says of parameters that there are not, or that have another range.

    Args:
        recipe: with `tune`.
        source: of the recipe, for errors.

    Raises:
        UserError: an unknown parameter, a value out of its range, or a space that is too large.
    """
    assert recipe.tune is not None
    runs = {name: run for name, run in recipe.runs.items() if run.tune}
    own = {name: declared(run.method) for name, run in runs.items()}
    known = {LEARNING_RATE, *(field for fields in own.values() for field in fields)}
    for field in recipe.tune.space:
        if field not in known:
            raise UserError(
                f"no method of a tuned run declares '{field}' to be tuned.{nearest(field, known)}",
                where=key_position(source, "tune", "space", field),
                fix="Give values of any other parameter in the `space` of its run",
            )
    for name, (_, space) in tuned_runs(recipe).items():
        if (size := math.prod(map(len, space.values()))) > MOST_POINTS:
            raise UserError(
                f"the space of the run '{name}' has {size:,} points; {MOST_POINTS:,} are the most",
                where=key_position(source, "tune", "space"),
                fix="Give fewer values: a trial is one of these points",
            )
    for name, run in runs.items():
        shared = {field: values for field, values in recipe.tune.space.items() if field in own[name]}
        _check_values(run, shared, source=source, keys=("tune", "space"))
        _check_values(run, run.space, source=source, keys=("runs", name, "space"))


def points(space: Space, trials: int) -> list[Point]:
    """So many points of a space, or all where it has fewer: the same for the same space, each a beginning of a longer list.

    Each next point has the first parameter's value that was used least, then the values of the others that were used least,
    then the pairs of values; what is still equal is decided by a fixed shuffle. So every learning rate is tried equally
    often, to one trial.
    """
    grid = [tuple(enumerate(values)) for values in itertools.product(*space.values())]
    Random("trials").shuffle(grid)
    used: Counter[Any] = Counter()
    found: list[Point] = []
    while grid and len(found) < trials:
        best = min(grid, key=lambda point: _uses(point, used))
        grid.remove(best)
        used.update(best)
        used.update(itertools.combinations(best, 2))
        found.append(dict(zip(space, (value for _, value in best), strict=True)))
    return found


def trial_name(run: str, number: int, point: Point) -> str:
    """The name of a trial in labels; ``number`` counts from 1."""
    return f"{run}: trial {number} ({', '.join(f'{name} {number_text(value)}' for name, value in point.items())})"


def _uses(point: Sequence[Any], used: Mapping[Any, int]) -> tuple[int, int, int]:
    first, *others = point
    pairs = itertools.combinations(point, 2)
    return used[first], sum(used[one] for one in others), sum(used[pair] for pair in pairs)


def _space(recipe: Recipe, spec: RunSpec) -> dict[str, tuple[Number, ...]]:
    """The values to try of each parameter, the learning rate first."""
    assert recipe.tune is not None
    shared, own = recipe.tune.space, declared(spec.method)
    space = {LEARNING_RATE: shared[LEARNING_RATE], **own}
    space |= {field: shared[field] for field in own if field in shared}
    space |= spec.space
    return {field: tuple(values) for field, values in space.items() if field not in spec.params}


def _check_values(run: RunSpec, space: Space, *, source: str, keys: tuple[str, ...]) -> None:
    fields = params_type(run.method).model_fields
    for field, values in space.items():
        where = key_position(source, *keys, field) if field not in fields else None
        if field == LEARNING_RATE:
            continue
        if where is not None:
            raise UserError(
                f"the method '{run.method}' has no parameter '{field}'.{nearest(field, {*fields, LEARNING_RATE})}",
                where=where,
            )
        for value in values:
            try:
                Method.make(run.method, {**run.params, field: value}, source=source)
            except UserError as error:
                raise UserError(error.what, where=key_position(source, *keys, field), fix=error.fix) from error
