"""What the figures of a comparison show, as data: forest plots of differences, curves of trainings, histograms of weights.

Nothing here draws: see ``harness/figures.py``. Each chart can say in words what it shows (``describe``).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Point = tuple[float, float]
Side = Literal["chosen", "rejected"]


class Estimate(NamedTuple):
    """One line of a forest plot; ``text`` says its numbers, ``is_clear`` that the difference is no chance."""

    label: str
    value: float
    low: float
    high: float
    text: str
    is_clear: bool


class Forest(NamedTuple):
    """Intervals from top to bottom, over an axis from ``span[0]`` to ``span[1]`` that shows ``unit``."""

    title: str
    unit: str
    span: tuple[float, float]
    estimates: Sequence[Estimate]


class Curve(NamedTuple):
    """One line of a figure of curves: measured points, smoothed ones, and single marks; ``style`` counts from 0."""

    label: str
    style: int
    raw: Sequence[Point]
    smooth: Sequence[Point]
    marks: Sequence[Point]

    @property
    def is_drawable(self) -> bool:
        """Whether a point of it is finite."""
        return any(math.isfinite(y) for _, y in (*self.raw, *self.smooth, *self.marks))


class Curves(NamedTuple):
    """Curves over the steps of a training."""

    title: str
    x_label: str
    lines: Sequence[Curve]


class Bars(NamedTuple):
    """A histogram: counts between edges, vertical lines at ``bounds``, and a label above."""

    label: str
    side: Side
    counts: Sequence[int]
    edges: Sequence[float]
    bounds: Sequence[float]


class Histograms(NamedTuple):
    """Histograms one above the other over one axis."""

    title: str
    x_label: str
    panels: Sequence[Bars]


Chart = Forest | Curves | Histograms


NUM_STYLES = 8
"""Colours ``s0`` to ``s7`` of lines; from the ninth line on the same ones, dashed."""


def is_dashed(style: int) -> bool:
    """Whether the line with this number is dashed."""
    return style % (2 * NUM_STYLES) >= NUM_STYLES


def style_class(style: int) -> str:
    """CSS classes of the line with this number."""
    return f"s{style % NUM_STYLES}" + (" dash" if is_dashed(style) else "")


class Named(NamedTuple):
    """A chart and the stem of its files."""

    stem: str
    chart: Chart


def reach(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """The axis that several forest plots need side by side; zero is on it."""
    ends = [end for item in estimates for end in (item.low, item.high)]
    return min(0.0, *ends), max(0.0, *ends)


def describe(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    match chart:
        case Forest():
            return f"{chart.unit}. {'; '.join(f'{item.label}: {item.text}' for item in chart.estimates)}."
        case Curves():
            ends = "; ".join(
                f"{line.label}: from {_end(line.smooth, 0)} to {_end(line.smooth, -1)}" for line in chart.lines
            )
            return f"{chart.title} over {chart.x_label}. {ends}."
        case Histograms():
            panels = (
                f"{panel.label}, {sum(panel.counts):,} from {panel.edges[0]:.3g} to {panel.edges[-1]:.3g}"
                for panel in chart.panels
            )
            return f"{'; '.join(panels)}."


def number_text(value: float) -> str:
    """A number as text, with a true minus sign and no needless digits."""
    return f"{value:.4g}".replace("-", "−")


def _end(points: Sequence[Point], index: int) -> str:
    finite = [y for _, y in points if math.isfinite(y)]
    return number_text(finite[index]) if finite else "nothing"
