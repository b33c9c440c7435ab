"""Read rows of pairs from files and from the hub. `ctpd.text.pairs` interprets the rows."""

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from glob import escape, glob
from os.path import commonprefix
from pathlib import Path
from typing import Any

from ctpd.core.archives import COMPRESSIONS, compression
from ctpd.core.errors import UserError, listed
from ctpd.core.identity import digest
from ctpd.core.userfiles import exists, is_folder, readable, regular_file, text_lines
from ctpd.pipeline.readers import READERS, TEXT_ENDINGS, Row
from ctpd.pipeline.references import External

COUNTED_BYTES = 64 * 2**20  # larger json and csv files are not read only to count their rows
_WORDS = r"((?:train|training|test|validation|valid|val|dev|eval|evaluation)(?:_(?:prefs|sft|gen))?)"
_SPLIT_AT_START = re.compile(rf"{_WORDS}(?![^\W_])")
_SPLIT_AT_END = re.compile(rf"(?<![^\W_]){_WORDS}$")
_SHARD = re.compile(r"(?:[-_.](?:\d+|of))+$")
_ENDINGS = f"{', '.join(READERS)}, or of a compressed text: .jsonl{' or .jsonl'.join(COMPRESSIONS)}"


class DataRows:
    """The rows of a source of one or several files, file after file.

    Args:
        path: a file, a folder of files or a pattern, as `data_files` reads it.
        encoding: Python's name of that of the texts; left out, UTF-8.

    Raises:
        UserError: what `data_files` raises; while reading, bytes that are no text of the format, or a row that is not an
            object.
    """

    def __init__(self, path: Path, *, encoding: str | None = None) -> None:
        self.encoding, self.files = encoding, data_files(path, encoding=encoding)
        self.starts: list[int] = []
        """For each file that has been read or is being read, how many rows are before its first."""

    def __iter__(self) -> Iterator[Row]:
        self.starts, number = [], 0
        for file in self.files:
            self.starts.append(number)
            for row in READERS[_ending(file)](file, self.encoding):
                yield row
                number += 1

    def place(self, number: int) -> tuple[str, int]:
        """The file of a row that has been read, and the row's number in it, counted from 0."""
        found = bisect_right(self.starts, number) - 1
        return str(self.files[found]), number - self.starts[found]


def read_rows(path: Path, *, encoding: str | None = None) -> Iterator[Row]:
    """The rows of a source of one or several local files; arguments and errors are those of `DataRows`."""
    return iter(DataRows(path, encoding=encoding))


def data_files(path: Path, *, encoding: str | None = None) -> tuple[Path, ...]:
    """The files of a source in the order in which they are read.

    Args:
        path: a jsonl, json, parquet or csv file, of which texts may be compressed; a folder, of which the files in it are read,
            sorted by name, but for hidden files and those that are no data; or a pattern with `*`, `?`, `[...]` or `**`.
        encoding: that of the texts, if one is given.

    Raises:
        UserError: nothing is there, or no data; an unknown ending, or several; names of several splits; an encoding of
            Parquet files.
    """
    files = _data_files(path)
    for file in files:
        if _ending(file) not in READERS:
            raise UserError(
                f"the ending '{''.join(file.suffixes[-2:])}' is not known",
                where=str(file),
                fix=f"Give one of {_ENDINGS}",
            )
    by_ending = {_full_ending(file): file for file in reversed(files)}
    if len(by_ending) > 1:
        found = ", ".join(repr(file.name) for _, file in sorted(by_ending.items()))
        example = f"*{Counter(map(_full_ending, files)).most_common(1)[0][0]}"
        raise UserError(
            f"the files have several endings: {found}",
            where=str(path),
            fix=f"Name those that are meant by a pattern, such as '{path / example if is_folder(path) else example}'",
        )
    _refuse_several_splits(path, files)
    if encoding is not None and not set(map(_ending, files)) <= set(TEXT_ENDINGS):
        raise UserError(
            "an encoding is given, and the texts of Parquet are always UTF-8", where=str(path), fix="Remove `encoding`"
        )
    return files


def _data_files(path: Path) -> tuple[Path, ...]:
    if exists(path) or not any(mark in str(path) for mark in "*?["):
        return _files_of_folder(path) if is_folder(path) else (_data_file(path),)
    try:
        found = sorted(Path(name) for name in glob(str(path), recursive=True))
    except ValueError:  # a NUL
        found = []
    files = tuple(_data_file(file) for file in found if not file.is_dir())
    if not files:
        raise UserError(f"no file matches the pattern '{path}'", fix=_fix())
    return files


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    with readable(folder):
        found = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        files = tuple(_data_file(file) for file in found if _ending(file) in READERS and not file.is_dir())
    if {"state.json", "dataset_info.json"} <= {file.name for file in found}:
        raise _saved_to_disk(folder)
    if (folder / "dataset_dict.json").is_file():
        raise _saved_to_disk(folder, split="['train']")
    deeper = next((file for sub in found if sub.is_dir() for file in _data_in(sub)), None)
    if not files or deeper is not None:
        there = "no data file"
        there = there if not files else "data files, and more of them in folders of its own"
        example = "" if deeper is None else f", for example to `{folder}/**/*{_full_ending(deeper)}`"
        raise UserError(f"the folder '{folder}' holds {there}", fix=_fix(example))
    return files


def _saved_to_disk(folder: Path, *, split: str = "") -> UserError:
    return UserError(
        "the folder is a data set as `datasets.save_to_disk` writes it, which is not read",
        where=str(folder),
        fix=f"Write it as Parquet, with `datasets.load_from_disk('{folder}'){split}.to_parquet('pairs.parquet')`",
    )


def _refuse_several_splits(path: Path, files: Sequence[Path]) -> None:
    """Refuse files of which some are for training and others for evaluation, as their names say."""
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(_split(file), []).append(file)
    named.pop("", None)
    if len(named) > 1:
        paths = [f"`path: {_pattern(named[split], files)}`" for split in sorted(named)]
        raise UserError(
            f"the files are those of several splits, as their names say: {listed(sorted(named))}",
            where=str(path),
            fix=f"Name one of them in the recipe, such as {', '.join(paths[:-1])} or {paths[-1]}",
        )


def _split(file: Path) -> str:
    """The split that a file's name says, such as `train_prefs` of `train_prefs-00000-of-00001.parquet`, or its folder's; else ''."""
    name = file.name.removesuffix(_full_ending(file)).lower()
    found = _SPLIT_AT_START.match(name) or _SPLIT_AT_END.search(_SHARD.sub("", name))
    if found is None:
        found = _SPLIT_AT_START.fullmatch(file.parent.name.lower())
    return "" if found is None else found[1]


def _pattern(files: Sequence[Path], of: Sequence[Path]) -> Path:
    """A path that names these files alone among ``of``; the first of them where no pattern does."""
    first = files[0]
    names = [file.name.removesuffix(_full_ending(file)) for file in files]
    shared = commonprefix(names)  # noqa: RUF071 (of characters)
    pattern = first.with_name(f"{escape(shared)}*{_full_ending(first)}")
    matched = [file for file in of if file.match(str(pattern))]
    return pattern if len(files) > 1 and matched == list(files) else first


def _data_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if _ending(file) in READERS and not file.name.startswith("."))
    except OSError:  # such as `lost+found`
        return []


def _full_ending(path: Path) -> str:
    """The endings of a data file's name: `.csv` or `.csv.gz`."""
    return _ending(path) + (path.suffix.lower() if compression(path) else "")


def _ending(path: Path) -> str:
    """The ending of a data file's name that says its format, without that of its compression; the last one if it has none."""
    inner = Path(path.stem).suffix.lower()
    return inner if compression(path) and inner in TEXT_ENDINGS else path.suffix.lower()


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


def file_digest(path: Path, *, encoding: str | None = None) -> str:
    """sha256 of the bytes of a source's file; of several files, of their digests in order.

    Raises:
        UserError: what `data_files` raises, or a file that cannot be read.
    """
    digests = []
    for file in data_files(path, encoding=encoding):
        with readable(file), file.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else digest(digests)


def file_states(path: Path, *, encoding: str | None = None) -> tuple[tuple[Path, int, int], ...]:
    """Each file of a source with its size and the time of its last change, by which what was read of it can be remembered.

    Raises:
        UserError: what `data_files` raises.
    """
    files = data_files(path, encoding=encoding)
    with readable(path):
        found = [(file.resolve(), file.stat()) for file in files]
    return tuple((file, state.st_size, state.st_mtime_ns) for file, state in found)


def _data_file(path: Path) -> Path:
    """The path, if it is a file."""
    return regular_file(path, what="data file", fix=_fix())


def _fix(example: str = "") -> str:
    return f"Correct the path of the data{example}; in a recipe it is `path` under `shared.data`"


def count_rows(path: Path, *, encoding: str | None = None) -> int | None:
    """The number of rows of a source, without parsing those of jsonl; None where that cannot be told at once."""
    try:
        counts = [_count_rows(*state, encoding) for state in file_states(path, encoding=encoding)]
    except UserError:  # said when it is read
        return None
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


@cache
def _count_rows(path: Path, size: int, changed: int, encoding: str | None) -> int | None:
    ending = _ending(path)
    try:
        if ending == ".jsonl" and encoding is None and compression(path) is None:
            with path.open("rb") as handle:
                return sum(not line.isspace() for line in handle)
        if ending == ".jsonl":
            return sum(not line.isspace() for line in text_lines(path, encoding=encoding))
        if ending == ".parquet":
            return _count_parquet(path)
        if size > (COUNTED_BYTES if compression(path) is None else COUNTED_BYTES // 8):
            return None
        return sum(1 for _ in READERS[ending](path, encoding))
    except (UserError, OSError):  # said when the file is read
        return None


def _count_parquet(path: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except pa.ArrowException:
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
