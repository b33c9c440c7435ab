"""Numbers from papers: shown below ours, apart and labelled, never merged with ours."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ctpd.core.config import Config, nearest, parse_yaml, validate
from ctpd.core.errors import UserError

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
