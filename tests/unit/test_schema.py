"""The JSON Schema of a recipe: it matches the types, accepts the shipped recipes, and refuses what the types refuse."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ctpd.core.config import parse_yaml
from ctpd.pipeline.methods import METHODS, params_type
from ctpd.recipe import shipped_recipes
from ctpd.recipe.schema import recipe_schema, schema_file, schema_text
from tests.conftest import Cli
from tests.fixtures.json_schema import errors

SCHEMA = json.loads(schema_file().read_text(encoding="utf-8"))


def found(recipe: Any) -> list[str]:
    return list(errors(recipe, SCHEMA, SCHEMA))


def test_the_shipped_schema_is_that_of_the_types() -> None:
    """After a change of the types: `make schema`."""
    schema = recipe_schema({name: params_type(name) for name in METHODS})
    assert schema_file().read_text(encoding="utf-8") == schema_text(schema)


def test_the_command_prints_it(cli: Cli) -> None:
    outcome = cli("recipes", "--schema")
    assert outcome.code == 0
    assert json.loads(outcome.out) == SCHEMA


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_names_the_schema_and_is_valid(name: str) -> None:
    path = shipped_recipes()[name]
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert (path.parent / "recipe.schema.json").samefile(schema_file())
    assert found(parse_yaml(path.read_text(encoding="utf-8"), source=name)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shared.train.epochs", 0),
        ("shared.train.epoch", 1),
        ("shared.train.warmup_ratio", 7),
        ("shared.teacher.sft.learning_rate", 0),
        ("shared.teacher.sft", 3),
        ("shared.teacher.revision", "main"),
        ("shared.student.template", "chta"),
        ("shared.student.template", {"user": "a", "assistant": "{content}"}),
        ("shared.seeds", []),
        ("runs.DPO.method", "dpu"),
        ("runs.CTPD.params", {"weight": "lite"}),
        ("runs.CTPD.tuned", {"learning_rate": 1e-3, "weights": 1}),
        ("runs.CTPD.tuned", {"learning_rate": 0}),
        ("runs.New", {"method": "uld", "params": {"top_k": 0}}),
        ("runs.New", {"method": "gold", "params": {"beta": 2.0}}),
        ("untrained.Other", "pupil"),
        ("anchors", {}),
    ],
)
def test_it_refuses_what_the_types_refuse(key: str, value: Any) -> None:
    recipe = copy.deepcopy(dict(parse_yaml(shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8"), source="")))
    *parents, last = key.split(".")
    block: Any = recipe
    for parent in parents:
        block = block[parent]
    assert found(recipe) == []
    block[last] = value
    assert found(recipe)


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("2026.yaml", "org/name@" + "a1" * 20),
        ("true.yaml", 'the "best" model'),
        ("a: b # c.yaml", "back\\slash: and 'quotes'"),
        ("Ω — \u2028.yaml", "../{content}/%s@home"),
        (".yaml", "- [x]"),
    ],
)
def test_init_writes_a_recipe_that_loads_whatever_the_names(
    name: str, teacher: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctpd.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    if "@" not in teacher or teacher.endswith("@home"):
        Path(teacher).mkdir(parents=True)
    data = Path('my "pairs": 1.jsonl')
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    outcome = cli("init", "--teacher", teacher, "--student", teacher, "--data", str(data), "--to", name)
    assert outcome.code == 0, outcome.err
    recipe = load_recipe(Path(name))
    assert recipe.name == Path(name).stem
    assert recipe.shared.data.train.path == str(data)
    assert recipe.shared.teacher.model == (teacher if Path(teacher).is_dir() else teacher.split("@")[0])
    assert teacher in recipe.about
    text = Path(name).read_text(encoding="utf-8")
    assert found(parse_yaml(text, source=name)) == []
    schema = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert schema == schema_file().resolve().as_uri()


def test_init_names_an_installed_schema_below_the_recipe_relatively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctpd.cli import template

    monkeypatch.setattr(template, "schema_file", lambda: tmp_path / ".venv" / "recipe.schema.json")
    assert template._schema(tmp_path / "mine.yaml") == ".venv/recipe.schema.json"


@pytest.mark.parametrize("teacher", ["org/name", "org/name@main", "org/name@" + "A1" * 20, "org/name@"])
def test_init_refuses_a_hub_id_that_the_recipe_would_refuse(
    teacher: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("small").mkdir()
    outcome = cli("init", "--teacher", teacher, "--student", "small", "--data", "p.jsonl", "--to", "mine.yaml")
    assert outcome.code == 2
    assert "give `org/name@COMMIT`" in outcome.err
    assert not Path("mine.yaml").exists()


def test_init_into_no_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{}")
    args = ("--teacher", "a", "--student", "b", "--data", str(tmp_path / "p.jsonl"))
    outcome = cli("init", *args, "--to", str(tmp_path / "no" / "mine.yaml"))
    assert outcome.code == 2
    assert "does not exist" in outcome.err
