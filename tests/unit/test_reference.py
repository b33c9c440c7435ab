"""The reference of keys: in the terminal, as JSON and as a page, all from the types."""

import json
from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from ctpd.inspection.reference import page, reference
from ctpd.pipeline.methods import METHODS, params_type
from ctpd.recipe import load_recipe, shipped_recipes
from ctpd.recipe.model import Recipe
from ctpd.recipe.reference import find, inside
from ctpd.recipe.schema import recipe_schema, schema_file
from harness.suites import Column
from tests.conftest import Cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
KNOWN = reference()


def test_the_page_is_that_of_the_types() -> None:
    """After a change of the types: `make schema`."""
    schema = recipe_schema({name: params_type(name) for name in METHODS})
    assert PAGE.read_text(encoding="utf-8") == page(reference(schema))


def test_every_key_has_a_meaning_a_type_and_a_default() -> None:
    assert {one.key for one in KNOWN.recipe if one.depth == 0} == set(Recipe.model_fields)
    for method in METHODS:
        keys = {one.name for one in KNOWN.methods if one.key.startswith(f"{method}.")}
        assert keys == {*params_type(method).model_fields, "learning_rate"}
    assert {one.name for one in find("suite.columns", KNOWN.suite)} == {"columns"}
    assert {one.name for one in inside(find("columns", KNOWN.suite)[0], KNOWN.suite)} == set(Column.model_fields)
    for one in KNOWN.all:
        assert one.about, one.key
        assert one.type not in ("", "any value") or one.key == "ablations.NAME.values", one.key
        assert one.default or one.key in {*METHODS, "suite"}, one.key
    assert len({one.key for one in KNOWN.all}) == len(KNOWN.all)


@pytest.mark.parametrize(
    ("key", "type_", "range_", "default"),
    [
        ("shared.train.epochs", "integer", "at least 1", "1"),
        ("shared.train.warmup_ratio", "number", "0 to 1", "0.1"),
        ("shared.train.schedule", "`cosine`, `linear` or `constant`", "", "cosine"),
        ("shared.train.lora", "block", "", "left out"),
        (
            "shared.train.lora.targets",
            "`all-linear` or list of text",
            "at least 1 item; each not empty",
            '"all-linear"',
        ),
        ("shared.seeds", "list of integer", "at least 1 item; each at least 0 and less than 4,294,967,296", "[0]"),
        ("shared.teacher.sft", "block or text", "not empty", "required"),
        ("shared.teacher.sft.learning_rate", "number", "more than 0", "required"),
        ("tune", "block", "", "left out"),
        ("tune.trials", "integer", "at least 2", "required"),
        ("tune.space", "mapping: name to list of number", "each at least 1 item", "required"),
        ("runs.NAME.tuned", "mapping: name to number", "", "empty"),
        ("tables", "mapping: name to block", "at least 1 entry", "required"),
        ("launch", "block", "", "that of each key"),
        ("ctpd.k", "number", "more than 0", "1.0"),
        ("ctpd.learning_rate", "number", "more than 0", "required"),
        ("alm.merge_threshold", "number", "at least 0 and less than 1", "0.1"),
        ("suite.columns.also", "list of text", "", "[]"),
    ],
)
def test_type_range_and_default_in_words(key: str, type_: str, range_: str, default: str) -> None:
    one = find(key, KNOWN.all)[0]
    assert (one.key, one.type, one.range, one.default) == (key, type_, range_, default)


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("train", ["shared.train", "shared.data.train"]),
        ("suite", ["suite", "tune.suite", "shared.evaluation.suite"]),
        ("runs.My run.method", ["runs.NAME.method"]),
        ("columns[2].shots", ["suite.columns.shots"]),
        ("runs.CTPD.params.mu", ["tis_dpo.mu", "ctpd.mu"]),
        ("train.epochs", ["shared.train.epochs"]),
        ("runs.CTPD.params", ["runs.NAME.params"]),
    ],
)
def test_a_query_is_a_key_or_its_end(query: str, keys: list[str]) -> None:
    assert [one.key for one in find(query, KNOWN.all)] == keys


@pytest.mark.parametrize(
    ("query", "near"),
    [
        ("shared.train.epoch", "shared.train.epochs"),
        ("epoch", "epochs"),
        ("ctpd.mus", "ctpd.mu"),
        ("NAME", None),
        ("", None),
    ],
)
def test_a_typo_is_answered_with_the_nearest_key(query: str, near: str | None) -> None:
    with pytest.raises(UserError, match=f"Did you mean '{near}'" if near else "there is no key"):
        find(query, KNOWN.all)


def test_help_prints_a_key_its_block_and_its_json(cli: Cli) -> None:
    lines = [line.split() for line in cli("help", "shared.train.epochs").out.splitlines()]
    assert lines[0] == ["shared.train.epochs"]
    assert lines[2:] == [["type", "integer"], ["range", "at", "least", "1"], ["default", "1"]]
    block = cli("help", "shared.train").out
    assert "pairs_per_step" in block
    assert "\x1b" not in block
    (plain,) = json.loads(cli("help", "ctpd.mu", "--json").out)
    assert (plain["key"], plain["default"]) == ("ctpd.mu", "1.0")
    (plain,) = json.loads(cli("help", "shared.train", "--json").out)[:1]
    assert "epochs" in {one["key"].split(".")[-1] for one in plain["keys"]}


@pytest.mark.parametrize("width", ["60", "90", "200"])
def test_nothing_is_cut_on_a_narrow_terminal(width: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def words(text: str) -> set[str]:
        return {word.strip(",:") for word in text.split()} - {"type", "range", "-"}

    whole = cli("help", "dskd").out
    monkeypatch.setenv("COLUMNS", width)
    narrow = cli("help", "dskd").out
    assert max(map(len, narrow.splitlines())) <= int(width)
    assert words(narrow) == words(whole)


def test_help_without_a_key_shows_every_block_once(cli: Cli) -> None:
    tree = cli("help").out
    assert tree.index("Recipe") < tree.index("Methods") < tree.index("Suite")
    assert "(keys: as `shared.teacher`)" in tree
    assert tree.count("Compute activations twice") == 3  # of SFT, of a contrastive model, of a run
    assert len(json.loads(cli("help", "--json").out)) == len(KNOWN.all)


def test_help_of_a_command_and_of_a_typo(cli: Cli) -> None:
    outcome = cli("help", "compare")
    assert outcome.code == 2
    assert "See `ctpd compare --help`" in outcome.err
    assert "Did you mean 'shared.train.epochs'" in cli("help", "shared.train.epoch").err


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_copied_recipe_is_the_shipped_one(
    name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("recipes", "--copy", name)
    assert outcome.code == 0, outcome.err
    assert f"ctpd run {name}.yaml --plan" in outcome.out
    assert load_recipe(f"{name}.yaml") == load_recipe(name)
    first, _, rest = Path(f"{name}.yaml").read_text(encoding="utf-8").partition("\n")
    assert first == f"# yaml-language-server: $schema={schema_file().resolve().as_uri()}"
    shipped = shipped_recipes()[name].read_text(encoding="utf-8")
    assert rest == shipped.partition("\n")[2]
    assert cli("recipes", "--show", name).out == shipped


def test_a_copy_never_overwrites(cli: Cli, tmp_path: Path) -> None:
    to = tmp_path / "mine.yaml"
    to.write_text("mine")
    outcome = cli("recipes", "--copy", "testbed", "--to", to)
    assert (outcome.code, to.read_text()) == (2, "mine")
    assert "exists already" in outcome.err
    (tmp_path / "link.yaml").symlink_to(tmp_path / "gone.yaml")
    assert cli("recipes", "--copy", "testbed", "--to", tmp_path / "link.yaml").code == 2
    assert not (tmp_path / "gone.yaml").exists()
    assert "does not exist" in cli("recipes", "--copy", "testbed", "--to", tmp_path / "no" / "mine.yaml").err


@pytest.mark.parametrize("option", ["--show", "--copy"])
def test_an_unknown_recipe_is_answered_with_the_nearest(option: str, cli: Cli) -> None:
    outcome = cli("recipes", option, "testbed-smok")
    assert outcome.code == 2
    assert "there is no shipped recipe 'testbed-smok'. Did you mean 'testbed-smoke'?" in outcome.err
