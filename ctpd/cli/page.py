"""The page that `ctpd inspect spans --html` writes: one file that loads nothing, in the style of the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ctpd.cli.draw import fidelity_lines, shown, sizes

if TYPE_CHECKING:
    from ctpd.inspection.tokenizers import Comparison

MOST_SPANS = 1500  # of one text; a page of more is slow to read and to show
_STYLES = {"1:1": "one", "1:n": "split", "n:1": "merged", "n:m": "many"}
_MEANINGS = {
    "1:1": "one token each",
    "1:n": "one teacher token, several student tokens",
    "n:1": "several teacher tokens, one student token",
    "n:m": "several each",
}
_ROLES = ("teacher", "student")


class SpanType(NamedTuple):
    """One line of the span types: ``share`` of all spans, and the CSS class of its colour."""

    name: str
    style: str
    meaning: str
    num_spans: int
    share: str
    percent: str


class DrawnSpan(NamedTuple):
    """A span as both sides' tokens, readable; ``ends_line`` where its text holds a line break."""

    name: str
    style: str
    teacher: list[str]
    student: list[str]
    ends_line: bool


class DrawnText(NamedTuple):
    """The spans of a text, and how many more it has."""

    spans: list[DrawnSpan]
    left: int


def spans_page(found: "Comparison", drawn: Sequence[Sequence[Mapping[str, Any]]], *, teacher: str, student: str) -> str:
    """The whole page.

    Args:
        found: what was measured on all texts.
        drawn: the spans of the texts to show (`ctpd.inspection.tokenizers.drawn_spans`).
        teacher: names the teacher's tokenizer.
        student: names the student's.
    """
    from harness.html import render

    return render(
        "spans.html",
        title=f"Aligned spans: {teacher} → {student}",
        teacher=teacher,
        student=student,
        about=_about(found),
        types=list(_types(found)),
        tokens_per_span=list(_tokens(found)),
        fidelity=fidelity_lines(found),
        exceptions=[
            (kind.replace("_", " "), [shown(case[part]) for part in ("text", *_ROLES)])
            for kind, cases in found.examples.items()
            for case in cases
        ],
        texts=[_text(text) for text in drawn],
    )


def _about(found: "Comparison") -> str:
    counts = found.counts
    skipped = f", {counts['skipped']:,} without tokens skipped" if counts["skipped"] else ""
    return (
        f"{counts['texts']:,} texts{skipped}, {counts['characters']:,} characters, {counts['spans']:,} aligned spans."
    )


def _types(found: "Comparison") -> Iterator[SpanType]:
    total = found.counts["spans"]
    for name, count in found.types.items():
        percent = f"{100 * count / total:.2f}\N{NO-BREAK SPACE}%"
        yield SpanType(name, _STYLES[name], _MEANINGS[name], count, f"{count / total:.5f}", percent)


def _tokens(found: "Comparison") -> Iterator[tuple[str, list[str]]]:
    """Label, and the teacher's and the student's number."""
    counts = found.counts
    tokens = [counts[f"{role}_tokens"] for role in _ROLES]
    yield "tokens", [f"{n:,}" for n in tokens]
    yield "characters a token", [f"{counts['characters'] / n:.2f}" for n in tokens]
    yield "tokens a span", [f"{n / counts['spans']:.3f}" for n in tokens]
    for label, cells in sizes(found, most=4):
        yield f"spans of {label} token{'s' if label != '1' else ''}", cells


def _text(spans: Sequence[Mapping[str, Any]]) -> DrawnText:
    drawn = [
        DrawnSpan(
            name=span["type"],
            style=_STYLES[span["type"]],
            teacher=[shown(token) for token in span["teacher"]],
            student=[shown(token) for token in span["student"]],
            ends_line="\n" in span["text"],
        )
        for span in spans[:MOST_SPANS]
    ]
    return DrawnText(drawn, len(spans) - len(drawn))
