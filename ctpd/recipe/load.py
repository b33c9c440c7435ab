"""Read a recipe. `ctpd.recipe.model` checks single fields; checks across fields are here."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import NoReturn

from ctpd.core.config import Located, nearest, parse_yaml, validate
from ctpd.core.errors import UserError, shortened
from ctpd.core.names import unfit_name, unfit_text
from ctpd.core.refusals import Keys, position
from ctpd.core.userfiles import CONFIGURATION_BYTES, exists, read_text, regular_file, user_path
from ctpd.recipe.model import ModelSpec, Recipe, RunSpec, Space, TuneSpec, ablation_run
from ctpd.train.config import Schedule

LEARNING_RATE = "learning_rate"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name -> file."""
    folder = Path(str(resources.files("ctpd") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """Read a recipe by shipped name or path, strictly.

    Raises:
        UserError: no such recipe, or anything in it that is unknown, missing, of the wrong type, out of its range or
            contradictory.
    """
    path, source = _file(recipe), str(recipe)
    data = parse_yaml(read_text(path, most_bytes=CONFIGURATION_BYTES), source=source)
    loaded = validate(Recipe, data, source=source)
    checks = _Checks(loaded, data, source)
    checks.characters()
    checks.finite()
    checks.models()
    checks.sources()
    checks.precision()
    checks.runs()
    checks.ablations()
    checks.tune()
    checks.names()
    checks.tables()
    return loaded


def run_position(recipe: str | os.PathLike[str], run: str) -> str:
    """The file, the line and the name of a run, for errors that are found when it is planned.

    Args:
        recipe: what was given to ``load_recipe``.
        run: a run, a row of an ablation, or a trial of one (``RUN: ...``).
    """
    source, data = str(recipe), parsed_recipe(recipe)
    for name, ablation in data.get("ablations", {}).items():
        for label in ablation["values"]:
            row = ablation_run(name, label)
            if run == row or run.startswith(f"{row}: "):
                return f"{position(source, data, ('ablations', name, 'values', label))}, run '{run}'"
    named = [name for name in data["runs"] if run == name or run.startswith(f"{name}: ")]
    keys: Keys = ("runs", max(named, key=len)) if named else ("runs",)
    return f"{position(source, data, keys)}, run '{run}'"


def key_position(recipe: str | os.PathLike[str], *keys: str) -> str:
    """The file and the line of a key, for errors that are found when a recipe is planned."""
    return position(str(recipe), parsed_recipe(recipe), keys)


def parsed_recipe(recipe: str | os.PathLike[str]) -> Located:
    """The YAML of a recipe, by shipped name or path, before it is checked.

    Raises:
        UserError: no such recipe, or no YAML.
    """
    return parse_yaml(read_text(_file(recipe), most_bytes=CONFIGURATION_BYTES), source=str(recipe))


def looks_local(model: str) -> bool:
    """Whether a model name is a path: it exists, or does not have the form of a hub id."""
    return exists(user_path(model)) or model.startswith((".", "/", "~")) or model.count("/") != 1


def _file(recipe: str | os.PathLike[str]) -> Path:
    shipped, name = shipped_recipes(), str(recipe)
    path = shipped.get(name, Path(name))
    if not exists(path):
        raise UserError(
            f"there is no recipe '{name}': no such file, and no shipped recipe of that name.{nearest(name, shipped)}",
            fix=f"Give a path or one of: {', '.join(shipped)}",
        )
    return regular_file(path, what="recipe", fix="Give the path of a YAML file, or the name of a shipped recipe")


@dataclass(frozen=True)
class _Checks:
    """Checks across fields; each names the file, the line and the key."""

    recipe: Recipe
    data: Located
    source: str

    def refuse(self, keys: Keys, what: str, fix: str | None = None) -> NoReturn:
        raise UserError(what, where=position(self.source, self.data, keys), fix=fix)

    def characters(self) -> None:
        """Refuse names and texts that cannot be shown, or be part of a file's name."""
        recipe = self.recipe
        for keys, name in self._names():
            if problem := unfit_name(name):
                shown = shortened(ascii(name), most=40)
                what = f"'{'.'.join(map(str, keys[:-1])) or keys[0]}' holds a name that {problem}: {shown}"
                self.refuse(keys, what, "Give it another name; a caption can hold any sentence")
        texts: list[tuple[Keys, str | None]] = [(("about",), recipe.about)]
        for name, table in recipe.tables.items():
            texts += [(("tables", name, "caption"), table.caption), (("tables", name, "note"), table.note)]
        for keys, text in texts:
            if text is not None and (problem := unfit_text(text)):
                self.refuse(keys, f"the text of '{'.'.join(map(str, keys))}' {problem}", "Remove the character")

    def _names(self) -> Iterator[tuple[Keys, str]]:
        recipe = self.recipe
        yield ("name",), recipe.name
        for block in ("untrained", "runs", "ablations", "tables"):
            yield from (((block, name), name) for name in getattr(recipe, block))
        for name, ablation in recipe.ablations.items():
            yield from ((("ablations", name, "values", label), label) for label in ablation.values)

    def finite(self) -> None:
        """Refuse infinity and NaN where a recipe may hold any value, such as a method's parameters."""
        for keys, value in _values(self.data, ()):
            if isinstance(value, float) and not math.isfinite(value):
                self.refuse(keys, f"'{'.'.join(map(str, keys))}' must be finite, and is {value}")

    def models(self) -> None:
        shared = self.recipe.shared
        for role, model in (("teacher", shared.teacher), ("student", shared.student)):
            if model.pretrain is not None and shared.testbed is None:
                self.refuse(
                    ("shared", role, "pretrain"),
                    f"'shared.{role}' is pretrained on the testbed, and `shared.testbed` is missing",
                )
            if model.model is not None and model.revision is None and not looks_local(model.model):
                self.refuse(
                    ("shared", role, "model"),
                    f"'shared.{role}.model' is '{model.model}', which is not a local directory, and it has no `revision`",
                    "Check the path; for a hub model pin its revision (a commit), so that the run can be repeated",
                )

    def sources(self) -> None:
        shared = self.recipe.shared
        for split, source in (("train", shared.data.train), ("eval", shared.data.eval)):
            if source is not None and source.testbed is not None and shared.testbed is None:
                self.refuse(
                    ("shared", "data", split),
                    f"'shared.data.{split}' comes from the testbed, and `shared.testbed` is missing",
                )
        if shared.evaluation.data_root == "testbed" and shared.testbed is None:
            self.refuse(
                ("shared", "evaluation", "data_root"),
                "'shared.evaluation.data_root' is the testbed, and `shared.testbed` is missing",
                "Add it; for a folder of that name write `./testbed`",
            )

    def precision(self) -> None:
        shared = self.recipe.shared
        if shared.precision != "float32":
            return
        phases = {("train",): shared.train, **_phases("teacher", shared.teacher), **_phases("student", shared.student)}
        for keys, phase in phases.items():
            if isinstance(phase, Schedule) and phase.lora is not None and phase.lora.base != "float32":
                self.refuse(
                    ("shared", *keys, "lora", "base"),
                    f"'shared.{'.'.join(keys)}.lora.base' is of lower precision than the computation, which "
                    "`shared.precision` says is float32",
                    "Write `precision: bfloat16` in `shared`, or leave `base` out",
                )

    def runs(self) -> None:
        for name, run in self.recipe.runs.items():
            keys: Keys = ("runs", name)
            if LEARNING_RATE in run.params:
                self.refuse(
                    (*keys, "params", LEARNING_RATE),
                    f"'runs.{name}.params' holds `{LEARNING_RATE}`, which belongs in `tuned`",
                    "Move it there",
                )
            if self.recipe.tune is not None and run.tune:
                self._is_tuned(keys, run)
            elif LEARNING_RATE not in run.tuned:
                for block, given in (("tuned", run.tuned), ("params", run.params)):
                    for key in get_close_matches(LEARNING_RATE, given, n=1, cutoff=0.7):
                        self.refuse(
                            (*keys, block, key),
                            f"unknown key 'runs.{name}.{block}.{key}'. Did you mean '{LEARNING_RATE}'?",
                            f"Write `{LEARNING_RATE}: ...` in `tuned`",
                        )
                self.refuse(keys, f"'runs.{name}.tuned' lacks `{LEARNING_RATE}`", f"Add `{LEARNING_RATE}: ...`")
            if twice := sorted({*run.params} & {*run.tuned}):
                self.refuse(
                    (*keys, "tuned", twice[0]),
                    f"'runs.{name}' gives `{twice[0]}` twice, in `params` and in `tuned`",
                    "Remove one of the two",
                )
            if LEARNING_RATE in run.tuned:
                self._positive((*keys, "tuned", LEARNING_RATE), [run.tuned[LEARNING_RATE]])

    def _is_tuned(self, keys: Keys, run: RunSpec) -> None:
        """Refuse a run whose values are chosen by trials, and given as well."""
        name = keys[-1]
        if run.tuned:
            self.refuse(
                (*keys, "tuned"),
                f"'runs.{name}' gives `tuned`, whose values the recipe's `tune` chooses",
                "Remove it; fix a parameter in `params`, or leave the run out of the search with `tune: false`",
            )
        for field in run.space:
            if field in run.params:
                self.refuse(
                    (*keys, "space", field),
                    f"'runs.{name}' fixes `{field}` in `params`, and `space` varies it",
                    "Remove one of the two",
                )

    def tune(self) -> None:
        recipe, tune = self.recipe, self.recipe.tune
        spaces: list[tuple[Keys, Space]] = [(("runs", name, "space"), run.space) for name, run in recipe.runs.items()]
        for keys, space in spaces:
            if space and (tune is None or not recipe.runs[str(keys[1])].tune):
                self.refuse(keys, f"'{'.'.join(map(str, keys))}' does nothing: the run is not tuned", "Remove it")
        for name, ablation in recipe.ablations.items():
            if ablation.tune and (tune is None or not recipe.runs[ablation.base].tune):
                self.refuse(("ablations", name, "tune"), f"'ablations.{name}.tune' does nothing: its base is not tuned")
        if tune is None:
            return
        self._tuned_names(tune)
        for keys, space in [(("tune", "space"), tune.space), *spaces]:
            for field, values in space.items():
                where: Keys = (*keys, field)
                if len(set(values)) < len(values):
                    self.refuse(where, f"'{'.'.join(map(str, where))}' holds a value twice", "Remove one of the two")
                if field == LEARNING_RATE:
                    self._positive(where, values)

    def _tuned_names(self, tune: TuneSpec) -> None:
        """Refuse a search without learning rates or runs, with the seeds of the study, or whose table has another's name."""
        if LEARNING_RATE not in tune.space:
            self.refuse(
                ("tune", "space"),
                f"'tune.space' lacks `{LEARNING_RATE}`, whose values depend on the models, so that no method can declare them",
                f"Add `{LEARNING_RATE}: [...]`, in steps of about a factor of three",
            )
        if both := sorted(set(tune.seeds) & set(self.recipe.shared.seeds)):
            self.refuse(
                ("tune", "seeds") if "seeds" in self.data["tune"] else ("shared", "seeds"),
                f"the seed {both[0]} is in `tune.seeds` and in `shared.seeds`: what is chosen for its luck would be reported",
                "Give other seeds",
            )
        if not any(run.tune for run in self.recipe.runs.values()):
            self.refuse(("tune",), "every run says `tune: false`, and nothing is tuned", "Remove `tune`")
        if "tuning" in self.recipe.tables:
            self.refuse(
                ("tables", "tuning"), "a table may not be named `tuning`: that file lists the trials", "Rename it"
            )

    def ablations(self) -> None:
        for name, ablation in self.recipe.ablations.items():
            if ablation.base not in self.recipe.runs:
                self.refuse(
                    ("ablations", name, "base"),
                    f"'ablations.{name}.base' names no run: '{ablation.base}'.{nearest(ablation.base, self.recipe.runs)}",
                )
            if ablation.field == LEARNING_RATE:
                for label, value in ablation.values.items():
                    self._positive(("ablations", name, "values", label), [value])

    def _positive(self, keys: Keys, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                self.refuse(keys, f"'{'.'.join(map(str, keys))}' must be a number above 0, and is {value!r}")

    def names(self) -> None:
        """Refuse two rows of the same name: one would replace the other."""
        rows: list[tuple[str, Keys]] = [(name, ("runs", name)) for name in self.recipe.runs]
        rows += [(name, ("untrained", name)) for name in self.recipe.untrained]
        for name, ablation in self.recipe.ablations.items():
            rows += [(ablation_run(name, label), ("ablations", name, "values", label)) for label in ablation.values]
        counts = Counter(name for name, _ in rows)
        for name, keys in reversed(rows):
            if counts[name] > 1:
                others = [".".join(map(str, other)) for row, other in rows if row == name and other != keys]
                self.refuse(
                    keys,
                    f"two rows have the name '{name}': '{'.'.join(map(str, keys))}' and '{others[0]}'",
                    "Rename one of them",
                )

    def tables(self) -> None:
        recipe = self.recipe
        for name, table in recipe.tables.items():
            keys: Keys = ("tables", name)
            if name == "report":
                self.refuse(keys, "a table may not be named `report`: that file is the report", "Rename it")
            if bool(table.rows) == (table.ablation is not None):
                self.refuse(keys, f"'tables.{name}' needs exactly one of `rows` and `ablation`")
            if table.ablation is not None and table.ablation not in recipe.ablations:
                self.refuse(
                    (*keys, "ablation"),
                    f"'tables.{name}.ablation' names no ablation: '{table.ablation}'"
                    f".{nearest(table.ablation, recipe.ablations)}",
                )
            known = recipe.ablations[table.ablation].values if table.ablation else {**recipe.runs, **recipe.untrained}
            for key, rows in (("rows", table.rows), ("base", () if table.base is None else (table.base,))):
                for row in rows:
                    if row not in known:
                        self.refuse((*keys, key), f"'tables.{name}' names no row: '{row}'.{nearest(row, known)}")


def _values(value: object, keys: Keys) -> Iterator[tuple[Keys, object]]:
    """Every value that is neither a mapping nor a list, with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _values(item, (*keys, key))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _values(item, (*keys, index))
    else:
        yield keys, value


def _phases(role: str, model: ModelSpec) -> dict[tuple[str, ...], object]:
    return {(role, name): getattr(model, name) for name in ("sft", "positive", "negative")}
