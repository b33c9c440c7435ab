"""What `ctpd inspect` measures: two tokenizers on texts, and stored importance weights by position and span type."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ctpd.core.errors import UserError
from ctpd.core.store import MANIFEST, Store
from ctpd.objectives.base import Weighting
from ctpd.pipeline.rows import end_units, units_of
from ctpd.pipeline.sources import read_rows
from ctpd.pipeline.stages.pairs import read_prepared
from ctpd.pipeline.stages.weights import SUMMARY, WEIGHTS, WeightsConfig
from ctpd.text.fidelity import Speller, compare_spans, coverage, readable
from ctpd.text.mismatch import (
    SPAN_TYPES,
    AlignedTexts,
    align_texts,
    mismatch_counts,
    span_sizes,
    span_tokens,
    span_types,
)
from ctpd.text.pairs import parse_pairs
from ctpd.text.prepare import PreparedPairs
from ctpd.text.templates import FastTokenizer

_BLOCK = 512  # texts tokenized at once
NUM_POSITIONS = 10
NUM_BINS = 24
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SIDES = ("chosen", "rejected")
# Strategies whose weights are not the exponential of a clamped value unit by unit.
_NOT_CLAMPED = ("average", "random", "uniform")


@dataclass(frozen=True)
class Comparison:
    """Two tokenizers on the same texts. Everything counts spans, but for `counts` and `coverage`."""

    counts: dict[str, int]  # of `mismatch_counts`, without the types
    types: dict[str, int]  # by span type, teacher first
    tokens_per_span: dict[str, dict[int, int]]  # side -> number of tokens -> spans
    coverage: dict[str, dict[str, int]]  # side -> what covers a character -> characters
    both: dict[str, int]  # spans, equal_exactly, equal: the sides compared with each other
    spelling: dict[str, dict[str, int]]  # side -> class of difference to the text -> spans
    examples: dict[str, list[dict[str, str]]]  # "side: class" -> the first exceptions

    def plain(self) -> dict[str, Any]:
        """As JSON, with shares of the span types in percent."""
        total = max(self.counts["spans"], 1)
        return {**asdict(self), "percent": {name: round(100 * n / total, 4) for name, n in self.types.items()}}


def read_responses(path: Path, *, limit: int | None = None) -> list[str]:
    """The responses of a file of pairs, chosen and rejected in turn.

    Args:
        path: jsonl, json, parquet or csv, as a recipe's data.
        limit: read only so many pairs.

    Raises:
        UserError: no such file, or a row that is no pair.
    """
    if not path.is_file():
        raise UserError(
            f"the data file '{path}' does not exist", fix="Give a jsonl, json, parquet or csv file of pairs"
        )
    rows: Iterable[Mapping[str, Any]] = read_rows(path)
    if limit is not None:
        rows = (row for row, _ in zip(rows, range(limit), strict=False))
    return [text for pair in parse_pairs(rows, source=str(path)) for text in (pair.chosen, pair.rejected)]


def compare_tokenizers(texts: Sequence[str], *, teacher: FastTokenizer, student: FastTokenizer) -> Comparison:
    """Measure span types, tokens per span and fidelity on bare texts.

    Raises:
        UserError: no text has tokens on both sides.
    """
    spellers = Speller(teacher), Speller(student)
    counts: Counter[str] = Counter()
    both: Counter[str] = Counter()
    sizes, covered, spelled = (
        {"teacher": Counter[Any](), "student": Counter[Any]()} for _ in range(3)
    )  # fmt: skip
    examples: dict[str, list[dict[str, str]]] = {}
    for aligned in _blocks(texts, teacher=teacher, student=student):
        counts.update(mismatch_counts(aligned))
        found = compare_spans(aligned, teacher=spellers[0], student=spellers[1])
        both.update(found.both)
        parts = (("teacher", aligned.teacher, found.teacher), ("student", aligned.student, found.student))
        for (name, side, classes), size in zip(parts, span_sizes(aligned), strict=True):
            sizes[name].update(size)
            covered[name].update(coverage(aligned, side))
            spelled[name].update(classes)
        for kind, cases in found.examples.items():
            examples.setdefault(kind, cases)
    if not counts["spans"]:
        raise UserError("no text has tokens on both sides", fix="Give texts that are not empty")
    types = {name: counts.pop(name) for name in SPAN_TYPES}
    return Comparison(
        counts=dict(counts),
        types=types,
        tokens_per_span={name: {n: size[n] for n in sorted(size)} for name, size in sizes.items()},
        coverage={name: dict(part) for name, part in covered.items()},
        both=dict(both),
        spelling={name: dict(part) for name, part in spelled.items()},
        examples=examples,
    )


def drawn_spans(
    texts: Sequence[str], *, teacher: FastTokenizer, student: FastTokenizer, limit: int
) -> list[list[dict[str, Any]]]:
    """The spans of the first texts: each with its type, its text, and what every token of both sides spells."""
    spellers = Speller(teacher), Speller(student)
    aligned = align_texts([text for text in texts if text][:limit], teacher=teacher, student=student)
    spans = aligned.spans
    pieces = []
    for side, span, speller in (
        (aligned.teacher, spans.teacher_span, spellers[0]), (aligned.student, spans.student_span, spellers[1])
    ):  # fmt: skip
        spelled = [readable(speller(id)) for id in side.ids.tolist()]
        pieces.append([spelled[a:b] for a, b in span_tokens(side, span, spans.span_starts)])
    types = aligned.span_types.tolist()
    drawn = []
    for text, first, stop in zip(aligned.texts, spans.span_starts[:-1], spans.span_starts[1:], strict=True):
        ends = spans.boundaries[first:stop].tolist()
        drawn.append(
            [
                {"type": SPAN_TYPES[types[s]], "text": text[a:b], "teacher": pieces[0][s], "student": pieces[1][s]}
                for s, a, b in zip(range(first, stop), [0, *ends[:-1]], ends, strict=True)
            ]
        )
    return drawn


def vocabulary_facts(*, teacher: FastTokenizer, student: FastTokenizer) -> dict[str, dict[str, Any]]:
    """Kind of model, normalizer and number of tokens of both tokenizers, and the number of spellings they share."""
    facts = {}
    spelled: list[set[bytes]] = []
    for name, tokenizer in (("teacher", teacher), ("student", student)):
        backend, speller = tokenizer.backend_tokenizer, Speller(tokenizer)
        spelled.append({speller(id) for id in backend.get_vocab().values()})
        normalizer = type(backend.normalizer).__name__ if backend.normalizer is not None else None
        facts[name] = {
            "model": type(backend.model).__name__,
            "normalizer": normalizer,
            "tokens": backend.get_vocab_size(),
        }
    shared = len(spelled[0] & spelled[1])
    for name, own in zip(("teacher", "student"), spelled, strict=True):
        facts[name]["shared"] = shared / len(own)
    return facts


def _blocks(texts: Sequence[str], *, teacher: FastTokenizer, student: FastTokenizer) -> Iterable[AlignedTexts]:
    for i in range(0, len(texts), _BLOCK):
        yield align_texts(texts[i : i + _BLOCK], teacher=teacher, student=student)


def inspect_weights(store: Store, key: str) -> dict[str, Any]:
    """The distribution of a stored weights artifact: overall, by side, by position and by span type.

    End spans, whose weight is 1, are left out. Clamped are the units whose weight is the one of a clamp; None for
    strategies whose weights are no clamped exponentials.

    Args:
        store: holds the artifact and the pairs that it was made from.
        key: the artifact's whole key.

    Raises:
        UserError: the artifact is damaged, or the pairs are not in the store any more.
    """
    folder = store.open("weights", key)
    identity = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["identity"]
    config = WeightsConfig.model_validate_json(json.dumps(identity["config"]))
    pairs_key = identity["pairs"].partition("/")[2]
    if not store.has("pairs", pairs_key):
        raise UserError(
            "the pairs that the weights were made from are not in the store",
            where=str(folder),
            fix="Run the recipe again, which makes them anew",
        )
    prepared = read_prepared(store.open("pairs", pairs_key))
    values = np.asarray(load_file(folder / WEIGHTS)["weights"], dtype=np.float64)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    _, unit_starts = units_of(prepared, "student", config.granularity)
    inner = ~end_units(prepared, unit_starts)
    row = np.repeat(np.arange(unit_starts.size - 1), np.diff(unit_starts))
    index = np.arange(values.size) - unit_starts[row]
    num_inner = np.bincount(row[inner], minlength=unit_starts.size - 1)
    # By the middle of a unit, so that responses of a few units favour neither the first nor the last tenth.
    position = np.minimum(NUM_POSITIONS * (2 * index + 1) // np.maximum(2 * num_inner[row], 1), NUM_POSITIONS - 1)
    low, high = _at_clamp(values, row % 2, config.weighting)
    table = _Table(values, row % 2, low, high)
    found: dict[str, Any] = {
        "key": key,
        "settings": {
            "strategy": config.weighting.strategy,
            **config.weighting.parameters.model_dump(),
            "granularity": config.granularity,
            "aggregate": config.aggregate,
        },
        "units": int(inner.sum()),
        "clamped_low": summary["clamped_low"],
        "clamped_high": summary["clamped_high"],
        "auroc": summary.get("auroc"),
        "sides": {side: table.distribution(inner & (row % 2 == i)) for i, side in enumerate(_SIDES)},
        "positions": [table.line(inner & (position == p)) for p in range(NUM_POSITIONS)],
    }
    if config.granularity == "spans":
        types = _types_of(prepared)
        found["types"] = {name: table.line(inner & (types == i)) for i, name in enumerate(SPAN_TYPES)}
    return found


@dataclass(frozen=True)
class _Table:
    """Weights ``[U]`` with their side and whether they are at a clamp."""

    values: NDArray[np.float64]
    side: NDArray[np.int64]
    low: NDArray[np.bool_] | None
    high: NDArray[np.bool_] | None

    def line(self, chosen: NDArray[np.bool_]) -> dict[str, Any]:
        """Number, mean weight of each side, and clamped shares of some units."""
        return {
            "units": int(chosen.sum()),
            **{side: _mean(self.values[chosen & (self.side == i)]) for i, side in enumerate(_SIDES)},
            "clamped_low": None if self.low is None else _mean(self.low[chosen]),
            "clamped_high": None if self.high is None else _mean(self.high[chosen]),
        }

    def distribution(self, chosen: NDArray[np.bool_]) -> dict[str, Any]:
        """Mean, spread, quantiles and histogram of some units' weights."""
        values = self.values[chosen]
        if not values.size:
            return {"units": 0}
        counts, edges = np.histogram(values, bins=NUM_BINS)
        return {
            "units": int(values.size),
            "mean": float(values.mean()),
            "std": float(values.std()),
            "quantiles": {f"{q:g}": float(v) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)},
            "histogram": {"counts": counts.tolist(), "edges": [round(float(edge), 6) for edge in edges]},
            "clamped_low": None if self.low is None else _mean(self.low[chosen]),
            "clamped_high": None if self.high is None else _mean(self.high[chosen]),
        }


def _at_clamp(
    values: NDArray[np.float64], side: NDArray[np.int64], weighting: Weighting
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """``[U]`` whether each weight is the one of the lower and of the upper clamp (METHOD 4)."""
    p = weighting.parameters
    if weighting.strategy in _NOT_CLAMPED or p.mu == 0 or p.lower == p.upper:
        return None, None
    low, high = (
        np.isclose(values, p.k * np.exp(p.mu * (1 - 2 * side) * bound), rtol=1e-6, atol=0)
        for bound in (p.lower, p.upper)
    )
    return low, high


def _types_of(prepared: PreparedPairs) -> NDArray[np.int64]:
    """``[sum S]`` index in `SPAN_TYPES` of each span of the prepared pairs, end spans included."""
    starts = np.concatenate([[0], np.cumsum(prepared.num_spans)])
    teacher, student = (
        np.bincount(
            (rows.unit + np.repeat(starts[:-1], np.diff(rows.row_starts)))[rows.unit >= 0], minlength=int(starts[-1])
        )
        for rows in (prepared.teacher, prepared.student)
    )
    return span_types(teacher, student)


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if values.size else None
