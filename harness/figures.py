"""Figures as SVG text, from numbers alone. Colours and type are the page's: every mark has a class, none a colour.

All figures are as wide as a phone's column, so that their text keeps its size; a page sets several beside each other.
Each has a title and a description in words, for those who do not see it.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH = 360
PANEL = 108
"""Height of one histogram."""
NUM_STYLES = 8
"""Classes ``s0`` to ``s7``; from the ninth on, the same colours dashed (``dash``)."""

Point = tuple[float, float]


class Estimate(NamedTuple):
    """One line of a forest plot; ``text`` says its numbers."""

    label: str
    value: float
    low: float
    high: float
    text: str


class Curve(NamedTuple):
    """One line of a figure of curves: measured points, smoothed ones, and single marks; ``style`` counts from 0."""

    label: str
    style: int
    raw: Sequence[Point]
    smooth: Sequence[Point]
    marks: Sequence[Point]


class Bars(NamedTuple):
    """A histogram: counts between edges, with vertical lines at ``bounds`` and a name that stands in it."""

    label: str
    style: str
    counts: Sequence[int]
    edges: Sequence[float]
    bounds: Sequence[float]


class Scale(NamedTuple):
    """From a value to a place: ``first`` is shown at ``start`` and ``last`` at ``end``."""

    first: float
    last: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value, to a tenth of a unit."""
        share = (value - self.first) / ((self.last - self.first) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def style_class(number: int) -> str:
    """Classes of the line with this number: its colour, and dashes once the colours are used up."""
    return f"s{number % NUM_STYLES}" + (" dash" if number % (2 * NUM_STYLES) >= NUM_STYLES else "")


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round values inside [low, high], about so many: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick as text, with a true minus sign and no needless digits."""
    return f"{value:.4g}".replace("-", "−")


def forest(estimates: Sequence[Estimate], *, title: str, unit: str, span: tuple[float, float] | None = None) -> str:
    """A forest plot: an interval a line, its name and numbers above it, and a line at no difference.

    Args:
        estimates: from top to bottom.
        unit: what the axis shows.
        span: the axis, for several plots side by side; by default what the intervals and zero need.
    """
    low, high = span if span is not None else reach(estimates)
    margin = 0.04 * (high - low) or 1.0
    x = Scale(low - margin, high + margin, 8, WIDTH - 8)
    bottom = 38 * len(estimates) + 8
    body = []
    for number, item in enumerate(estimates):
        y = 38 * number + 28
        body += [_vertical(x(tick), y - 8, y + 12, "grid") for tick in ticks(x.first, x.last)]
        body.append(_vertical(x(0), y - 8, y + 12, "zero"))
        clear = "clear" if item.low > 0 or item.high < 0 else "open"
        body += [
            _text(8, y - 12, _short(item.label, 27), "label"),
            _text(WIDTH - 8, y - 12, item.text, "number end"),
            f'<path class="whisker" d="M{x(item.low)} {y - 4}v8M{x(item.high)} {y - 4}v8M{x(item.low)} {y}H{x(item.high)}"/>',
            f'<circle class="point {clear}" cx="{x(item.value)}" cy="{y}" r="4.5"/>',
        ]
    body += _x_axis(x, bottom, unit)
    words = "; ".join(f"{item.label}: {item.text}" for item in estimates)
    return _svg(bottom + 36, title, f"{unit}. {words}.", body)


def reach(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """The axis that several forest plots need to stand side by side; zero is on it."""
    ends = [end for item in estimates for end in (item.low, item.high)]
    return min(0.0, *ends), max(0.0, *ends)


def curves(lines: Sequence[Curve], *, title: str, x_label: str, y_label: str) -> str:
    """Curves over the steps of a training: thin as measured, bold as smoothed, circles where evaluated.

    Raises:
        ValueError: no line has a finite point.
    """
    points = [p for line in lines for p in (*line.raw, *line.smooth, *line.marks) if math.isfinite(p[1])]
    if not points:
        raise ValueError("there is nothing to draw")
    ys = [y for _, y in points]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.5
    x = Scale(min(p[0] for p in points), max(p[0] for p in points), 44, WIDTH - 10)
    y = Scale(low - margin, high + margin, 190, 8)
    body = []
    for tick in ticks(y.first, y.last):
        body.append(f'<path class="grid" d="M44 {y(tick)}H{WIDTH - 10}"/>')
        body.append(_text(38, y(tick) + 4, tick_text(tick), "number end"))
    for line in lines:
        kind = style_class(line.style)
        body.append(f'<path class="raw {kind}" d="{_path(line.raw, x, y)}"/>')
        body.append(f'<path class="line {kind}" d="{_path(line.smooth, x, y)}"/>')
        body += [
            f'<circle class="mark {kind}" cx="{x(px)}" cy="{y(py)}" r="3.5"/>'
            for px, py in line.marks
            if math.isfinite(py)
        ]
    body += _x_axis(x, 190, x_label)
    ends = "; ".join(f"{line.label}: from {_end(line.smooth, 0)} to {_end(line.smooth, -1)}" for line in lines)
    return _svg(226, title, f"{y_label} over {x_label}. {ends}.", body)


def histograms(panels: Sequence[Bars], *, title: str, x_label: str) -> str:
    """Histograms one above the other over one axis; the tallest bar of each fills its height."""
    low, high = min(panel.edges[0] for panel in panels), max(panel.edges[-1] for panel in panels)
    x = Scale(low, high if high > low else low + 1, 12, WIDTH - 12)
    body = []
    for number, panel in enumerate(panels):
        bottom = PANEL * number + PANEL - 4
        y = Scale(0, max(panel.counts, default=0) or 1, bottom, bottom - 62)
        outline = "".join(
            f"M{x(a)} {bottom}V{y(count)}H{x(b)}V{bottom}z"
            for count, a, b in zip(panel.counts, panel.edges[:-1], panel.edges[1:], strict=True)
            if count
        )
        body += [
            _text(12, bottom - 88, panel.label, "label"),
            f'<path class="bars {panel.style}" d="{outline}"/>',
            f'<path class="axis" d="M12 {bottom}H{WIDTH - 12}"/>',
        ]
        for bound in panel.bounds:
            end = " end" if x(bound) > WIDTH / 2 else ""
            body.append(_vertical(x(bound), bottom - 66, bottom, "bound"))
            body.append(_text(x(bound), bottom - 70, f"{bound:.3g}", f"number{end}"))
    body += _x_axis(x, PANEL * len(panels) - 4, x_label)
    words = "; ".join(f"{p.label}, {sum(p.counts):,} from {p.edges[0]:.3g} to {p.edges[-1]:.3g}" for p in panels)
    return _svg(PANEL * len(panels) + 32, title, f"{words}.", body)


def _svg(height: float, title: str, description: str, body: Sequence[str]) -> str:
    name = html.escape(title)
    opening = f'<svg class="figure" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{name}">'
    return "\n".join([opening, f"<title>{name}</title>", f"<desc>{html.escape(description)}</desc>", *body, "</svg>"])


def _x_axis(x: Scale, bottom: float, label: str) -> list[str]:
    marks = ticks(x.first, x.last)
    lines = [f'<path class="axis" d="M{x.start} {bottom}H{x.end}"/>']
    lines += [_text(x(tick), bottom + 14, tick_text(tick), "number middle") for tick in marks]
    return [*lines, _text((x.start + x.end) / 2, bottom + 30, label, "axis-label middle")]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{html.escape(text)}</text>'


def _vertical(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x} {top}V{bottom}"/>'


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """A line through the points; what is not finite interrupts it."""
    steps, pen = [], "M"
    for px, py in points:
        if not math.isfinite(py):
            pen = "M"
            continue
        steps.append(f"{pen}{x(px)} {y(py)}")
        pen = "L"
    return "".join(steps)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _end(points: Sequence[Point], index: int) -> str:
    finite = [y for _, y in points if math.isfinite(y)]
    return tick_text(finite[index]) if finite else "nothing"
