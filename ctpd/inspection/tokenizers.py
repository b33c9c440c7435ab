"""What `ctpd inspect spans` and `tokenizers` measure: span types, tokens per span and fidelity of two tokenizers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctpd.core.errors import UserError
from ctpd.pipeline.peeks import layout_of
from ctpd.pipeline.sources import read_rows
from ctpd.text.fidelity import Speller, compare_spans, coverage, readable
from ctpd.text.mismatch import SPAN_TYPES, AlignedTexts, align_texts, mismatch_counts, span_sizes, span_tokens
from ctpd.text.pairs import Pair, usable_rows
from ctpd.text.templates import FastTokenizer

_BLOCK = 512  # texts tokenized at once


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
        path: a file, folder or pattern, as a recipe's data.
        limit: read only so many pairs.

    Raises:
        UserError: no such file, or no row that is a pair; other rows are left out.
    """
    rows: Iterable[Mapping[str, Any]] = read_rows(path)
    if limit is not None:
        rows = (row for row, _ in zip(rows, range(limit), strict=False))
    read = usable_rows(rows, source=str(path), layout=layout_of(path))
    pairs = (row for row in read if isinstance(row, Pair))
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)]


def compare_tokenizers(texts: Sequence[str], *, teacher: FastTokenizer, student: FastTokenizer) -> Comparison:
    """Measure span types, tokens per span and fidelity on bare texts.

    Raises:
        UserError: no text has tokens on both sides.
    """
    spellers = Speller(teacher), Speller(student)
    counts: Counter[str] = Counter()
    both: Counter[str] = Counter()
    sizes, covered, spelled = ({"teacher": Counter[Any](), "student": Counter[Any]()} for _ in range(3))
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
    sides = (aligned.teacher, aligned.student)
    for side, span, speller in zip(sides, (spans.teacher_span, spans.student_span), spellers, strict=True):
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


def _blocks(texts: Sequence[str], *, teacher: FastTokenizer, student: FastTokenizer) -> Iterator[AlignedTexts]:
    for i in range(0, len(texts), _BLOCK):
        yield align_texts(texts[i : i + _BLOCK], teacher=teacher, student=student)
