"""Readers of rows by file format: jsonl, json, csv and parquet. Nothing is guessed, and nothing is lost silently.

Texts are read in the encoding that is given, by default UTF-8, and unpacked where the file's name says that it is compressed.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctpd.core.errors import UserError, shortened
from ctpd.core.userfiles import LONGEST_LINE, readable, text_lines, text_pieces, too_long

Row = Mapping[str, Any]

_MARK = "\ufeff"  # byte order mark
_PARQUET_ROWS = 1024  # rows that are converted at once
_PARQUET_BUFFER = 2**20  # bytes of a column that are read at once


def read_jsonl(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """An object on each line; empty lines are passed over."""
    for number, line in enumerate(text_lines(path, encoding=encoding), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _record(_decode(line.lstrip(_MARK), where), where)  # inside a file that was joined from several


def read_json(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """A list of objects."""
    data = _decode("".join(text_pieces(path, encoding=encoding)), str(path))
    if not isinstance(data, list):
        raise UserError("the file is not a list of objects", where=str(path), fix="Give a JSON list, or jsonl")
    for number, item in enumerate(data):
        yield _record(item, f"{path}, item {number}")


def read_csv(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Rows by the names of the first line; every cell is a text."""
    csv.field_size_limit(LONGEST_LINE)  # Python's own limit is 131,072
    texts = _RowLines(path, text_lines(path, encoding=encoding))
    lines = csv.reader(texts, strict=True)
    try:
        names = next(lines, [])
        _check_header(names, where=f"{path}, line 1")
        start = lines.line_num + 1
        for cells in lines:
            texts.size = 0
            where, start = f"{path}, line {start}", lines.line_num + 1
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"the row has {len(cells)} cells, and the first line names {len(names)} columns",
                    where=where,
                    fix='A text with a comma or a line break is written between quotes, "like, this"',
                )
            yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"not valid CSV ({error})",
            where=f"{path}, line {lines.line_num}",
            fix='Check the quotes: a text that holds one is written between quotes, and its own are doubled, "like ""this"""',
        ) from error


class _RowLines(Iterator[str]):
    """The lines of a CSV file, of which a quoted text can take many; a row that does not end is refused."""

    def __init__(self, path: Path, lines: Iterator[str]) -> None:
        self.path, self.lines = path, lines
        self.size = 0  # characters since the last row

    def __next__(self) -> str:
        line = next(self.lines)
        self.size += len(line)
        if self.size > LONGEST_LINE:
            raise too_long(str(self.path), "a row")
        return line


def read_parquet(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, batch by batch; nested messages are lists of objects already.

    Raises:
        UserError: an encoding is given: texts of Parquet are UTF-8.
    """
    import pyarrow as pa

    first = 0
    try:
        with readable(path), _parquet_file(path) as file:
            _check_unique(file.schema_arrow.names, where=str(path))
            for batch in file.iter_batches(_PARQUET_ROWS):
                yield from _rows(batch, path, first)
                first += batch.num_rows
    except pa.ArrowException as error:
        raise UserError(f"this is no parquet file that can be read ({_first_line(error)})", where=str(path)) from error


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        # By default all row groups are read ahead, and stay in memory until the last batch.
        return pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    except UnicodeDecodeError as error:
        raise UserError("the name of a column is not UTF-8", where=str(path), fix="Write the file again") from error


def _rows(batch: Any, path: Path, first: int) -> list[Row]:
    import pyarrow as pa

    try:
        found: list[Row] = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:  # UnicodeDecodeError, or a date beyond Python's
        raise _unreadable_cell(batch, error, path, first) from error
    return found


READERS: Mapping[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
"""By the ending of the file's name; the arguments are the file and its encoding."""
TEXT_ENDINGS = tuple(ending for ending in READERS if ending != ".parquet")
"""The endings of texts: these may be compressed, and have an encoding."""


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise UserError("the values are nested too deeply", where=where) from error
    except _RepeatedKey as error:
        raise UserError(
            f"the key {shortened(repr(error.args[0]))} is given twice in one object",
            where=where,
            fix="Remove one of the two",
        ) from error
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})", where=where) from error


class _RepeatedKey(Exception):
    """The key that an object of JSON has twice; most readers of JSON keep the last and say nothing."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKey(key)
            seen.add(key)
    return found


def _record(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise UserError(
            "the row is not an object with columns", where=where, fix='Write {"prompt": ..., "chosen": ...}'
        )
    return item


def _check_header(names: Sequence[str], *, where: str) -> None:
    for mark, what in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and mark in names[0]:
            raise UserError(f"the columns are separated by {what}", where=where, fix="Save the file with commas")
    _check_unique(names, where=where)


def _check_unique(names: Sequence[str], *, where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"two columns have the name {shortened(repr(name))}", where=where, fix="Rename one of them")
        seen.add(name)


def _unreadable_cell(batch: Any, error: Exception, path: Path, first: int) -> UserError:
    """The error for a batch that does not convert, naming the first cell that does not."""
    for row in range(batch.num_rows):
        for name in batch.schema.names:
            try:
                batch.column(name)[row].as_py()
            except Exception as found:
                what = "is not UTF-8" if isinstance(found, UnicodeDecodeError) else f"cannot be read ({found})"
                return UserError(
                    f"the text {what}",
                    where=f"{path}, row {first + row}, column '{shortened(name)}'",
                    fix="Write the file again from valid text",
                )
    return UserError(f"rows cannot be read ({_first_line(error)})", where=str(path))


def _first_line(error: BaseException) -> str:
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], most=200)
