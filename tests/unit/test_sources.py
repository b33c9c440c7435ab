"""Sources of pairs: several files, compressed ones, other encodings; their digests, counts and places of rows."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctpd.core import archives, userfiles
from ctpd.core.errors import UserError
from ctpd.core.text_encoding import text_codec
from ctpd.pipeline.readers import read_csv, read_jsonl, read_parquet
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.sources import DataRows, count_rows, data_files, file_digest, read_rows
from ctpd.pipeline.stage import Work
from ctpd.pipeline.stages.pairs import FilePairs, read_usable_file
from ctpd.recipe.model import Source
from ctpd.text.pairs import Dropped, Pair
from tests.fixtures.hostile import line, zstd

PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}


@pytest.fixture
def work(tmp_path: Path) -> Work:
    folder = tmp_path / "built"
    folder.mkdir()
    return Work(folder, Runtime(device="cpu"), lambda done, total: None)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three files of 2, 0 and 3 rows, written in another order than that of their names."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "c.jsonl").write_text("".join(line(prompt=f"c{i}") for i in range(3)))
    (folder / "a.jsonl").write_text("".join(line(prompt=f"a{i}") for i in range(2)))
    (folder / "b.jsonl").write_text("\n")
    return folder


def test_files_of_a_folder_are_read_in_the_order_of_their_names_and_rows_keep_their_place(shards: Path) -> None:
    rows = DataRows(shards)
    assert [row["prompt"] for row in rows] == ["a0", "a1", "c0", "c1", "c2"]
    places = [rows.place(number) for number in range(5)]
    assert [(Path(file).name, row) for file, row in places] == [
        *(("a.jsonl", row) for row in range(2)),
        *(("c.jsonl", row) for row in range(3)),
    ]
    assert count_rows(shards) == 5
    assert count_rows(shards / "*.jsonl") == 5
    assert count_rows(shards / "no*.jsonl") is None
    assert [row["prompt"] for row in read_rows(shards / "[ab].*")] == ["a0", "a1"]


def test_the_digest_of_one_file_is_its_own_however_it_is_named_and_of_several_tells_their_order(shards: Path) -> None:
    one = file_digest(shards / "a.jsonl")
    assert file_digest(shards / "a*") == one
    several = file_digest(shards)
    assert several == file_digest(shards / "*.jsonl")
    assert several != one
    contents = {file.name: file.read_bytes() for file in shards.iterdir()}
    (shards / "a.jsonl").write_bytes(contents["c.jsonl"])
    (shards / "c.jsonl").write_bytes(contents["a.jsonl"])
    assert file_digest(shards) != several
    assert len(several) == len(one) == 64


@pytest.mark.parametrize("change", ["changed", "added", "removed", "renamed"])
def test_a_shard_that_changes_comes_or_goes_after_the_plan_is_refused(change: str, shards: Path, work: Work) -> None:
    source = FilePairs(str(shards), file_digest(shards))
    assert len(list(source.read(work).pairs)) == source.most == 5
    if change == "changed":
        (shards / "c.jsonl").write_text(line())
    elif change == "added":
        (shards / "d.jsonl").write_text("")
    elif change == "removed":
        (shards / "b.jsonl").unlink()
    else:
        (shards / "a.jsonl").rename(shards / "z.jsonl")
    with pytest.raises(UserError, match=r"data: the contents have changed since this command was started"):
        list(source.read(work).rows)


def test_a_row_that_is_no_pair_is_named_by_its_file_and_its_row_there(shards: Path) -> None:
    bad = line(chosen=[{"role": "assistant", "content": None}])
    (shards / "c.jsonl").write_text(line() + bad + line(chosen=None))
    *pairs, first, second = read_usable_file(shards).rows
    assert [pair.id for pair in pairs if isinstance(pair, Pair)] == ["0", "1", "2"]
    assert isinstance(first, Dropped)
    assert isinstance(second, Dropped)
    assert [(loss.row, loss.reason) for loss in (first, second)] == [("3", "null_content"), ("4", "malformed")]
    assert first.detail.startswith(f"{shards}/c.jsonl, row 1, column 'chosen', message 0: the content is noth")
    for file in shards.iterdir():
        file.write_text("")
    (shards / "b.jsonl").write_text(bad)
    with pytest.raises(UserError, match=r"b\.jsonl, row 0, column 'chosen', message 0"):
        list(read_usable_file(shards).rows)


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", [None, "cp1252", "utf-16"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_rows_are_counted_compressed_or_not_and_in_any_encoding(
    ending: str, encoding: str | None, end: str, tmp_path: Path
) -> None:
    text = {".jsonl": "A\n\nA\n", ".json": "[A, A]", ".csv": 'prompt,chosen\n"à\nb",c\né,\n'}[ending].replace(
        "A", '{"a": "à"}'
    )
    content = text.encode(encoding or "utf-8")
    path = tmp_path / f"a{ending}{end}"
    path.write_bytes(PACK[end](content) if end else content)
    assert count_rows(path, encoding=encoding) == len(list(read_rows(path, encoding=encoding))) == 2
    path.write_bytes(b"\xff\x00")
    assert count_rows(path, encoding=encoding) in ((1,) if (ending, encoding, end) == (".jsonl", None, "") else (None,))


def test_an_encoding_is_part_of_the_key_of_pairs_only_where_it_is_given() -> None:
    assert FilePairs("a.csv", "0").identity == {"sha256": "0"}
    assert FilePairs("a.csv", "0", "cp1252").identity == {"sha256": "0", "encoding": "cp1252"}


@pytest.mark.parametrize(
    ("name", "codec"),
    [("utf-8", None), ("UTF8", None), ("utf-8-sig", None), ("windows-1252", "cp1252"), ("latin-1", "iso8859-1")],
)
def test_names_of_one_encoding_are_one(name: str, codec: str | None) -> None:
    assert text_codec(name) == Source(path="a.csv", encoding=name).encoding == codec


@pytest.mark.parametrize("codec", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl.gz"])
def test_the_encoding_that_an_error_proposes_reads_the_file(ending: str, codec: str, tmp_path: Path) -> None:
    row = {"prompt": "Où est-ce ?", "chosen": "À l'été", "rejected": "Ça dépend"}
    text = (
        "\n".join([",".join(row), ",".join(row.values())]) if ending == ".csv" else json.dumps(row, ensure_ascii=False)
    )
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(text.encode(codec)) if ending.endswith("gz") else text.encode(codec))
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    proposed = re.search(r"Write `encoding: ([\w-]+)` beside `path`", str(caught.value))
    assert proposed is not None, caught.value
    assert list(read_rows(path, encoding=text_codec(proposed[1]))) == [row]


@pytest.mark.parametrize("name", ["cp1525", "hex", "rot13", "undefined", "idna", "unicode_escape", "a\0b", "x" * 400])
def test_what_is_no_encoding_of_text_is_refused_when_the_recipe_is_read(name: str) -> None:
    with pytest.raises(ValueError, match="there is no encoding of text files"):
        Source(path="a.csv", encoding=name)
    if name == "cp1525":
        with pytest.raises(ValueError, match=r"Did you mean 'cp125\d'"):
            Source(path="a.csv", encoding=name)


@pytest.mark.parametrize(
    "source", [{"path": "a.parquet"}, {"path": "a/*.PARQUET"}, {"hub": "a/b", "split": "train", "revision": "0" * 40}]
)
def test_an_encoding_of_what_has_its_own_is_refused_when_the_recipe_is_read(source: dict[str, Any]) -> None:
    Source(**source)
    with pytest.raises(ValueError, match="`encoding` is that of text files"):
        Source(**source, encoding="cp1252")


def test_an_encoding_of_a_folder_of_parquet_is_refused_when_the_pairs_are_planned(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the texts of Parquet are always UTF-8"):
        file_digest(tmp_path, encoding="cp1252")


def endless(kind: str) -> str:
    """The first MiB, or 20,000 rows, of what goes on like that."""
    first, again = {
        "line": ("", "a" * 2**12),
        "cell": ('"', "a\n" * 2**11),
        "row": ('"', '\n","' * 2**10),
        "rows": ("", line()),
        "empty": ("", "\n"),
    }[kind]
    return first + again * {"rows": 20_000, "empty": 2**19}.get(kind, 2**9)


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["line", "rows", "empty"])
def test_an_archive_that_expands_without_end_is_refused(
    kind: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has filled the memory: after `FREE_BYTES`, for what is far smaller than they are."""
    monkeypatch.setattr(archives, "FREE_BYTES", 2**18)
    path = tmp_path / f"a.jsonl{end}"
    path.write_bytes(PACK[end](endless(kind).encode()))
    with pytest.raises(UserError, match="expands to more than 200 times its size"):
        for _ in read_jsonl(path):
            pass
    assert count_rows(path) is None
    monkeypatch.setattr(archives, "FREE_BYTES", 2**28)
    if kind == "rows":
        path.touch()  # counts are remembered until a file is changed
        assert count_rows(path) == 20_000


@pytest.mark.parametrize(("kind", "what"), [("line", "a line"), ("cell", "a row"), ("row", "a row")])
def test_a_line_or_row_without_end_is_refused(
    kind: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctpd.pipeline import readers

    monkeypatch.setattr(userfiles, "LONGEST_LINE", 2**20)
    monkeypatch.setattr(readers, "LONGEST_LINE", 2**20)
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + endless(kind))
    with pytest.raises(UserError, match=rf"a\.csv: {what} has more than 1,048,576 characters"):
        list(read_csv(path))


def test_a_line_longer_than_a_piece_is_whole(tmp_path: Path) -> None:
    """Lines are read in pieces of a MiB, wherever their ends are in one."""
    path = tmp_path / "a.txt"
    for size in (2**20 - 1, 2**20, 2**20 + 1):
        for newline in ("\n", "\r\n", "\r"):
            lines = ["é" * size + newline, "b" + newline, "c"]
            path.write_text("".join(lines), newline="", encoding="utf-8")
            assert [one.strip() for one in userfiles.text_lines(path) if one.strip()] == [one.strip() for one in lines]


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    """Whole row groups, or all of them read ahead, would be 20 MB here."""
    path = tmp_path / "a.parquet"
    texts = [format(number, "0>1000") for number in range(20_000)]
    pq.write_table(pa.table({"chosen": texts}), path, row_group_size=10_000, compression="none", use_dictionary=False)
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for row in read_parquet(path):
        assert row["chosen"] == texts[rows]
        rows += 1
        most = max(most, pa.total_allocated_bytes() - before)
    assert rows == len(texts)
    assert most < path.stat().st_size / 3


def test_a_missing_codec_is_said_in_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(line().encode()))
    monkeypatch.setattr(pa, "Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(UserError, match="the installed pyarrow cannot read zstd"):
        list(read_rows(tmp_path / "a.jsonl.zst"))


def test_a_folder_of_another_program_is_read_but_for_what_is_no_data(tmp_path: Path) -> None:
    """Spark writes a folder with the name of the file."""
    folder = tmp_path / "pairs.parquet"
    folder.mkdir()
    for name in ("part-00001.parquet", "part-00000.parquet"):
        pq.write_table(pa.table({"a": [name]}), folder / name)
    for name in ("_SUCCESS", ".part-00000.parquet.crc"):
        (folder / name).write_text("x")
    assert [file.name for file in data_files(folder)] == ["part-00000.parquet", "part-00001.parquet"]
    assert [row["a"] for row in read_rows(folder)] == ["part-00000.parquet", "part-00001.parquet"]


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (("train.jsonl", "test.jsonl"), ("train.jsonl", "test.jsonl")),
        (
            ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"),
            ("train-0000*.jsonl", "validation-00000-of-00001.jsonl"),
        ),
        (
            ("train_prefs-0-of-1.jsonl", "train_sft-0-of-1.jsonl"),
            ("train_prefs-0-of-1.jsonl", "train_sft-0-of-1.jsonl"),
        ),
        (("pairs_train_1.jsonl", "pairs_train_2.jsonl", "pairs_dev.jsonl"), ("pairs_train_*.jsonl", "pairs_dev.jsonl")),
        (("train/a.jsonl", "test/a.jsonl"), ("train/a.jsonl", "test/a.jsonl")),
    ],
    ids=["plain", "hub", "ultrafeedback", "at the end", "folders"],
)
def test_files_of_several_splits_are_refused_with_what_names_one(
    names: tuple[str, ...], paths: tuple[str, ...], tmp_path: Path
) -> None:
    """A folder of `train` and `test` was read as one source, so that the pairs of the test were trained on."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    source = tmp_path / "**" / "*.jsonl" if "/" in names[0] else tmp_path
    with pytest.raises(UserError, match="several splits") as caught:
        data_files(source)
    for path in paths:
        assert f"`path: {tmp_path / path}`" in str(caught.value)
        assert data_files(tmp_path / path)


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.jsonl", "train-1.jsonl"),
        ("train_a.jsonl", "train_b.jsonl"),
        ("part-0.jsonl", "part-1.jsonl"),
        ("testament.jsonl", "trains.jsonl"),
        ("web-dev-talk.jsonl", "latest-train.jsonl"),
    ],
)
def test_files_of_one_split_are_read_together(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}\n")
    assert [file.name for file in data_files(tmp_path)] == sorted(names)


@pytest.mark.parametrize(
    ("files", "expression"),
    [
        (("state.json", "dataset_info.json", "data-00000-of-00001.arrow"), "pairs').to_parquet"),
        (("dataset_dict.json", "train/state.json"), "pairs')['train'].to_parquet"),
    ],
)
def test_what_datasets_saves_to_disk_is_named_with_how_to_write_it(
    files: tuple[str, ...], expression: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / "pairs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pairs" / name).write_text("{}")
    with pytest.raises(UserError, match=r"`datasets\.save_to_disk`") as caught:
        data_files(tmp_path / "pairs")
    assert expression in str(caught.value.fix)
