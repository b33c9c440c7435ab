"""What a table must say below itself: documents, seeds, what is missing or partial, how intervals were made."""

import json
from collections.abc import Iterator, Mapping, Sequence

from harness.cautions import cautions
from harness.differences import BELOW_START, CLEARLY_BELOW_START, LEVEL
from harness.record import ColumnResult, Record
from harness.search_notes import tuning_notes
from harness.sheet import Row, TableSpec
from harness.statistics import CONFIDENCE, DRAWS, FEW_SEEDS, LEAST_P

PARTIAL_MARK = "†"
UNHEALTHY_MARK = "§"


def footnotes(
    spec: TableSpec, rows: Sequence[Row], records: Sequence[Record], results: Mapping[str, ColumnResult]
) -> Iterator[str]:
    """Footnotes of one table, one sentence or two each.

    Args:
        spec: the table.
        rows: its finished rows.
        records: those that the rows show.
        results: one evaluation of each column that some row has; equal in all comparable records.
    """
    yield from _partial(results)
    yield from _unhealthy(rows)
    yield from _missing(rows)
    yield from _unmeasured(records)
    yield from _seeds(rows)
    yield "Scores in percent."
    yield from _unranked(spec, rows)
    yield from _compared(spec, rows)
    yield from _differences(rows)
    yield from _tests(rows)
    yield from _ranks(rows)
    yield from _start(rows)
    yield from _protocol(results)
    yield from _truncated(records)
    yield from _alone(results)
    yield from _prompting(records)
    yield from _not_finite(records)
    yield from tuning_notes({row.run: row.label for row in rows}, records)
    yield from cautions(records)
    if spec.note is not None:
        yield spec.note


def _partial(results: Mapping[str, ColumnResult]) -> Iterator[str]:
    parts = [
        f"{name} {one.protocol.num_docs:,} of {one.protocol.num_total:,}"
        for name, one in results.items()
        if one.protocol.num_docs < one.protocol.num_total
    ]
    if parts:
        yield f"{PARTIAL_MARK} Partial: evaluated on a part of the documents ({', '.join(parts)})."


def _unhealthy(rows: Sequence[Row]) -> Iterator[str]:
    parts = [f"{row.label}: {', '.join(row.faults)}" for row in rows if row.faults]
    if parts:
        yield f"{UNHEALTHY_MARK} Unhealthy, whatever the score: {'; '.join(parts)}."


def _unmeasured(records: Sequence[Record]) -> Iterator[str]:
    """A sentence for each column and reason, with the rows."""
    runs: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        for column, reason in record.unmeasured.items():
            runs.setdefault((column, reason), {})[record.run] = None
    for (column, reason), names in runs.items():
        yield f"Not measured: {column} on {', '.join(names)}, since {reason}. The Average of every row is without {column}."


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    parts = [f"{row.label} (all)" for row in rows if row.missing]
    parts += [f"{row.label} (seed {', '.join(map(str, row.missing_seeds))})" for row in rows if row.missing_seeds]
    parts += [f"{row.label} (some columns)" for row in rows if not row.missing and _incomplete(row)]
    if parts:
        yield f"Missing: {'; '.join(parts)}. `ctpd compare` names the commands that build them."


def _incomplete(row: Row) -> bool:
    return any(cell is None or (cell.num_seeds < len(row.seeds) and not cell.unmeasured) for cell in row.cells)


def _seeds(rows: Sequence[Row]) -> Iterator[str]:
    seeds = sorted({seed for row in rows for seed in row.seeds if seed is not None})
    listed = ", ".join(map(str, seeds))
    if any(cell is not None and cell.spread is not None for row in rows for cell in row.cells):
        yield f"Mean ± standard deviation over the training seeds ({listed})."
    elif seeds:
        yield f"One training seed ({listed}): no spread over seeds can be given."


def _unranked(spec: TableSpec, rows: Sequence[Row]) -> Iterator[str]:
    unranked = [row.label for row in rows if row.run in spec.unranked]
    if unranked:
        yield f"Not ranked: {', '.join(unranked)}."


def _compared(spec: TableSpec, rows: Sequence[Row]) -> Iterator[str]:
    """What is of this table alone; how it is computed is the same for all tables, and a report says it once."""
    base = next((row.label for row in rows if row.run == spec.base), None)
    tested = sum(row.p_value is not None for row in rows)
    many = f", with Holm's correction for the {tested} comparisons of this table" if tested > 1 else ""
    if any(row.difference is not None for row in rows):
        yield f"Differences are to {base}{many}."


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    compared = [row for row in rows if row.difference is not None]
    single = [row.label for row in compared if row.has_one_training]
    few = [row.label for row in compared if 1 < len(row.paired_seeds) < FEW_SEEDS]
    matched = " Where a seed is missing, over the seeds that both have." if any(r.missing_seeds for r in rows) else ""
    if len(compared) > len(single):
        yield (
            f"Difference of the Average: paired by document and seed, with a {CONFIDENCE:.0%} interval over "
            f"training seeds and documents, from {DRAWS:,} samples of a crossed bootstrap.{matched}"
        )
    elif compared:
        yield (
            f"Difference of the Average: paired by document, with a {CONFIDENCE:.0%} interval over documents, "
            f"from {DRAWS:,} bootstrap samples of the documents within each column.{matched}"
        )
    if single:
        yield (
            f"One seed ({', '.join(single)}): the chance of another training is not in this interval, which is over "
            "documents alone, for the model as trained, and there is no p-value."
        )
    if few:
        yield (
            f"Fewer than {FEW_SEEDS} seeds ({', '.join(few)}): how far trainings differ is hardly known, which makes "
            "the interval wide."
        )


def _tests(rows: Sequence[Row]) -> Iterator[str]:
    if any(row.p_value is not None for row in rows):
        yield (
            "p: two-sided, of no difference of the Average, from the same bootstrap samples (at least "
            f"{LEAST_P:.4f}; ≤ marks what that bound decides)."
        )
    tests = sum(len(seeds) for row in rows for seeds in (row.mcnemar or {}).values())
    if tests:
        yield (
            "Columns with 0/1 scores only: exact McNemar tests per seed, with Holm's correction for all of a table, "
            "are in the CSV file and in the report."
        )


def _ranks(rows: Sequence[Row]) -> Iterator[str]:
    if any(row.ranks for row in rows):
        yield (
            f"Rank: of the trained rows by the Average, with a {CONFIDENCE:.0%} interval from the differences of all pairs "
            "over seeds and documents, with Holm's correction for the pairs of each row. Ranks by column are in the CSV "
            "file and in the report."
        )


def _start(rows: Sequence[Row]) -> Iterator[str]:
    below = [row.start for row in rows if row.start is not None and row.start.is_below]
    if not below:
        return
    clear = any(start.is_clear for start in below)
    yield (
        f"{BELOW_START}: the Average is below that of {below[0].run}, the untrained student that the row started from"
        + (
            f"; {CLEARLY_BELOW_START}: significantly below it, over seeds and documents (p < {LEVEL:.2f} with Holm's "
            "correction)."
            if clear
            else "."
        )
    )


def _protocol(results: Mapping[str, ColumnResult]) -> Iterator[str]:
    parts = [
        f"{name}: {one.task} v{one.version}, {one.num_docs:,} documents, {one.shots}-shot, {one.metric}"
        for name, one in ((name, result.protocol) for name, result in results.items())
    ]
    if not parts:
        return
    first = next(iter(results.values())).protocol
    template = "with" if first.chat_template else "without"
    yield (
        f"{'; '.join(parts)}. Average: unweighted mean of the columns. lm-evaluation-harness "
        f"{first.lm_eval_version}, backend {first.backend}, {first.dtype}, {template} chat template."
    )


def _prompting(records: Sequence[Record]) -> Iterator[str]:
    """The variables of chat templates but the date's default, and what was not scored, by what runs have in common."""
    runs: dict[str, dict[str, None]] = {}
    for record in records:
        for result in record.evaluation.values():
            if (text := _of_model(result)) is not None:
                runs.setdefault(text, {})[record.run] = None
    for text, names in runs.items():
        yield f"{', '.join(names)}: {text}."


def _of_model(result: ColumnResult) -> str | None:
    given = {} if result.template is None else result.template.variables
    parts = [f"{name} = {json.dumps(value)}" for name, value in sorted(given.items()) if name != "date_string"]
    text = f"template variables {', '.join(parts)}" if parts else ""
    if result.think_end_token is not None:
        text += f"{'; ' if text else ''}generated text up to {result.think_end_token} is not scored"
        if result.unfinished:
            text += f" ({result.unfinished:,} texts of {result.protocol.task} without it are scored whole)"
    return text or None


def _truncated(records: Sequence[Record]) -> Iterator[str]:
    cut = sum((result.truncated or 0) > 0 for record in records for result in record.evaluation.values())
    if cut:
        yield f"In {cut} evaluations some prompts exceeded the model's length and were cut from the left."


def _alone(results: Mapping[str, ColumnResult]) -> Iterator[str]:
    counts = [f"{name} {one.alone:,}" for name, one in results.items() if one.alone]
    if counts:
        yield (
            f"Continuations in one token with the end of their context, which lm-eval has no score for and which were "
            f"tokenized by themselves: {', '.join(counts)}."
        )


def _not_finite(records: Sequence[Record]) -> Iterator[str]:
    lost = [
        f"{record.run}{'' if record.seed is None else f' (seed {record.seed})'} on {name}"
        for record in records
        for name, result in record.evaluation.items()
        if not result.is_finite
    ]
    if lost:
        yield (
            f"Not finite: {', '.join(lost)}. Such a row is neither ranked nor compared; the training of such a model has "
            "diverged."
        )
