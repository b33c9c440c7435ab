"""Which records may be put into one table: the same shared settings, and per column one protocol and the same documents."""

from collections.abc import Iterator, Mapping, Sequence

from ctpd.core.errors import UserError
from harness.record import ColumnResult, Protocol, Record


def check_comparable(records: Sequence[Record]) -> None:
    """Refuse records that may not be compared.

    Raises:
        UserError: one run and seed twice, shared settings that differ (the fields are named), or a column whose results
            come from other documents, prompts or settings of lm-eval.
    """
    seen: set[tuple[str, int | None]] = set()
    for record in records:
        key = (record.run, record.seed)
        if key in seen:
            raise UserError(f"there are two records of {record.title}", fix="Give one record per run and seed")
        seen.add(key)
    for record in records[1:]:
        _check_shared(records[0], record)
    for name in {column: None for record in records for column in record.evaluation}:
        _check_column(name, [record for record in records if name in record.evaluation])


def _check_shared(first: Record, other: Record) -> None:
    if first.shared.digest == other.shared.digest:
        return
    left, right = dict(leaves(first.shared.settings)), dict(leaves(other.shared.settings))
    names = [name for name in left | right if left.get(name) != right.get(name)]
    fields = ", ".join(f"`{name}` ({left.get(name, 'absent')} and {right.get(name, 'absent')})" for name in names)
    raise UserError(
        f"{first.title} and {other.title} were run under different shared settings: "
        + (fields or "their digests differ, and no field that the records show"),
        fix="Compare runs of one `shared` block: run the older ones again with today's recipe",
    )


def _check_column(name: str, records: Sequence[Record]) -> None:
    first = records[0]
    expected = first.evaluation[name]
    for record in records[1:]:
        differing = differing_protocol(expected, record.evaluation[name])
        if differing:
            shown = ", ".join(f"`{field}`{values}" for field, values in differing.items())
            raise UserError(
                f"{first.title} and {record.title} were evaluated differently: {shown}",
                where=f"column '{name}'",
                fix="Evaluate both again under the same settings, with `ctpd eval`",
            )


def differing_protocol(expected: ColumnResult, found: ColumnResult) -> dict[str, str]:
    """The names of what differs in the protocols, with both values; if nothing does, whether the documents do."""
    left, right = dict(expected.protocol), dict(found.protocol)
    templates = expected.protocol.chat_template and found.protocol.chat_template
    fields = [
        field
        for field in Protocol.model_fields
        if left[field] != right[field] and not (templates and field == "task_hash")  # templates change prompts
    ]
    if templates and not fields:
        return _templates(expected, found) or _documents(expected, found)
    if fields:
        return {field: f" ({str(left[field])[:12]} and {str(right[field])[:12]})" for field in fields}
    return _documents(expected, found)


def _templates(expected: ColumnResult, found: ColumnResult) -> dict[str, str]:
    """Variables that differ, the date included, where both were rendered with one template; each model has its own."""
    first, other = expected.template, found.template
    if (first is None) != (other is None):
        return {"template": " (the date and the variables of one of them were not recorded)"}
    if first is None or other is None or first.digest != other.digest:
        return {}
    left, right = first.variables, other.variables
    found_names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    return {
        f"template_variables.{name}": f" ({left.get(name, 'absent')} and {right.get(name, 'absent')})"
        for name in found_names
    }


def _documents(expected: ColumnResult, found: ColumnResult) -> dict[str, str]:
    documents = [[document.doc_hash for document in result.documents] for result in (expected, found)]
    return {} if documents[0] == documents[1] else {"documents": ""}


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested mappings, with its dotted path; a list is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
