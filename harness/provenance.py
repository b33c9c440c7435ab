"""Where the records of a comparison come from: code, versions, machines, data and settings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.cautions import pairs_text
from harness.comparability import leaves
from harness.record import DataSummary, Record, TrainingSummary


class Provenance(NamedTuple):
    """Facts that all records share or that differ between them, the settings, and a line a record."""

    facts: list[tuple[str, list[str]]]
    settings: list[tuple[str, str]]
    header: tuple[str, ...]
    records: list[tuple[str, ...]]


def provenance_of(records: Sequence[Record]) -> Provenance:
    """What the records say of their making. Where they differ, every value is listed."""
    settings = [(path, str(value)) for path, value in leaves(records[0].shared.settings) if value is not None]
    header = ("", "Seed", "Method", "Parameters", "Tuned", "Commit", "Time (UTC)")
    return Provenance(list(_facts(records)), settings, header, [_line(record) for record in records])


def _facts(records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    made = [record.provenance for record in records]
    yield "Recipe", _distinct(record.recipe for record in records)
    yield "Suite", _distinct(record.suite for record in records)
    yield "Shared settings", _distinct(record.shared.digest for record in records)
    yield "Pairs", _distinct(_pairs(record.data) for record in records)
    yield "Pairs left out of each epoch (their step is not full)", _distinct(_left_out(r.training) for r in records)
    yield "Commands", _distinct(one.command for one in made)
    yield "Commits", _distinct(one.commit for one in made)
    yield "Machines", _distinct(one.platform for one in made)
    yield "Devices", _distinct(one.runtime.device for one in made)
    packages = {name: None for one in made for name in one.versions}
    versions = {name: _distinct(one.versions.get(name) for one in made) for name in packages}
    versions = {"Python": _distinct(one.python for one in made), **versions}
    yield "Versions", [", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items() if found)]


def _pairs(data: DataSummary) -> str:
    return pairs_text(data.pairs, data.dropped, data.counts)


def _left_out(training: TrainingSummary | None) -> str | None:
    if training is None or not training.left_out or training.items is None:
        return None
    return f"{training.left_out:,} of {training.items:,}"


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _line(record: Record) -> tuple[str, ...]:
    method = record.method
    return (
        record.run,
        "–" if record.seed is None else str(record.seed),
        "–" if method is None else method.name,
        "–" if method is None else _named(method.params),
        "–" if method is None else _named(method.tuned),
        record.provenance.commit or "–",
        record.provenance.time,
    )


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or "–"
