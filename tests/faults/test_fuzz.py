"""Fuzzing of whatever reads a user's file: only a `UserError` may come out.

``CTPD_FUZZ_EXAMPLES=100000 python -m pytest tests/faults/test_fuzz.py`` takes long; the default is short.
"""

import gzip
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from ctpd.core.config import parse_yaml, to_plain
from ctpd.core.errors import UserError
from ctpd.core.identity import canonical
from ctpd.core.printing import printable
from ctpd.core.text_encoding import text_codec
from ctpd.pipeline.sources import count_rows
from ctpd.pipeline.stages.pairs import read_pair_file, read_usable_file
from ctpd.recipe import load_recipe, shipped_recipes
from ctpd.text.config import Columns, Layout
from ctpd.text.layouts import holds_more
from ctpd.text.pairs import check_columns, parse_pairs, usable_rows
from ctpd.text.recognise import recognise
from harness.record import Record
from harness.suites import SUITES, load_suite
from tests.fixtures.fuzzing import fuzzed
from tests.fixtures.hostile import HEADER, LINE, line, zstd
from tests.fixtures.records import record, result

LONGEST_MESSAGE = 3000  # characters of a paragraph

RECIPES = {name: path.read_bytes() for name, path in shipped_recipes().items() if name.startswith("testbed-")}
SUITE = (SUITES / "testbed.yaml").read_bytes()
RECORD = (record("dpo", 0, result("A", [1, 0]), result("B", [0.5])).model_dump_json() + "\n").encode()
JSONL, CSV = (2 * line()).encode(), (HEADER + 2 * LINE).encode()

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "\0", "\x1b", "\ud800", "../..", "1e999", "x" * 300, "chat", "testbed", "learning_rate", "~x/y"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FRAGMENTS = st.sampled_from(
    [
        *(
            b"&a ",
            b"*a",
            b"<<: ",
            b"!!binary ",
            b"!!float ",
            b"!!map ",
            b"!!str ",
            b"!!python/name:os ",
            b"? ",
            b"- ",
            b": ",
        ),
        *(
            b"[" * 400,
            b"{a: " * 400,
            b'"',
            b"'",
            b"|\n",
            b"\t",
            b"\r",
            b"\0",
            b"\xff",
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b'"\\ud800"',
        ),
        *(
            b"1e999",
            b".nan",
            b"9" * 5000,
            b"0x" + b"f" * 5000,
            b"null",
            b"~",
            b"%YAML 9.9\n",
            b"---\n",
            b"\n",
            b",",
            b"#",
            b"@",
            b"`",
        ),
    ]
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The file with a few changes: bytes replaced, removed, doubled, or something odd put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(whole)))
        end = min(len(whole), start + draw(st.integers(0, 30)))
        middle = draw(st.one_of(FRAGMENTS, st.binary(max_size=6), st.just(2 * whole[start:end]), st.just(b"")))
        whole = whole[:start] + middle + whole[end:]
    return whole


@st.composite
def replaced(draw: st.DrawFn, data: Any) -> Any:
    """Parsed data with one value, somewhere inside, replaced by any other."""
    if isinstance(data, dict) and data and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(data)))
        if not draw(st.integers(0, 5)):
            return {draw(st.text(max_size=8)) if name == key else name: value for name, value in data.items()}
        return data | {key: draw(replaced(data[key]))}
    if isinstance(data, list) and data and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(data) - 1))
        return [*data[:index], draw(replaced(data[index])), *data[index + 1 :]]
    return draw(VALUES)


def refuses_or_reads(read: Callable[[], Any]) -> Any:
    """What is read, or None; anything but a `UserError` of one short paragraph is a finding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read()
    except UserError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < LONGEST_MESSAGE
        assert printable(text).encode()
        return None


def read_recipe(path: Path) -> Any:
    """The recipe, in the form that becomes part of a key."""
    recipe = load_recipe(path)
    assert canonical(to_plain(recipe))
    return recipe


@fuzzed
@given(st.sampled_from(sorted(RECIPES)).flatmap(lambda name: damaged(RECIPES[name])))
def test_recipes_with_damaged_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    refuses_or_reads(lambda: read_recipe(path))


@fuzzed
@given(st.sampled_from(sorted(RECIPES)).flatmap(lambda name: replaced(yaml.safe_load(RECIPES[name]))))
def test_recipes_with_other_values(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML, and `5e-3` a number
    refuses_or_reads(lambda: read_recipe(path))


@fuzzed
@given(st.text() | VALUES.map(lambda value: json.dumps(value, ensure_ascii=False)))
def test_any_text_as_yaml(text: str) -> None:
    refuses_or_reads(lambda: parse_yaml(text, source="recipe.yaml"))


@fuzzed
@given(damaged(SUITE) | replaced(yaml.safe_load(SUITE)).map(lambda data: json.dumps(data).encode()))
def test_suites(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "suite.yaml"
    path.write_bytes(content)
    refuses_or_reads(lambda: load_suite(path))


@fuzzed
@given(st.text(max_size=300))
def test_any_text_as_the_name_of_a_recipe_or_suite(name: str) -> None:
    assume(name not in shipped_recipes())
    refuses_or_reads(lambda: load_recipe(name))
    refuses_or_reads(lambda: load_suite(name))


@fuzzed
@given(damaged(RECORD) | replaced(json.loads(RECORD)).map(lambda data: json.dumps(data).encode()))
def test_records(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    found = refuses_or_reads(lambda: Record.read(path))
    if found is not None:
        found.write(path)
        assert Record.read(path) == found


def contents() -> Iterator[tuple[str, Any]]:
    """Endings with strategies of bytes."""
    rows = st.lists(replaced(json.loads(line())), max_size=3)
    yield ".jsonl", damaged(JSONL) | rows.map(lambda items: "\n".join(map(json.dumps, items)).encode())
    yield (
        ".json",
        damaged(b"[" + JSONL.replace(b"\n", b",", 1) + b"]") | VALUES.map(lambda value: json.dumps(value).encode()),
    )
    yield ".csv", damaged(CSV) | st.binary(max_size=200)
    yield ".jsonl.gz", damaged(gzip.compress(JSONL)) | damaged(JSONL).map(gzip.compress)
    yield ".csv.zst", damaged(zstd(CSV)) | damaged(CSV).map(zstd)


ENDINGS = [".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.zst"]
CODECS = (
    "cp1252",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "utf-7",
    "gbk",
    "shift_jis",
    "iso2022_jp",
    "hz",
    "latin-1",
    "cp037",
)


@pytest.mark.parametrize(("ending", "content"), list(contents()), ids=ENDINGS)
@fuzzed
@given(data=st.data())
def test_pairs(ending: str, content: Any, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / f"pairs{ending}"
    path.write_bytes(data.draw(content))
    refuses_or_reads(lambda: read_pair_file(path))
    for pair in refuses_or_reads(lambda: list(read_usable_file(path).pairs)) or ():
        assert pair.prompt[-1].role == "user"
        assert pair.chosen.encode() == pair.chosen.strip().encode()


@fuzzed
@given(st.sampled_from(CODECS), st.data())
def test_pairs_in_an_encoding(tmp_path: Path, codec: str, data: st.DataObject) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(data.draw(damaged(JSONL.decode().encode(codec, errors="replace")) | st.binary(max_size=200)))
    encoding = text_codec(codec)
    found = refuses_or_reads(lambda: list(read_usable_file(path, encoding=encoding).rows))
    assert found is None or len(found) == count_rows(path, encoding=encoding)


@fuzzed
@given(data=st.data())
def test_damaged_parquet(tmp_path: Path, data: st.DataObject) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line())] * 3), path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    refuses_or_reads(lambda: read_pair_file(path))


@fuzzed
@given(
    st.lists(
        replaced(
            {
                "prompt": [{"role": "user", "content": "x"}],
                "chosen": "a",
                "rejected": "b",
                "chosen_marks": [[0, 1, True]],
            }
        )
    )
)
def test_rows_of_any_shape(rows: list[Any]) -> None:
    refuses_or_reads(lambda: parse_pairs(rows, source="rows"))


OTHER_FORMS = (
    {"conversations": [{"from": "human", "value": "x"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    {"instruction": "x", "input": "y", "output": ["a", "b"], "system": "s"},
    {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
)


@pytest.mark.parametrize("row", OTHER_FORMS, ids=["sharegpt", "alpaca", "transcript"])
@fuzzed
@given(data=st.data())
def test_rows_of_other_forms(row: dict[str, Any], data: st.DataObject) -> None:
    """They are recognised, or refused in one paragraph, and what is recognised reads at least one of them."""
    rows = [item for item in data.draw(st.lists(replaced(row), min_size=1)) if isinstance(item, dict)]
    columns = Columns(prompt="instruction", input="input", responses="output")
    for layout in (Layout(), Layout(form="transcript"), Layout(columns=columns)):
        refuses_or_reads(lambda given=layout: list(usable_rows(rows, source="rows", layout=given)))
        refuses_or_reads(lambda given=layout: check_columns(rows, source="rows", layout=given))
    assert all(holds_more(item) in (True, False) for item in rows)
    found = refuses_or_reads(lambda: recognise(rows, source="rows"))
    if found is not None:
        assert found.bad < len(rows)
        assert found.sentence()
