"""Read rows of pairs from files and from the hub. `ctpd.text.pairs` interprets the rows."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ctpd.core.errors import UserError
from ctpd.pipeline.references import External

Row = Mapping[str, Any]
COUNTED_BYTES = 64 * 2**20  # larger json and csv files are not read only to count their rows


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a local jsonl, json, parquet or csv file.

    Raises:
        UserError: no such file, an unknown ending, or a row that is not an object.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".parquet": _parquet,
        ".csv": _csv,
    }
    if not path.is_file():
        raise UserError(
            f"the data file '{path}' does not exist", fix="Correct `path` under `shared.data` in the recipe"
        )
    if path.suffix not in readers:
        raise UserError(
            f"the ending '{path.suffix}' is not known", where=str(path), fix=f"Give one of {', '.join(readers)}"
        )
    return readers[path.suffix](path)


def read_hub(name: str, *, config: str | None, split: str, revision: str) -> Iterator[Row]:
    """The rows of a hub data set at a pinned revision.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the data set could not be loaded ({str(error).splitlines()[0]})",
            where=f"{name}@{revision}",
            fix="Check name, split and revision, or give a local `path`",
        ) from error
    return iter(loaded)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        raise UserError(
            f"the data file '{path}' does not exist", fix="Correct `path` under `shared.data` in the recipe"
        )
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def count_rows(path: Path) -> int | None:
    """The number of rows of a local file, without parsing them; None where that cannot be told at once."""
    if not path.is_file():
        return None
    found = path.stat()
    return _count_rows(path.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _count_rows(path: Path, size: int, changed: int) -> int | None:
    if path.suffix == ".jsonl":
        with path.open("rb") as handle:
            return sum(not line.isspace() for line in handle)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid

        try:
            return int(pq.read_metadata(path).num_rows)
        except ArrowInvalid:
            return None
    if size > COUNTED_BYTES:
        return None
    try:
        return sum(1 for _ in read_rows(path))
    except (UserError, ValueError, csv.Error):  # said when the file is read
        return None


def same_vocabulary(one: External, other: External) -> bool | None:
    """Whether two tokenizer directories hold the same tokens under the same ids; None if a file does not say.

    Reads `tokenizer.json` alone: loading a tokenizer takes longer than a plan should.
    """
    if one.digest == other.digest:
        return True
    paths = [Path(source.location) / "tokenizer.json" for source in (one, other)]
    if not all(path.is_file() for path in paths):
        return None
    left, right = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return all(_vocabulary(left, part) == _vocabulary(right, part) for part in ("model", "added"))


def _vocabulary(tokenizer: Mapping[str, Any], part: str) -> Any:
    if part == "model":
        return tokenizer.get("model", {}).get("vocab")
    return {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield _record(_decode(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    data = _decode(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, list):
        raise UserError("the file is not a list of objects", where=str(path), fix="Give a JSON list, or jsonl")
    for number, item in enumerate(data):
        yield _record(item, f"{path}, item {number}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        table = pq.read_table(path)
    except ArrowInvalid as error:
        raise UserError(f"this is no parquet file ({error})", where=str(path)) from error
    for batch in table.to_batches(1024):
        yield from batch.to_pylist()


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as handle:
        yield from csv.DictReader(handle)


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})", where=where) from error


def _record(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise UserError(
            "the row is not an object with columns", where=where, fix='Write {"prompt": ..., "chosen": ...}'
        )
    return item
