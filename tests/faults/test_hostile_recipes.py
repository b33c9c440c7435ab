"""Recipes and suites in other encodings, nested deeply, with aliases that expand, odd tags and numbers: one paragraph each."""

import json
import time
from pathlib import Path

import pytest
import yaml

from ctpd.core.config import parse_yaml
from ctpd.core.errors import UserError
from ctpd.core.userfiles import CONFIGURATION_BYTES
from ctpd.recipe import load_recipe, shipped_recipes
from harness.record import Record
from harness.suites import SUITES, load_suite
from tests.conftest import Cli

pytestmark = pytest.mark.tries("hostile recipes, suites and records")

SMOKE = shipped_recipes()["testbed-smoke"]
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{one}: &{one} [{','.join([f'*{before}'] * 9)}]" for before, one in zip("abcdefg", "bcdefgh", strict=True)
)
YAML = {
    "aliases": (LAUGHS, "line 6: the file holds more than 100,000 values"),
    "merged aliases": (
        "a: &a {x: 1}\n"
        + "\n".join(
            f"{one}: &{one} {{<<: [{','.join([f'*{b}'] * 9)}]}}" for b, one in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "more than 100,000 values",
    ),
    "alias in itself": ("a: &a [*a]", "line 1: an alias is inside what it stands for"),
    "lists": ("a: " + "[" * 5000, "nested too deeply"),
    "mappings": ("a: " + "{a: " * 3000, "nested too deeply"),
    "lines": ("\n".join(" " * i + "a:" for i in range(2000)), "nested too deeply"),
    "binary": ("a: !!binary aGVsbG8=", "line 1: not valid YAML .*binary"),
    "date": ("a: !!timestamp 2001-01-01", "line 1: not valid YAML .*timestamp"),
    "set": ("a: !!set {x}", "line 1: not valid YAML .*set"),
    "code": ("a: !!python/name:os.system x", "line 1: not valid YAML .*python"),
    "large": ("a: 1e999", "the number 1e999 is too large"),
    "integer": ("a: " + "9" * 30, "the number 9+ is too large"),
    "digits": ("a: " + "9" * 5000, "not an integer"),
    "hexadecimal": ("a: 0x" + "f" * 6000, r"the number 0xf+\.\.\. \(5,902 more characters\) is too large"),
    "no float": ("a: !!float x", "not a number"),
    "empty float": ('a: !!float ""', "not valid YAML"),
    "no bool": ("a: !!bool x", "not valid YAML"),
    "no mapping": ("a: !!map x", "not valid YAML .*`!!map`"),
    "no text": ("a: !!str [x]", "not valid YAML .*`!!str`"),
    "code point": ('a: "\\UFFFFFFFF"', "not valid YAML"),
    "surrogate": ('a: "\\ud800"', r"half of a surrogate pair, U\+D800"),
    "surrogate key": ('"\\ud800": 1', r"half of a surrogate pair, U\+D800"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_no_recipe_needs_is_refused_at_once(kind: str) -> None:
    text, said = YAML[kind]
    start = time.process_time()
    with pytest.raises(UserError, match=said) as caught:
        parse_yaml(text, source="r.yaml")
    assert time.process_time() - start < 5  # aliases of six levels took 9 seconds
    assert str(caught.value).startswith("r.yaml")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            SMOKE.read_text().replace("tiny", "tiné").encode("latin-1"),
            "line 5: the file is not UTF-8 text: byte 0xE9 .*WINDOWS-1252",
        ),
        (SMOKE.read_text().replace("tiny", "“tiny”").encode("cp1252"), "line 5: .* WINDOWS-1252"),
        (SMOKE.read_text().encode("utf-16"), "UTF-16LE"),
        (SMOKE.read_text().encode("utf-16-be"), "UTF-16BE"),
        (b"name: a\0", "byte 0x00 at position 7"),
        (b"\x80\x04\x95\x00", "the file is not UTF-8 text: byte 0x80 at position 0. Save it as UTF-8"),
        (b"PAR1\xff", "is a Parquet file"),
        (b"#" * (CONFIGURATION_BYTES + 1), "the file has 1.0 MiB, more than the 1 MiB that are read here"),
    ],
    ids=["latin-1", "cp1252", "utf-16", "utf-16-be", "nul", "pickle", "parquet", "large"],
)
def test_a_file_that_is_no_utf8_text_is_said_with_the_way_out(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    for load in (load_recipe, load_suite):
        with pytest.raises(UserError, match=said):
            load(path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    for name, load in ((SMOKE, load_recipe), (SUITES / "testbed.yaml", load_suite)):
        path = tmp_path / name.name
        path.write_bytes(name.read_text().encode("utf-8-sig"))
        assert load(path) == load(name)


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "\ud800", "~nobody-of-this-name/r.yaml", "r.yaml/x", ""], ids=ascii
)
def test_a_name_that_is_no_path_is_no_recipe_and_no_suite(name: str) -> None:
    for load in (load_recipe, load_suite):
        with pytest.raises(UserError):
            load(name)
        with pytest.raises(UserError):
            load(f"{name}.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, and a file is needed"):
        load_recipe(tmp_path)


CHANGES = {
    "infinite parameter": (
        "{method: dpo,",
        "{method: dpo, params: {x: .inf},",
        r"line 45: 'runs\.DPO\.params\.x' must be finite, and is inf",
    ),
    "infinite label": ("Average: average", "Average: -.inf", r"'ablations\.weights\.values\.Average' must be finite"),
    "misspelt rate": (
        "dpo, tuned: {learning_rate:",
        "dpo, tuned: {learning_rte:",
        r"line 45: unknown key 'runs\.DPO\.tuned\.learning_rte'\. Did you mean 'learning_rate'\?",
    ),
    "no rate": ("dpo, tuned: {learning_rate: 1e-3, ", "dpo, tuned: {", r"'runs\.DPO\.tuned' lacks `learning_rate`"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_values_of_any_type_are_checked_and_names_offered(kind: str, tmp_path: Path) -> None:
    before, after, said = CHANGES[kind]
    text = SMOKE.read_text()
    assert before in text
    (tmp_path / "r.yaml").write_text(text.replace(before, after))
    with pytest.raises(UserError, match=said.replace("line 45", r"line \d+")):
        load_recipe(tmp_path / "r.yaml")


def test_the_command_line_prints_a_long_value_shortened(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SMOKE.read_text().replace("num_topics: 8", f"num_topics: {list(range(10_000))}"))
    code, _, err = cli("run", tmp_path / "r.yaml", "--plan", "--store", tmp_path / "s")
    assert code == 2
    assert "'shared.testbed.num_topics' must be a whole number" in err
    assert len(err) < 600


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff", b'{"schema": 2}', b"[]", b"null", b'{"schema": 1e999}'], ids=ascii
)
def test_a_record_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content[:100_000])
    with pytest.raises(UserError, match=r"the record|no record"):
        Record.read(path)


@pytest.mark.parametrize(
    "path", ["~nobody-of-this-name/a", "x" * 300, "a/" * 3000], ids=["home", "long name", "long path"]
)
@pytest.mark.parametrize("key", ["model", "data"])
def test_a_path_that_no_file_system_has_is_said(key: str, path: str, cli: Cli, tmp_path: Path) -> None:
    data = yaml.safe_load(SMOKE.read_text().replace("e-3", ".0e-3"))
    if key == "model":
        del data["shared"]["student"]["pretrain"]
        data["shared"]["student"]["model"] = path
    else:
        data["shared"]["data"]["train"] = {"path": path}
    (tmp_path / "r.yaml").write_text(json.dumps(data))
    code, _, err = cli("run", tmp_path / "r.yaml", "--plan", "--store", tmp_path / "s")
    assert code == 2
    assert "fault of ctpd" not in err
