"""Where the records of a comparison come from: code, versions, machines, data and settings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from harness.comparability import Record, leaves


class Provenance(NamedTuple):
    """Facts that all records share or that differ between them, the settings, and a line a record."""

    facts: list[tuple[str, list[str]]]
    settings: list[tuple[str, str]]
    header: tuple[str, ...]
    records: list[tuple[str, ...]]


def provenance_of(records: Sequence[Record]) -> Provenance:
    """What the records say of their making. Where they differ, every value is listed."""
    settings = [
        (path, str(value)) for path, value in leaves(records[0]["shared"]) if value is not None and path != "seeds"
    ]
    header = ("", "Seed", "Method", "Parameters", "Tuned", "Commit", "Time (UTC)")
    return Provenance(list(_facts(records)), settings, header, [_line(record) for record in records])


def _facts(records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    made = [record["provenance"] for record in records]
    yield "Recipe", _distinct(record["recipe"] for record in records)
    yield "Suite", _distinct(record["suite"] for record in records)
    yield "Shared settings", _distinct(record["shared_hash"] for record in records)
    yield "Pairs", _distinct(_pairs(record["data"]) for record in records)
    yield "Commands", _distinct(one.get("command") for one in made)
    yield "Commits", _distinct(one.get("commit") for one in made)
    yield "Machines", _distinct(one.get("platform") for one in made)
    yield "Devices", _distinct(one.get("runtime", {}).get("device") for one in made)
    packages = {name: None for one in made for name in one.get("versions", {})}
    versions = {name: _distinct(one.get("versions", {}).get(name) for one in made) for name in packages}
    versions = {"Python": _distinct(one.get("python") for one in made), **versions}
    yield "Versions", [", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items() if found)]


def _pairs(data: Mapping[str, Any]) -> str | None:
    if "pairs" not in data:
        return None
    parts = [f"{count} {reason.replace('_', ' ')}" for reason, count in data["dropped"].items() if count]
    return f"{data['pairs']:,}, dropped: {', '.join(parts) or 'none'}"


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _line(record: Record) -> tuple[str, ...]:
    made = record["provenance"]
    return (
        record["run"],
        "–" if record["seed"] is None else str(record["seed"]),
        record["method"] or "–",
        _named(record["params"]),
        _named(record["tuned"]),
        made.get("commit") or "–",
        made.get("time") or "–",
    )


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or "–"
