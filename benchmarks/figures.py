"""Figures as SVG files that follow a light or dark theme: bars with their spread and bound, and logarithmic curves."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from harness.charts import NUM_STYLES, number_text
from harness.drawing import (
    DARK,
    PALETTE,
    axes_of,
    draw_dot,
    draw_lines,
    draw_text,
    label_x,
    round_numbers,
    sheet,
)
from harness.figures import matplotlib_settings, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 720
LABEL = 360
"""Width of the labels at the left of bars."""
ROW = 26
BELOW = 46
"""Height of numbers and label below an axis."""


class Bar(NamedTuple):
    """One bar: the median, the range of the values, and the target if there is one."""

    label: str
    values: Sequence[float]
    bound: float | None = None
    style: int = 0


class Line(NamedTuple):
    """Measured points (x, y), both above 0, connected by a line."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dashed: bool = False


def bars(rows: Sequence[Bar], *, title: str, unit: str) -> str:
    """Horizontal bars from 0; whiskers from the least to the greatest value, a bold mark at the target.

    Raises:
        ValueError: no bar.
    """
    if not rows:
        raise ValueError("there is nothing to draw")
    height = ROW * len(rows) + 4
    top = max(max([*bar.values, bar.bound or 0.0]) for bar in rows)
    words = "; ".join(f"{bar.label}: {', '.join(f'{v:.3g}' for v in bar.values)}" for bar in rows)
    with matplotlib_settings(svg_fonttype="none"):
        figure = sheet(height + BELOW, title, width=WIDTH)
        axes = axes_of(figure, left=LABEL, right=70, height=height, below=BELOW)
        axes.set(xlim=(0, 1.02 * top or 1.0), ylim=(height, 0))
        grid = [[(tick, 0), (tick, height)] for tick in round_numbers(*axes.get_xlim())]
        draw_lines(axes, grid, "faint", zorder=0)
        for number, bar in enumerate(rows):
            _bar(axes, bar, top=ROW * number + 4)
        label_x(axes, unit)
        return _file(themed(figure, title=title, description=f"{unit}. {words}."))


def _bar(axes: "Axes", bar: Bar, *, top: float) -> None:
    from matplotlib.patches import Rectangle

    low, middle, high = min(bar.values), statistics.median(bar.values), max(bar.values)
    colour = PALETTE[f"s{bar.style % NUM_STYLES}"]
    axes.add_patch(Rectangle((0, top), middle, 18, facecolor=colour, linewidth=0, clip_on=False))
    draw_text(axes, 0, top + 13, bar.label, ha="right", shift=(-8, 0))
    if high > low:
        ends = [[(end, top + 5), (end, top + 13)] for end in (low, high)]
        draw_lines(axes, [[(low, top + 9), (high, top + 9)], *ends], "ink", width=1.5)
    if bar.bound is not None:
        draw_lines(axes, [[(bar.bound, top - 2), (bar.bound, top + 20)]], "ink", width=2)
    end = max(high, bar.bound or 0.0) / axes.get_xlim()[1]
    draw_text(axes, end, top + 13, f"{float(f'{middle:.3g}'):,.6g}", "muted", size=11, shift=(6, 0))


def log_lines(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Curves over two logarithmic axes, labelled at their ends.

    Raises:
        ValueError: a point is not above 0, or there is none.
    """
    points = [point for line in lines for point in line.points]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError("logarithmic axes need points above 0")
    words = "; ".join(f"{line.label}: " + ", ".join(f"{px:g} {py:.3g}" for px, py in line.points) for line in lines)
    with matplotlib_settings(svg_fonttype="none"):
        figure = sheet(320, title, width=WIDTH)
        axes = axes_of(figure, left=60, right=190, height=274, below=BELOW, above=22)
        # The axes are linear in the logarithms: every mark and number is placed by its logarithm.
        axes.set(xlim=_reach([x for x, _ in points]), ylim=_reach([y for _, y in points]))
        _log_axes(axes, sorted({x for x, _ in points}), x_label=x_label, y_label=y_label)
        for line in lines:
            drawn = [(math.log2(x), math.log2(y)) for x, y in line.points]
            colour = f"s{line.style % NUM_STYLES}"
            draw_lines(axes, [drawn], colour, width=2, linestyle=(0, (5, 3)) if line.dashed else "solid")
            for point in drawn:
                draw_dot(axes, point, colour, radius=3.5, filled=False, gid="mark")
        _label_ends(axes, lines)
        return _file(themed(figure, title=title, description=f"{y_label} over {x_label}. {words}."))


def _reach(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log2(min(values)), math.log2(max(values))
    return low - 0.1, max(high, low + 1) + 0.1


def _log_axes(axes: "Axes", measured: Sequence[float], *, x_label: str, y_label: str) -> None:
    """Horizontal lines at round numbers, the measured x values below."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ticks = _powers(bottom, top)
    draw_lines(axes, [[(left, math.log2(tick)), (right, math.log2(tick))] for tick in ticks], "faint")
    draw_lines(axes, [[(left, bottom), (right, bottom)]], "muted")
    for tick in ticks:
        draw_text(axes, 0, math.log2(tick), number_text(tick), "muted", size=11, ha="right", shift=(-6, -4))
    for x in measured:
        share = (math.log2(x) - left) / (right - left)
        draw_text(axes, share, bottom, f"{x:,.6g}", "muted", size=11, ha="center", shift=(0, -18))
    draw_text(axes, 0.5, bottom, x_label, "muted", size=11, ha="center", shift=(0, -38))
    draw_text(axes, 0, top, y_label, "muted", size=11, shift=(-48, 8))


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between 2**low and 2**high; on a long axis only the powers."""
    first, last = (math.floor(math.log10(2) * end) for end in (low, high))
    factors = (1, 2, 5) if last - first < 3 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in found if low <= math.log2(value) <= high]


def _label_ends(axes: "Axes", lines: Sequence[Line]) -> None:
    """Each line's label at its last point, moved down where it would cover another."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    points_per_unit = 252 / (top - bottom)
    heights: list[float] = []
    for line in lines:
        x, y = (math.log2(value) for value in line.points[-1])
        height = y * points_per_unit
        while any(abs(height - other) < 15 for other in heights):
            height -= 1
        heights.append(height)
        colour = f"s{line.style % NUM_STYLES}"
        draw_text(axes, (x - left) / (right - left), height / points_per_unit, line.label, colour, shift=(8, -4))


def _file(figure: ElementTree.Element) -> str:
    """The text of a standalone SVG file, with the palettes of both themes, a background and a font."""
    *_, width, height = figure.attrib["viewBox"].split()
    figure.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": width}
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in palette.items()) for palette in (PALETTE, DARK))
    style = ElementTree.Element("style")
    style.text = (
        f"svg {{ {light} font-family: system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif; }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"
    )
    paper = ElementTree.Element("rect", {"width": width, "height": height, "style": "fill: var(--paper)"})
    figure[:] = [*figure[:2], style, paper, *figure[2:]]
    return ElementTree.tostring(figure, encoding="unicode") + "\n"
