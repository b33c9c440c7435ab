"""What a reader should know before he trusts a comparison: cut data, short trainings, weights that weigh nothing."""

from collections.abc import Iterator, Mapping, Sequence

from harness.record import DataSummary, Record

Counts = Mapping[str, int | float]


def cautions(records: Sequence[Record]) -> Iterator[str]:
    """Sentences about the records of a table, each once."""
    yield from dict.fromkeys(text for record in records if (text := _data(record.data)) is not None)
    yield from _grouped([(one.run, None if one.training is None else one.training.note) for one in records])
    yield from _grouped([(one.run, None if one.weights is None else one.weights.note) for one in records])


def pairs_text(pairs: int, dropped: Mapping[str, int], counts: Counts) -> str:
    """How many pairs there are, and how many were dropped and cut: `1,500, dropped: none, cut: 3 of 3,000 responses`."""
    lost = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
    return f"{pairs:,}, dropped: {lost or 'none'}, cut: {cut_text(pairs, counts) or 'none'}"


def cut_text(pairs: int, counts: Counts) -> str | None:
    """How many responses and prompts were cut, in all and by split; None if none was."""
    whole = _cut(counts.get("responses_cut", 0), counts.get("cut_prompts", 0), pairs=pairs)
    splits = [name.removesuffix("_responses_cut") for name in counts if name.endswith("_responses_cut")]
    parts = {
        split: _cut(
            counts[f"{split}_responses_cut"], counts[f"{split}_cut_prompts"], pairs=int(counts[f"{split}_pairs"])
        )
        for split in splits
    }
    if not whole:
        return None
    by_split = "; ".join(f"{split}: {part or 'none'}" for split, part in parts.items())
    return f"{whole} ({by_split})" if len(parts) > 1 else whole


def _cut(responses: float, prompts: float, *, pairs: int) -> str:
    found = {"responses": (responses, 2 * pairs), "prompts": (prompts, pairs)}
    return " and ".join(f"{number:,} of {total:,} {name}" for name, (number, total) in found.items() if number)


def _data(data: DataSummary) -> str | None:
    cut = cut_text(data.pairs, data.counts)
    lost = sum(data.dropped.values())
    if cut is None and not lost:
        return None
    return f"Pairs: {pairs_text(data.pairs, data.dropped, data.counts)}."


def _grouped(found: Sequence[tuple[str, str | None]]) -> Iterator[str]:
    """One sentence for all runs of which the same is to be said."""
    runs: dict[str, dict[str, None]] = {}
    for run, text in found:
        if text is not None:
            runs.setdefault(text, {})[run] = None
    for text, names in runs.items():
        yield f"{', '.join(names)}: {text}."
