"""Strict configuration: parsing of YAML, errors and their texts, and the canonical form."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from annotated_types import MinLen
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, Field, ValidationError, model_validator

from ctpd.core.config import (
    Config,
    NonNegative,
    Number,
    Positive,
    PositiveInt,
    Share,
    nearest,
    parse_yaml,
    to_plain,
    validate,
)
from ctpd.core.errors import UserError
from ctpd.core.identity import canonical, digest, identity
from ctpd.recipe import Recipe, load_recipe, shipped_recipes


def _is_even(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


class Inner(Config):
    rate: float
    name: str = "x"


class Outer(Config):
    inner: Inner
    count: int = 1
    on: bool = False
    kind: Literal["first", "second"] = "first"
    numbers: tuple[int, ...] = ()
    either: Inner | str | None = None
    table: Mapping[str, float] = Field(default_factory=dict)
    steps: PositiveInt = 1
    beta: Positive | None = None
    weight: NonNegative = 0.0
    share: Share = 0.5
    names: Annotated[tuple[str, ...], MinLen(1)] = ("a",)
    word: Literal["all"] | Annotated[tuple[str, ...], MinLen(1)] = "all"
    even: Annotated[int, AfterValidator(_is_even)] = 0
    number: Number = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.count > 100 and not self.on:
            raise UserError("a `count` above 100 needs `on`", fix="Write `on: true`")
        return self


def read(text: str) -> Outer:
    return validate(Outer, parse_yaml(text, source="a.yaml"), source="a.yaml")


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("12", 12),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("1_000", "1_000"),
        ("010", 10),
        ("09", 9),
        ("-007", -7),
        ("+5", 5),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("010.5", 10.5),
        (".inf", math.inf),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ("nan", "nan"),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}", source="a.yaml")["key"]
    assert found == value
    assert type(found) is type(value)


def test_complete_file_becomes_the_dataclass() -> None:
    text = "inner: {rate: 1}\ncount: 3\non: true\nkind: second\nnumbers: [1, 2]\neither: {rate: 2e-1}\ntable: {a: 1, b: .5}"
    assert read(text) == Outer(
        inner=Inner(rate=1.0),
        count=3,
        on=True,
        kind="second",
        numbers=(1, 2),
        either=Inner(rate=0.2),
        table={"a": 1.0, "b": 0.5},
    )
    assert isinstance(read(text).inner.rate, float)
    assert read("inner: {rate: 1}\neither: skip").either == "skip"
    assert read("inner: {rate: 1}\neither: null").either is None


REFUSED = {
    "inner: {rate: 1}\ncuont: 3": ("a.yaml, line 2", "unknown key 'cuont'", "Did you mean 'count'?"),
    "inner:\n  rate: 1\n  nam: a": ("line 3", "'inner.nam'", "'name'"),
    "inner: {rate: 1}\neither: {rat: 2}": ("line 2", "'either.rat'", "'rate'"),
    "count: 3": ("'inner' is missing",),
    "inner: {name: a}": ("'inner.rate' is missing", "line 1"),
    "inner: {rate: 1}\ncount: 3.0": ("line 2", "'count'", "whole number", "3.0"),
    "inner: {rate: 1}\ncount: true": ("'count'", "whole number", "True"),
    "inner: {rate: .nan}": ("'inner.rate'", "a number", "nan"),
    "inner: {rate: 1}\nsteps: 0": ("line 2: 'steps' must be a whole number of at least 1, and is 0.",),
    "inner: {rate: 1}\nsteps: 1.5": ("line 2: 'steps' must be a whole number of at least 1, and is 1.5.",),
    "inner: {rate: 1}\nbeta: 0": ("line 2: 'beta' must be a number above 0, and is 0.",),
    "inner: {rate: 1}\nbeta: no": ("line 2: 'beta' must be a number above 0, and is 'no'.",),
    "inner: {rate: 1}\nweight: -1": ("'weight' must be a number of at least 0, and is -1",),
    "inner: {rate: 1}\nshare: 7": ("'share' must be a number from 0 to 1, and is 7",),
    "inner: {rate: 1}\nnames: []": ("'names' must be a list that is not empty, and is []",),
    "inner: {rate: 1}\nword: al": ("'word' is 'al'. Did you mean 'all'? Use one of: `all`, a list that is not empty",),
    "inner: {rate: 1}\nword: [a, 1]": ("'word[1]' must be a string, and is 1",),
    "inner: {rate: 1}\nword: []": ("'word' must be", "a list that is not empty"),
    "inner: {rate: 1}\nword: 3": ("'word' must be one of `all` or a list that is not empty, and is 3",),
    "inner: {rate: 1}\neither: 3": ("'either' must be a mapping or a string, and is 3",),
    "inner: {rate: 1}\neither: {rate: x}": ("line 2: 'either.rate' must be a number, and is 'x'",),
    "inner: {rate: 1}\neither: {name: x}": ("line 2: the key 'either.rate' is missing",),
    "inner: {rate: 1}\nnumber: x": ("line 2: 'number' must be a number, and is 'x'.",),
    "inner: {rate: 1}\nnumber: true": ("line 2: 'number' must be a number, and is True.",),
    "inner: {rate: 1}\neven: 3": ("line 2: 'even': 3 is odd.",),
    "inner: {rate: 1}\ncount: 101": ("a `count` above 100 needs `on`. Write `on: true`",),
    "? [1, 2]\n: 3": ("not valid YAML", "a key is not a scalar"),
    "count: " + "9" * 5000: ("not valid YAML", "a.yaml, line 1"),
    "a: \x00": ("not valid YAML",),
    "inner: {rate: true}": ("'inner.rate'", "a number"),
    "inner: {rate: '1'}": ("'inner.rate'", "a number", "'1'"),
    "inner: {rate: 1}\non: no": ("'on'", "true or false", "'no'"),
    "inner: {rate: 1}\nkind: secnd": ("'kind'", "Did you mean 'second'?", "`first`"),
    "inner: {rate: 1}\nnumbers: [1, a]": ("'numbers[1]'",),
    "inner: {rate: 1}\nnumbers: 12": ("'numbers'", "a list"),
    "inner: {rate: 1}\ntable: {a: b}": ("'table.a'", "a number"),
    "inner: 3": ("'inner'", "a mapping"),
    "inner:": ("'inner'", "a mapping", "nothing"),
    "inner: {rate: 1}\ninner: {rate: 2}": ("'inner' is given twice", "lines 1 and 2"),
    "inner:\n  rate: 1\n  rate: 2": ("'rate' is given twice", "lines 2 and 3"),
    "inner: [": ("not valid YAML", "a.yaml, line"),
    "- a": ("not a mapping",),
    "": ("not a mapping",),
    "inner: !!python/object:os.system {}": ("not valid YAML",),
}


@pytest.mark.parametrize("text", REFUSED)
def test_errors_name_line_and_correction(text: str) -> None:
    message = refusal(text)
    assert message.startswith("a.yaml")
    for part in REFUSED[text]:
        assert part in message


def test_anchors_and_merge_keys_work_without_counting_as_duplicates() -> None:
    assert read("inner: &i {rate: 1, name: b}\neither: {<<: *i}").either == Inner(rate=1.0, name="b")
    assert read("inner: &i {rate: 1, name: b}\neither: {<<: *i, name: c}").either == Inner(rate=1.0, name="c")
    assert read("inner: &i {rate: 1, name: b}\neither: {name: c, <<: *i}").either == Inner(rate=1.0, name="c")
    assert "is given twice" in refusal("inner: &i {rate: 1, name: b}\neither: {<<: *i, name: c, name: d}")


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("beta", ["beta_", "rate"]) == " Did you mean 'beta_'?"
    assert nearest("zzz", ["beta", "rate"]) == ""


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_canonical_form_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    turned = dict(reversed(list(value.items())))
    assert canonical(identity(value)) == canonical(identity(turned))
    assert digest(identity(value)) == digest(identity(turned))


def test_canonical_form_is_pinned() -> None:
    """Stores are used across versions of the program, so this text and this digest must never change."""
    value = {"b": (1, 2.5, None, True), "a": {"é": "x"}, "i": Inner(rate=5e-7)}
    assert canonical(identity(value)) == '{"a":{"é":"x"},"b":[1,2.5,null,true],"i":{"rate":5e-07}}'
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize("value", [{1, 2}, object(), Path("a"), b"x", lambda: None])
def test_a_value_without_a_canonical_form_is_an_error(value: object) -> None:
    with pytest.raises(TypeError, match="no canonical JSON form"):
        to_plain({"a": [value]})
    with pytest.raises(TypeError, match="no canonical JSON form"):
        identity({"a": [value]})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_have_no_canonical_form(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical(value)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads_on_any_machine_and_is_named_like_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.tables


def test_shipped_recipes_are_all_files_of_the_folder() -> None:
    folder = Path(__file__).parents[2] / "ctpd" / "recipes"
    assert set(shipped_recipes()) == {path.stem for path in folder.rglob("*.yaml")}
    assert len(shipped_recipes()) >= 4


def test_hub_model_without_a_revision_is_refused(tmp_path: Path) -> None:
    text = shipped_recipes()["testbed-smoke"].read_text()
    start = text.index("    pretrain: {corpus: student")
    line = text[start : text.index("\n", start)]
    path = tmp_path / "r.yaml"
    path.write_text(text.replace(line, "    model: org/name"))
    with pytest.raises(UserError, match=r"shared\.student\.model.*pin its revision"):
        load_recipe(path)
    path.write_text(text.replace(line, "    model: org/name\n    revision: main"))
    with pytest.raises(UserError, match="not a commit; a branch changes"):
        load_recipe(path)
    path.write_text(text.replace(line, f"    model: org/name\n    revision: {'a1' * 20}"))
    assert load_recipe(path).shared.student.revision == "a1" * 20


def test_construction_in_code_is_as_strict() -> None:
    for wrong in ({"rate": math.nan}, {"rate": "1"}, {"rate": 1.0, "nam": "a"}, {}):
        with pytest.raises(ValidationError):
            Inner(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        Inner(rate=1.0).rate = 2.0  # type: ignore[misc]
