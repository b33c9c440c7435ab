"""Which records may stand in one table: one shared block, one protocol and the same documents per column."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctpd.core.errors import UserError

Record = Mapping[str, Any]
"""One run and seed, as JSON (``ctpd/core/records.py``)."""

SCHEMA = 1

PROTOCOL = (
    "task", "version", "shots", "metric", "chat_template", "num_docs", "num_total", "backend", "dtype", "batch_size",
    "lm_eval_version", "task_hash",
)  # fmt: skip
"""What must be equal in all results of one column. ``max_length`` is the model's own and may differ."""


def check_comparable(records: Sequence[Record]) -> None:
    """Refuse records that may not be compared.

    Raises:
        UserError: another schema, one run and seed twice, shared settings that differ (the fields are named), or a
            column whose results come from other documents, prompts or settings of lm-eval.
    """
    seen: dict[tuple[str, int | None], None] = {}
    for record in records:
        if record.get("schema") != SCHEMA:
            raise UserError(f"the record has schema {record.get('schema')}, and this version reads {SCHEMA}",
                            where=title(record), fix="Run the recipe again with this version")  # fmt: skip
        key = (record["run"], record["seed"])
        if key in seen:
            raise UserError(f"there are two records of {title(record)}", fix="Give one record per run and seed")
        seen[key] = None
    for record in records[1:]:
        _check_shared(records[0], record)
    for name in {column: None for record in records for column in record["evaluation"]}:
        _check_column(name, [record for record in records if name in record["evaluation"]])


def title(record: Record) -> str:
    """How a record is named in messages."""
    seed = record.get("seed")
    return f"run '{record.get('run')}'" + ("" if seed is None else f", seed {seed}")


def _check_shared(first: Record, other: Record) -> None:
    if first["shared_hash"] == other["shared_hash"]:
        return
    left, right = dict(leaves(first["shared"])), dict(leaves(other["shared"]))
    names = [name for name in left | right if name != "seeds" and left.get(name) != right.get(name)]
    fields = ", ".join(f"`{name}` ({left.get(name, 'absent')} and {right.get(name, 'absent')})" for name in names)
    raise UserError(
        f"{title(first)} and {title(other)} were run under different shared settings: "
        + (fields or "their hashes differ, and no field that the records show"),
        fix="Compare runs of one `shared` block: run the older ones again with today's recipe",
    )


def _check_column(name: str, records: Sequence[Record]) -> None:
    first = records[0]
    expected = first["evaluation"][name]
    documents = [document for document, _ in expected["documents"]]
    for record in records[1:]:
        found = record["evaluation"][name]
        fields = [field for field in PROTOCOL if found.get(field) != expected.get(field)]
        if expected.get("chat_template") and found.get("chat_template"):
            fields = [field for field in fields if field != "task_hash"]  # it covers prompts, which templates change
        if not fields and [document for document, _ in found["documents"]] != documents:
            fields = ["documents"]
        if fields:
            shown = ", ".join(f"`{field}`" + _values(expected.get(field), found.get(field)) for field in fields)
            raise UserError(
                f"{title(first)} and {title(record)} were evaluated differently: {shown}",
                where=f"column '{name}'",
                fix="Evaluate both again under the same settings, with `ctpd eval`",
            )


def _values(left: object, right: object) -> str:
    if isinstance(left, list):
        return ""
    short = [str(value)[:12] for value in (left, right)]
    return f" ({short[0]} and {short[1]})"


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested mappings and lists, with its dotted path."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
