"""Figures drawn by matplotlib: as SVG inside the report, and as SVG, PDF and PNG files for papers and talks.

All figures are as wide as a phone's column, so that their text keeps its size; the report sets several beside each
other. Lengths are points (1/72 inch), which are the user units of the SVG. Inside the report a figure takes its colours
and type from the page's style sheet, in light and in dark; a file has the light colours, its title and its legend.

``Figure`` is used without ``pyplot``, which would keep figures and a backend in global state; matplotlib is imported when
the first figure is drawn, because the import takes half a second.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never
from xml.etree import ElementTree

from harness.charts import (
    NUM_STYLES,
    Bars,
    Chart,
    Curve,
    Curves,
    Forest,
    Histograms,
    Named,
    Point,
    describe,
    is_dashed,
    number_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360
POINTS_PER_INCH = 72
ROW = 38
"""Height of one line of a forest plot."""
PANEL = 108
"""Height of one histogram."""
TITLE = 26
LEGEND_ROW = 18
PNG_DPI = 200
FORMATS = ("svg", "pdf", "png")

PALETTE = {
    "paper": "#fdfdfb", "ink": "#1d1f23", "muted": "#5f646d", "faint": "#e7e7e2",
    "s0": "#1f5fa8", "s1": "#c2570c", "s2": "#2b8050", "s3": "#a3346f",
    "s4": "#6a51b5", "s5": "#8a6d00", "s6": "#197d8c", "s7": "#6b6b6b",
}  # fmt: skip
"""The light colours of ``templates/style.css``, by the names of its variables."""

CLASSES = ("point", "smooth", "mark", "bars", "bound")
"""Marks that keep their name in the page's SVG, as a CSS class."""
NUMBER = re.compile(r"-?\d+\.\d+")

SETTINGS: Any = {
    "svg.hashsalt": "ctpd",  # names inside a file repeat from run to run
    "path.simplify": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 12,
}


def inline_svg(chart: Chart) -> str:
    """The figure as an ``svg`` element for the report: colours and type are the page's, and it refers to nothing."""
    with _drawing(svg_fonttype="none"):
        figure = _draw(chart, as_file=False)
        figure.patch.set_visible(False)
        root = ElementTree.fromstring(_saved(figure, "svg"))
    root = _for_page(root)
    root.attrib |= {"class": "figure", "role": "img", "aria-label": chart.title}
    words = [_element("title", chart.title), _element("desc", describe(chart))]
    root[:] = [*words, *root]
    return ElementTree.tostring(root, encoding="unicode")


def write_figures(charts: Iterable[Named], folder: Path) -> list[Path]:
    """Write each chart as SVG, PDF and PNG, the same bytes for the same numbers; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with _drawing(svg_fonttype="path"):
        for stem, chart in charts:
            figure = _draw(chart, as_file=True)
            for suffix in FORMATS:
                paths.append(folder / f"{stem}.{suffix}")
                paths[-1].write_bytes(_saved(figure, suffix))
    return paths


@contextmanager
def _drawing(*, svg_fonttype: str) -> Iterator[None]:
    """matplotlib with our settings, and with its own again afterwards."""
    import matplotlib

    with matplotlib.rc_context({**SETTINGS, "svg.fonttype": svg_fonttype}), warnings.catch_warnings():
        # DejaVu has no Chinese, say: a browser finds another font for it, and a file shows boxes.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def _saved(figure: "Figure", suffix: str) -> bytes:
    """A file without dates and names of programs in it."""
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[suffix]
    figure.savefig(buffer, format=suffix, dpi=PNG_DPI if suffix == "png" else POINTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


def _draw(chart: Chart, *, as_file: bool) -> "Figure":
    match chart:
        case Forest():
            return _forest(chart, title=chart.title if as_file else None)
        case Curves():
            return _curves(chart, title=chart.title if as_file else None)
        case Histograms():
            return _histograms(chart, title=chart.title if as_file else None)
        case _:
            assert_never(chart)


def _forest(chart: Forest, *, title: str | None) -> "Figure":
    """An interval a line, its name and numbers above it, and a line at no difference."""
    low, high = chart.span
    margin = 0.04 * (high - low) or 1.0
    bottom = ROW * len(chart.estimates) + 8
    figure = _figure(bottom + 36, title)
    axes = _axes(figure, left=8, right=8, height=bottom, below=36)
    axes.set(xlim=(low - margin, high + margin), ylim=(bottom, 0))
    _label_x(axes, chart.unit)
    places = [ROW * number + 28 for number in range(len(chart.estimates))]
    grid = [[(tick, y - 8), (tick, y + 12)] for y in places for tick in _round_numbers(*axes.get_xlim())]
    _lines(axes, grid, "faint")
    _lines(axes, [[(0, y - 8), (0, y + 12)] for y in places], "muted", linestyle=(0, (3, 3)))
    for item, y in zip(chart.estimates, places, strict=True):
        _text(axes, 0, y - 12, _short(item.label, 27))
        _text(axes, 1, y - 12, item.text, "muted", size=11, ha="right")
        ends = [[(end, y - 4), (end, y + 4)] for end in (item.low, item.high)]
        _lines(axes, [[(item.low, y), (item.high, y)], *ends], "ink", width=1.5)
        clear = item.low > 0 or item.high < 0
        _dot(axes, (item.value, y), "s0", radius=4.5, filled=clear, gid=f"point {'clear' if clear else 'open'}")
    return figure


def _curves(chart: Curves, *, title: str | None) -> "Figure":
    """Thin as measured, bold as smoothed, circles on the evaluation pairs."""
    legend = [] if title is None else chart.lines
    rows = math.ceil(len(legend) / 2)
    figure = _figure(226 + LEGEND_ROW * rows, title)
    axes = _axes(figure, left=44, right=10, height=190, below=36 + LEGEND_ROW * rows, above=8)
    points = [p for line in chart.lines for p in (*line.raw, *line.smooth, *line.marks) if math.isfinite(p[1])]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    axes.set(xlim=(min(xs), max(max(xs), min(xs) + 1)), ylim=(min(ys) - margin, max(ys) + margin))
    _label_x(axes, chart.x_label)
    _label_y(axes)
    for line in chart.lines:
        colour, dashes = _style(line)
        _lines(axes, [line.raw], colour, linestyle=dashes, alpha=0.22)
        _lines(axes, [line.smooth], colour, width=2, linestyle=dashes, gid="smooth")
        for point in line.marks:
            if math.isfinite(point[1]):
                _dot(axes, point, colour, radius=3.5, width=1.8, filled=False, gid="mark")
    for number, line in enumerate(legend):
        _legend_entry(figure, line, column=number % 2, y=LEGEND_ROW * (rows - number // 2) - 8)
    return figure


def _histograms(chart: Histograms, *, title: str | None) -> "Figure":
    """One above the other over one axis; the tallest bar of each fills its height."""
    bottom = PANEL * len(chart.panels) - 4
    low, high = min(panel.edges[0] for panel in chart.panels), max(panel.edges[-1] for panel in chart.panels)
    figure = _figure(bottom + 36, title)
    axes = _axes(figure, left=12, right=12, height=bottom, below=36)
    axes.set(xlim=(low, high if high > low else low + 1), ylim=(bottom, 0))
    _label_x(axes, chart.x_label)
    for number, panel in enumerate(chart.panels):
        _panel(axes, panel, bottom=PANEL * number + PANEL - 4)
    return figure


def _panel(axes: "Axes", panel: Bars, *, bottom: float) -> None:
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    unit = 62 / (max(panel.counts, default=0) or 1)
    bars = [
        Rectangle((left, bottom), right - left, -unit * count)
        for count, left, right in zip(panel.counts, panel.edges[:-1], panel.edges[1:], strict=True)
        if count
    ]
    if bars:
        outline = Outline.make_compound_path(*(bar.get_transform().transform_path(bar.get_path()) for bar in bars))
        colour = PALETTE["s0" if panel.side == "chosen" else "s1"]
        patch = PathPatch(outline, facecolor=colour, alpha=0.85, linewidth=0, clip_on=False)
        patch.set_gid("bars")
        axes.add_patch(patch)
    _text(axes, 0, bottom - 88, panel.label)
    low, high = axes.get_xlim()
    _lines(axes, [[(low, bottom), (high, bottom)]], "muted")
    for bound in panel.bounds:
        _lines(axes, [[(bound, bottom - 66), (bound, bottom)]], "ink", linestyle=(0, (2, 3)), gid="bound")
        share = (bound - low) / (high - low)
        _text(axes, share, bottom - 70, f"{bound:.3g}", "muted", size=11, ha="right" if share > 0.5 else "left")


def _figure(height: float, title: str | None) -> "Figure":
    from matplotlib.figure import Figure

    height += 0 if title is None else TITLE
    size = WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH
    figure = Figure(figsize=size, dpi=POINTS_PER_INCH, facecolor="white")
    if title is not None:
        figure.text(8 / WIDTH, 1 - 17 / height, _short(title, 46), color=PALETTE["ink"], weight="bold", size=12)
    return figure


def _axes(figure: "Figure", *, left: float, right: float, height: float, below: float, above: float = 0) -> "Axes":
    """Axes without a frame, ``below`` points above the figure's lower edge; ``above`` is taken off their height."""
    total = figure.get_figheight() * POINTS_PER_INCH
    axes = figure.add_axes(
        (left / WIDTH, below / total, 1 - (left + right) / WIDTH, (height - above) / total), frameon=False
    )
    axes.set_axis_off()
    return axes


def _label_x(axes: "Axes", label: str) -> None:
    """The axis as a line, numbers and a label below it."""
    (low, high), bottom = axes.get_xlim(), axes.get_ylim()[0]
    _lines(axes, [[(low, bottom), (high, bottom)]], "muted")
    shown = {(tick - low) / (high - low): number_text(tick) for tick in _round_numbers(low, high)}
    for share, text in shown.items():
        _text(axes, share, bottom, text, "muted", size=11, ha="center", shift=(0, -15))
    _text(axes, 0.5, bottom, label, "muted", size=11, ha="center", shift=(0, -30))


def _label_y(axes: "Axes") -> None:
    """Horizontal lines at round numbers, and these at their left."""
    ticks = _round_numbers(*axes.get_ylim())
    _lines(axes, [[(end, tick) for end in axes.get_xlim()] for tick in ticks], "faint")
    for tick in ticks:
        _text(axes, 0, tick, number_text(tick), "muted", size=11, ha="right", shift=(-6, -4))


def _round_numbers(low: float, high: float) -> list[float]:
    """About five numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import MaxNLocator

    slack = 1e-9 * (high - low)
    found = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(tick), 12) for tick in found if low - slack <= tick <= high + slack]


def _lines(
    axes: "Axes",
    lines: Sequence[Sequence[Point]],
    colour: str,
    *,
    width: float = 1,
    gid: str | None = None,
    **style: Any,
) -> None:
    """Lines through points, in one path; a point that is not finite interrupts its line."""
    from matplotlib.lines import Line2D

    gap = (math.nan, math.nan)
    points = [point for line in lines for point in (*line, gap)]
    xs, ys = [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]
    drawn = Line2D(xs, ys, color=PALETTE[colour], linewidth=width, clip_on=False, gid=gid, **style)
    drawn.set_solid_capstyle("butt")
    axes.add_line(drawn)


def _dot(
    axes: "Axes", at: Point, colour: str, *, radius: float, filled: bool, width: float = 2, gid: str | None = None
) -> None:
    """A circle of so many points: a path of its own, since a marker is a reference, which a page may hold only once."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline
    from matplotlib.transforms import Affine2D, ScaledTranslation

    assert axes.figure is not None
    size = Affine2D().scale(radius / POINTS_PER_INCH) + axes.figure.dpi_scale_trans
    to_display: Any = axes.transData  # which is affine: no axis is logarithmic
    patch = PathPatch(
        Outline.unit_circle(), facecolor=PALETTE[colour if filled else "paper"], edgecolor=PALETTE[colour], linewidth=width,
        transform=size + ScaledTranslation(*at, to_display), clip_on=False, zorder=3, gid=gid,
    )  # fmt: skip
    axes.add_artist(patch)


def _text(
    axes: "Axes", x: float, y: float, text: str, colour: str = "ink", *, shift: Point = (0, 0), **style: Any
) -> None:
    """Text at a share of the axes' width and a height in their units, its baseline there or ``shift`` points off."""
    from matplotlib.transforms import ScaledTranslation

    assert axes.figure is not None
    moved = ScaledTranslation(shift[0] / POINTS_PER_INCH, shift[1] / POINTS_PER_INCH, axes.figure.dpi_scale_trans)
    place = axes.get_yaxis_transform() + moved
    axes.text(x, y, text, color=PALETTE[colour], transform=place, clip_on=False, va="baseline", **style)


def _legend_entry(figure: "Figure", line: Curve, *, column: int, y: float) -> None:
    """A piece of the line and its label, in one of two columns, ``y`` points above the figure's lower edge."""
    from matplotlib.lines import Line2D

    height = figure.get_figheight() * POINTS_PER_INCH
    left = 12 + column * WIDTH / 2
    colour, dashes = _style(line)
    ends = [left / WIDTH, (left + 22) / WIDTH], [(y + 4) / height] * 2
    figure.add_artist(Line2D(*ends, color=PALETTE[colour], linewidth=2.5, linestyle=dashes))
    figure.text((left + 28) / WIDTH, y / height, _short(line.label, 22), size=11, color=PALETTE["ink"])


def _style(line: Curve) -> tuple[str, Any]:
    """Colour and dashes of a curve."""
    return f"s{line.style % NUM_STYLES}", (0, (5, 3)) if is_dashed(line.style) else "solid"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _for_page(root: ElementTree.Element) -> ElementTree.Element:
    """matplotlib's SVG for a page with many of them: paths and texts alone, variables for colours, ``gid`` as classes."""
    page = ElementTree.Element("svg", {"viewBox": root.attrib["viewBox"]})
    for group in root.iter():
        classes = group.attrib.get("id", "")
        for element in group:
            kind = element.tag.rpartition("}")[2]
            if kind not in ("path", "text"):
                continue
            leaf = ElementTree.SubElement(page, kind)
            leaf.text = element.text
            if classes.split(" ")[0] in CLASSES:
                leaf.set("class", classes)
            for name in ("d", "x", "y"):
                if name in element.attrib:
                    leaf.set(
                        name,
                        NUMBER.sub(
                            lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), element.attrib[name]
                        ).strip(),
                    )
            leaf.set("style", _page_style(element.attrib.get("style", "")))
    return page


def _page_style(style: str) -> str:
    """A style with the page's font and colours."""
    kept = [part.strip() for part in style.split(";") if not part.strip().startswith("font-family")]
    text = "; ".join(f"font-size: {part.split()[1]}" if part.startswith("font:") else part for part in kept)
    for name, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _element(tag: str, text: str) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    element.text = text
    return element
