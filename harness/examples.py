"""Aligned spans with their weights, graded for a page: how far a weight is above or below one, in five steps."""

from collections.abc import Sequence
from typing import NamedTuple

from harness.weights_summary import WeightedSpan, WeightsSummary

GRADES = (1.05, 1.35, 2.0, 3.0)
"""From these factors on, a weight is of grade 1, 2, 3, 4; what is closer to one is of grade 0."""


class Span(NamedTuple):
    """Text, weight as text, and the classes of its colour: direction and grade."""

    text: str
    weight: str
    style: str


class Example(NamedTuple):
    """A pair: its prompt, and each side's spans."""

    prompt: str
    sides: list[tuple[str, list[Span]]]


def examples_of(weights: WeightsSummary) -> list[Example]:
    """The example pairs of a record's weights; none where the weights are not of spans."""
    return [
        Example(pair.prompt, [("chosen", _spans(pair.chosen)), ("rejected", _spans(pair.rejected))])
        for pair in weights.examples
    ]


def _spans(spans: Sequence[WeightedSpan]) -> list[Span]:
    return [Span(text, f"{weight:.2f}", grade(weight)) for text, weight in spans]


def grade(weight: float) -> str:
    """``up3`` for a weight between 2 and 3, ``down3`` for one between a third and a half, nothing around one."""
    factor = max(weight, 1 / weight) if weight > 0 else float("inf")
    reached = sum(factor >= limit for limit in GRADES)
    return f"{'up' if weight > 1 else 'down'}{reached}" if reached else ""
