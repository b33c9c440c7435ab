"""Read rows of pairs from files and from the hub. `ctpd.text.pairs` interprets the rows."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ctpd.core.errors import UserError
from ctpd.core.userfiles import readable, regular_file
from ctpd.pipeline.readers import READERS, Row
from ctpd.pipeline.references import External

COUNTED_BYTES = 64 * 2**20  # larger json and csv files are not read only to count their rows


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a local jsonl, json, parquet or csv file.

    Raises:
        UserError: no such file, a folder, an unknown ending; while reading, bytes that are no text of the format, or a
            row that is not an object.
    """
    _data_file(path)
    if path.suffix not in READERS:
        raise UserError(
            f"the ending '{path.suffix}' is not known", where=str(path), fix=f"Give one of {', '.join(READERS)}"
        )
    return READERS[path.suffix](path)


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
        UserError: no such file, or one that cannot be read.
    """
    with readable(_data_file(path)), path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _data_file(path: Path) -> Path:
    """The path, if it is a file."""
    return regular_file(path, what="data file", fix="Correct `path` under `shared.data` in the recipe")


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
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except (OSError, pa.ArrowException):
            return None
    if size > COUNTED_BYTES:
        return None
    try:
        return sum(1 for _ in read_rows(path))
    except UserError:  # said when the file is read
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
    try:
        left, right = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        return all(_vocabulary(left, part) == _vocabulary(right, part) for part in ("model", "added"))
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):  # said when it is loaded
        return None


def _vocabulary(tokenizer: Mapping[str, Any], part: str) -> Any:
    if part == "model":
        return tokenizer.get("model", {}).get("vocab")
    return {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
