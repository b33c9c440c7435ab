"""Reproduce one record: the recipe of its row and seed alone, and whether a new record measures the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ctpd.core.config import to_plain
from ctpd.core.errors import UserError
from ctpd.core.roles import Role
from ctpd.recipe import Recipe, RunSpec
from harness.comparability import differing_protocol, leaves
from harness.record import ColumnResult, Record, RecordHead
from harness.shared import local_settings

SCORE_ROUNDING = 1e-6  # of a document's score, a fraction: most are 0 or 1
TRAINING_ROUNDING = 1e-4  # of a logged number, relative: what another order of sums leaves after a training in float32
_PATHS = ("evaluation.suite", "evaluation.data_root")
_TRAINING = "training"


def own_recipe(recipe: Recipe, *, run: str, seed: int | None, spec: RunSpec | Role) -> dict[str, Any]:
    """The recipe of one row and seed, as JSON, with every default written out.

    An ablation's row becomes a run, and values that trials have chosen stand in `tuned`, so it has neither `ablations` nor
    `tune`. `launch` is left out, which moves no key. It holds no path of a machine: of an absolute path, and one of a home
    folder, the last name is left, which is then looked for in the working directory.

    Args:
        recipe: the whole one.
        run: the row's name.
        seed: of the row; None for one that is not trained per seed.
        spec: how the row is trained, or whose model an untrained row shows.
    """
    shared = to_plain(recipe.shared)
    for name in (*local_settings(recipe.shared), *_PATHS):
        *parents, last = name.split(".")
        block = shared
        for parent in parents:
            block = block[parent]
        block[last] = _portable(block[last])
    if seed is not None:
        shared["seeds"] = [seed]
    found: dict[str, Any] = {"name": recipe.name, "about": recipe.about, "shared": shared, "runs": {}}
    if isinstance(spec, RunSpec):
        found["runs"] = {run: {"method": spec.method, "params": to_plain(spec.params), "tuned": to_plain(spec.tuned)}}
    else:
        found["untrained"] = {run: spec}
    return found | {"tables": {"main": {"caption": "Reproduced", "rows": [run]}}}


def _portable(path: str | None) -> str | None:
    return Path(path).name if path is not None and (path.startswith("~") or Path(path).is_absolute()) else path


def recipe_text(record: Record, *, source: str) -> str:
    """The record's own recipe, as the text of a recipe's file.

    Raises:
        UserError: the record holds none.
    """
    if record.own_recipe is None:
        raise UserError(
            f"the record of {record.title} does not hold the recipe that it was made with, since an older version of ctpd "
            "wrote it",
            where=source,
            fix="Remove its artifact with `ctpd store rm` and run its recipe again: the record is written anew, and what was "
            "trained and evaluated is kept",
        )
    return json.dumps(record.own_recipe, indent=1, ensure_ascii=False) + "\n"  # JSON is YAML


def check_same_inputs(record: Record, head: RecordHead, *, source: str) -> None:
    """Refuse to run with other data, models or parameters than those of a record.

    Args:
        record: what is to be reproduced.
        head: of the run that would be made here.
        source: the record's file, for errors.

    Raises:
        UserError: they are others; each is named.
    """
    left, right = (
        dict(leaves({"shared": one.shared.settings, "method": to_plain(one.method)})) for one in (record, head)
    )
    names = [name for name in left if name in right and left[name] != right[name]]
    if record.shared.digest == head.shared.digest and not any(name.startswith("method") for name in names):
        return
    digests = {f"shared.{name}" for name in _local(record)}
    shown = ", ".join(f"`{name}` ({_short(left[name])} there, {_short(right[name])} here)" for name in names)
    raise UserError(
        f"what {record.title} was made of is not what is here: {shown or 'the digests of the settings differ'}",
        where=source,
        fix="Put the files that the record was made with where its recipe names them, relative to the working directory"
        if digests & set(names)
        else "Use the version of ctpd that made the record, which it names under `provenance`",
    )


def _local(record: Record) -> list[str]:
    """The settings that hold digests in the place of paths."""
    return [
        name
        for name, value in leaves(record.shared.settings)
        if name.endswith(("model", "sft", "positive", "negative", "path")) and isinstance(value, str)
    ]


def _short(value: object) -> str:
    return str(value)[:16]


class Agreement(NamedTuple):
    """How a measurement of a new record agrees with that of the old one.

    Attributes:
        name: of the column, or `training`.
        recorded: the column's score there, a fraction; of a training the last loss.
        found: the same here.
        compared: documents of the column, or logged numbers.
        differing: how many of them are not bitwise equal.
        largest: the largest difference of one: of scores absolute, of logged numbers relative to the recorded one.
        rounding: up to which a difference is one of rounding.
        unlike: why the two cannot be compared: another protocol, other documents, other steps; None if they can.
    """

    name: str
    recorded: float | None
    found: float | None
    compared: int
    differing: int
    largest: float
    rounding: float
    unlike: str | None = None

    @property
    def is_same(self) -> bool:
        """Whether nothing differs but by rounding."""
        return self.unlike is None and self.largest <= self.rounding

    @property
    def verdict(self) -> str:
        """In words, with how much differs."""
        if self.unlike is not None:
            return f"cannot be compared: {self.unlike}"
        if not self.differing:
            return "the same, bit for bit"
        what = "logged numbers" if self.name == _TRAINING else "documents"
        words = f"{self.differing:,} of {self.compared:,} {what} differ, by up to {self.largest:.2g}"
        return f"the same within rounding: {words}" if self.is_same else words


def agreements(record: Record, found: Record) -> list[Agreement]:
    """The training, and each column that either record has, one after the other."""
    names = dict.fromkeys([*record.evaluation, *found.evaluation])
    columns = [_column(name, record.evaluation.get(name), found.evaluation.get(name)) for name in names]
    return [*_training(record, found), *columns]


def _column(name: str, one: ColumnResult | None, other: ColumnResult | None) -> Agreement:
    recorded, found = (None if result is None else result.value for result in (one, other))
    if one is None or other is None:
        return Agreement(name, recorded, found, 0, 0, 0.0, SCORE_ROUNDING, "only one of the two records has it")
    if differing := differing_protocol(one, other):
        unlike = ", ".join(f"`{field}`{values}" for field, values in differing.items())
        return Agreement(name, recorded, found, 0, 0, 0.0, SCORE_ROUNDING, unlike)
    scores = [[document.score for document in result.documents] for result in (one, other)]
    left = [*scores[0], recorded]
    gaps = [_gap(a, b) for a, b in zip(left, [*scores[1], found], strict=True)]
    count = len(scores[0])
    return Agreement(name, recorded, found, count, sum(gap > 0 for gap in gaps[:count]), max(gaps), SCORE_ROUNDING)


def _training(record: Record, found: Record) -> list[Agreement]:
    if record.training is None or found.training is None:
        return []
    logged: list[Mapping[tuple[int, str], float | None]] = [
        {(entry.step, name): value for entry in one.training.history for name, value in entry.metrics.items()}
        for one in (record, found)
        if one.training is not None
    ]
    left, right = logged
    last = [[value for (_, name), value in one.items() if name == "loss"][-1:] or [None] for one in logged]
    if left.keys() != right.keys():
        return [Agreement(_TRAINING, last[0][0], last[1][0], 0, 0, 0.0, TRAINING_ROUNDING, "other steps were logged")]
    gaps = [_gap(value, right[key], relative=True) for key, value in left.items()]
    differing, largest = sum(gap > 0 for gap in gaps), max(gaps, default=0.0)
    return [Agreement(_TRAINING, last[0][0], last[1][0], len(gaps), differing, largest, TRAINING_ROUNDING)]


def _gap(one: float | None, other: float | None, *, relative: bool = False) -> float:
    """The distance of two numbers; infinite if one of them alone is not finite."""
    if one == other:
        return 0.0
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / (max(abs(one), abs(other)) if relative else 1.0)


def made_otherwise(record: Record, found: Record) -> dict[str, tuple[str, str]]:
    """What differs in how two records were made: name -> there and here."""
    facts = [
        {
            **dict(one.provenance.versions),
            "python": one.provenance.python,
            "platform": one.provenance.platform,
            "commit": str(one.provenance.commit),
            "device": one.provenance.runtime.device,
            "processes": str(one.provenance.processes),
        }
        for one in (record, found)
    ]
    left, right = facts
    names = [name for name in left | right if left.get(name) != right.get(name)]
    return {name: (left.get(name, "absent"), right.get(name, "absent")) for name in names}
