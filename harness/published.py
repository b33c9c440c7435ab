"""Numbers that others reported: a paper's tables below ours, and a user's own CSV file as marked rows of the main table."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ctpd.core.config import Config, nearest, parse_yaml, validate
from ctpd.core.errors import UserError
from ctpd.core.names import unfit_name
from ctpd.core.userfiles import read_text

PUBLISHED = Path(__file__).parent / "published"


class _Entry(Config):
    """What ``published/index.yaml`` says about one CSV file."""

    caption: str
    notes: tuple[str, ...] = ()


class _Index(Config):
    tables: Mapping[str, _Entry]


@dataclass(frozen=True, slots=True)
class Published:
    """A published table as it was reported, cell by cell, with its footnotes."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def load_published(name: str) -> Published:
    """Read a published table by the name of its CSV file.

    Raises:
        UserError: there is no such table.
    """
    index_file = PUBLISHED / "index.yaml"
    index = validate(
        _Index, parse_yaml(index_file.read_text(encoding="utf-8"), source=str(index_file)), source=str(index_file)
    )
    if name not in index.tables:
        raise UserError(
            f"there is no published table '{name}'.{nearest(name, index.tables)}",
            fix=f"Use one of: {', '.join(index.tables)}",
        )
    with (PUBLISHED / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = [tuple(row) for row in csv.reader(file)]
    entry = index.tables[name]
    return Published(caption=entry.caption, header=header, rows=tuple(rows), notes=entry.notes)


ROW = "row"
"""The head of a CSV file's first column, which names the rows."""
MOST_BYTES = 1 << 20


class Reported(NamedTuple):
    """A row that others reported: a score in percent for each column of a table and for its Average, None where there is none."""

    label: str
    scores: tuple[float | None, ...]


def read_reported(path: Path, columns: Sequence[str]) -> tuple[Reported, ...]:
    """Read rows from a CSV file: `row` and any of the table's columns, `Average` among them; scores are percentages.

    An empty cell is a score that was not reported. No Average is computed from the other columns.

    Args:
        path: of the file.
        columns: of the table, the Average's name last.

    Raises:
        UserError: the file cannot be read; an unknown column; what is no score, with its line and column.
    """
    lines = csv.reader(io.StringIO(read_text(path, most_bytes=MOST_BYTES), newline=""))
    try:
        numbered = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(map(str.strip, line))]
    except csv.Error as error:
        raise UserError(f"the line is no CSV ({error})", where=f"{path}, line {lines.line_num}") from error
    if len(numbered) < 2:
        raise UserError("the file has no rows", where=str(path), fix=_example(columns))
    (first, header), *rows = numbered
    _check_header(header, columns, where=f"{path}, line {first}")
    found: dict[str, Reported] = {}
    for number, cells in rows:
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise UserError(f"the line has {len(cells)} cells, and the header has {len(header)}", where=where)
        label = cells[0]
        if (wrong := unfit_name(label)) is not None:
            raise UserError(f"the name of the row {wrong}", where=f"{where}, column 1")
        if label in found:
            raise UserError(f"the row '{label}' is given twice", where=where)
        scores = {
            name: _score(cell, where=f"{where}, column {at} ('{name}')")
            for at, (name, cell) in enumerate(zip(header[1:], cells[1:], strict=True), start=2)
        }
        found[label] = Reported(label, tuple(scores.get(name) for name in columns))
    return tuple(found.values())


def _check_header(header: Sequence[str], columns: Sequence[str], *, where: str) -> None:
    if header[0] != ROW:
        raise UserError(f"the first column is '{header[0]}', not `{ROW}`", where=where, fix=_example(columns))
    for at, name in enumerate(header[1:], start=2):
        if name not in columns:
            raise UserError(
                f"the table has no column '{name}'.{nearest(name, columns)}",
                where=f"{where}, column {at}",
                fix=f"Its columns are {', '.join(columns)}",
            )
        if header.index(name) != at - 1:
            raise UserError(f"the column '{name}' is given twice", where=f"{where}, column {at}")


def _score(cell: str, *, where: str) -> float | None:
    if not cell:
        return None
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 100:
        raise UserError(f"'{cell}' is no score between 0 and 100", where=where, fix="Give a percentage such as 48.31")
    return score


def _example(columns: Sequence[str]) -> str:
    return f"Begin with the line `{','.join([ROW, *columns])}`; a row is a name and scores in percent"
