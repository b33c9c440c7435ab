"""Parts of figures in matplotlib: a sheet and axes measured in points, lines, dots, texts and round numbers.

A figure's y axis often counts points from the top, its x axis values. Colours are named (``PALETTE``). ``gid`` becomes a
CSS class in the report.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.charts import Point, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360
POINTS_PER_INCH = 72
TITLE = 26
"""Height of a title."""

PALETTE = {
    "paper": "#fdfdfb",
    "ink": "#1d1f23",
    "muted": "#5f646d",
    "faint": "#e7e7e2",
    "s0": "#1f5fa8",
    "s1": "#c2570c",
    "s2": "#2b8050",
    "s3": "#a3346f",
    "s4": "#6a51b5",
    "s5": "#8a6d00",
    "s6": "#197d8c",
    "s7": "#6b6b6b",
}
"""The colours of figures on paper, and of the report's in a light theme; ``templates/style.css`` has them as variables."""
DARK = {
    "paper": "#16181c",
    "ink": "#e6e6e3",
    "muted": "#a2a7b0",
    "faint": "#2a2e35",
    "s0": "#7fb2ee",
    "s1": "#f0a15e",
    "s2": "#6fc593",
    "s3": "#e58ab9",
    "s4": "#b3a0f0",
    "s5": "#d8bd55",
    "s6": "#62c6d4",
    "s7": "#b0b0b0",
}
"""The same in a dark theme."""


def sheet(height: float, title: str | None, *, width: float = WIDTH) -> "Figure":
    """An empty figure of so many points, without its title, which adds ``TITLE`` to the height."""
    from matplotlib.figure import Figure

    height += 0 if title is None else TITLE
    size = width / POINTS_PER_INCH, height / POINTS_PER_INCH
    figure = Figure(figsize=size, dpi=POINTS_PER_INCH, facecolor="white")
    if title is not None:
        figure.text(
            8 / width,
            1 - 17 / height,
            shortened(title, round(width / 7.8)),
            color=PALETTE["ink"],
            weight="bold",
            size=12,
        )
    return figure


def axes_of(figure: "Figure", *, left: float, right: float, height: float, below: float, above: float = 0) -> "Axes":
    """Axes without a frame, ``below`` points above the figure's lower edge; ``above`` is taken off their height."""
    width, total = (size * POINTS_PER_INCH for size in figure.get_size_inches())
    axes = figure.add_axes(
        (left / width, below / total, 1 - (left + right) / width, (height - above) / total), frameon=False
    )
    axes.set_axis_off()
    return axes


def label_x(axes: "Axes", label: str) -> None:
    """The axis as a line, numbers and a label below it."""
    (low, high), bottom = axes.get_xlim(), axes.get_ylim()[0]
    draw_lines(axes, [[(low, bottom), (high, bottom)]], "muted")
    shown = {(tick - low) / (high - low): number_text(tick) for tick in round_numbers(low, high)}
    for share, text in shown.items():
        draw_text(axes, share, bottom, text, "muted", size=11, ha="center", shift=(0, -15))
    draw_text(axes, 0.5, bottom, label, "muted", size=11, ha="center", shift=(0, -30))


def label_y(axes: "Axes") -> None:
    """Horizontal lines at round numbers, and these at their left."""
    ticks = round_numbers(*axes.get_ylim())
    draw_lines(axes, [[(end, tick) for end in axes.get_xlim()] for tick in ticks], "faint")
    for tick in ticks:
        draw_text(axes, 0, tick, number_text(tick), "muted", size=11, ha="right", shift=(-6, -4))


def round_numbers(low: float, high: float) -> list[float]:
    """About five numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import MaxNLocator

    slack = 1e-9 * (high - low)
    found = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(tick), 12) for tick in found if low - slack <= tick <= high + slack]


def draw_lines(axes: "Axes", lines: Sequence[Sequence[Point]], colour: str, *, width: float = 1, **style: Any) -> None:
    """Lines through points, in one path; a point that is not finite interrupts its line. ``style`` is of ``Line2D``."""
    from matplotlib.lines import Line2D

    gap = (math.nan, math.nan)
    points = [point for line in lines for point in (*line, gap)]
    xs, ys = [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]
    drawn = Line2D(xs, ys, color=PALETTE[colour], linewidth=width, clip_on=False, **style)
    drawn.set_solid_capstyle("butt")
    axes.add_line(drawn)


def draw_dot(axes: "Axes", at: Point, colour: str, *, radius: float, filled: bool, gid: str) -> None:
    """A circle of so many points: a path of its own, since a marker is a reference, which a page may hold only once."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline
    from matplotlib.transforms import Affine2D, ScaledTranslation

    assert axes.figure is not None
    size = Affine2D().scale(radius / POINTS_PER_INCH) + axes.figure.dpi_scale_trans
    to_display: Any = axes.transData  # which is affine: no axis is logarithmic
    patch = PathPatch(
        Outline.unit_circle(),
        transform=size + ScaledTranslation(*at, to_display),
        facecolor=PALETTE[colour if filled else "paper"],
        edgecolor=PALETTE[colour],
        linewidth=2,
        clip_on=False,
        zorder=3,
        gid=gid,
    )
    axes.add_artist(patch)


def draw_text(
    axes: "Axes", x: float, y: float, text: str, colour: str = "ink", *, shift: Point = (0, 0), **style: Any
) -> None:
    """Text at a share of the axes' width and a height in their units, its baseline there or ``shift`` points off."""
    from matplotlib.transforms import ScaledTranslation

    assert axes.figure is not None
    moved = ScaledTranslation(shift[0] / POINTS_PER_INCH, shift[1] / POINTS_PER_INCH, axes.figure.dpi_scale_trans)
    axes.text(
        x,
        y,
        text,
        color=PALETTE[colour],
        transform=axes.get_yaxis_transform() + moved,
        clip_on=False,
        va="baseline",
        **style,
    )


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis, in at most so many characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def spread_apart(heights: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Heights in the same order, at least ``gap`` apart and inside [low, high], near those given.

    Args:
        heights: ascending.
        gap: the least distance of neighbours; less where they do not fit otherwise.
        low, high: the ends.
    """
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap if found else low))
    limit = high
    for index in reversed(range(len(found))):
        found[index] = min(found[index], limit)
        limit = found[index] - gap
    return found
