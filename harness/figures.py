"""Figures drawn by matplotlib: as SVG inside the report, and as SVG, PDF and PNG files for papers and talks.

All figures are as wide as a phone's column, so that their text keeps its size; the report sets several side by
side. Lengths are points (1/72 inch), which are the user units of the SVG. Inside the report a figure takes its colours
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
from xml.etree import ElementTree  # nosec B405 # it reads what matplotlib writes

from harness.charts import (
    NUM_STYLES,
    Bars,
    Chart,
    Curve,
    Curves,
    Forest,
    Histograms,
    Named,
    describe,
    is_dashed,
)
from harness.drawing import (
    PALETTE,
    POINTS_PER_INCH,
    WIDTH,
    axes_of,
    draw_dot,
    draw_lines,
    draw_text,
    label_x,
    label_y,
    round_numbers,
    sheet,
    shortened,
    spread_apart,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 38
"""Height of one line of a forest plot."""
PANEL = 108
"""Height of one histogram."""
LEGEND_ROW = 18
CURVES = 190
"""Height of a figure of curves."""
LINE_NUMBER = 13
"""Height of the number at the end of a curve."""
PNG_DPI = 200
FORMATS = ("svg", "pdf", "png")

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
    with matplotlib_settings(svg_fonttype="none"):
        page = themed(_draw(chart, as_file=False), title=chart.title, description=describe(chart))
    page.attrib |= {"class": "figure", "aria-label": chart.title}
    return ElementTree.tostring(page, encoding="unicode")


def themed(figure: "Figure", *, title: str, description: str) -> ElementTree.Element:
    """A figure as an ``svg`` element whose colours are CSS variables, with its title and description for screen readers.

    Within ``matplotlib_settings(svg_fonttype="none")``, so that text stays text.
    """
    figure.patch.set_visible(False)
    page = _for_page(ElementTree.fromstring(_saved(figure, "svg")))  # nosec B314 # matplotlib has just written it
    page.set("role", "img")
    page[:] = [_element("title", title), _element("desc", description), *page]
    return page


def write_figures(charts: Iterable[Named], folder: Path) -> list[Path]:
    """Write each chart as SVG, PDF and PNG, the same bytes for the same numbers; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib_settings(svg_fonttype="path"):
        for stem, chart in charts:
            figure = _draw(chart, as_file=True)
            for suffix in FORMATS:
                paths.append(folder / f"{stem}.{suffix}")
                paths[-1].write_bytes(_saved(figure, suffix))
    return paths


@contextmanager
def matplotlib_settings(*, svg_fonttype: str) -> Iterator[None]:
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
    figure = sheet(bottom + 36, title)
    axes = axes_of(figure, left=8, right=8, height=bottom, below=36)
    axes.set(xlim=(low - margin, high + margin), ylim=(bottom, 0))
    label_x(axes, chart.unit)
    rows = [ROW * number + 28 for number in range(len(chart.estimates))]
    grid = [[(tick, y - 8), (tick, y + 12)] for y in rows for tick in round_numbers(*axes.get_xlim())]
    draw_lines(axes, grid, "faint")
    draw_lines(axes, [[(0, y - 8), (0, y + 12)] for y in rows], "muted", linestyle=(0, (3, 3)))
    for item, y in zip(chart.estimates, rows, strict=True):
        draw_text(axes, 0, y - 12, shortened(item.label, 27))
        draw_text(axes, 1, y - 12, item.text, "muted", size=11, ha="right")
        ends = [[(end, y - 4), (end, y + 4)] for end in (item.low, item.high)]
        draw_lines(axes, [[(item.low, y), (item.high, y)], *ends], "ink", width=1.5)
        style = "clear" if item.is_clear else "open"
        draw_dot(axes, (item.value, y), "s0", radius=4.5, filled=item.is_clear, gid=f"point {style}")
    return figure


def _curves(chart: Curves, *, title: str | None) -> "Figure":
    """Thin as measured, bold as smoothed, circles on the evaluation pairs; at the end of a line the number of its row."""
    legend = [] if title is None else chart.lines
    rows = math.ceil(len(legend) / 2)
    figure = sheet(226 + LEGEND_ROW * rows, title)
    axes = axes_of(
        figure, left=44, right=10 if len(chart.lines) == 1 else 30, height=CURVES, below=36 + LEGEND_ROW * rows, above=8
    )
    points = [p for line in chart.lines for p in (*line.raw, *line.smooth, *line.marks) if math.isfinite(p[1])]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    axes.set(xlim=(min(xs), max(max(xs), min(xs) + 1)), ylim=(min(ys) - margin, max(ys) + margin))
    label_x(axes, chart.x_label)
    label_y(axes)
    for line in chart.lines:
        colour, dashes = _style(line)
        draw_lines(axes, [line.raw], colour, linestyle=dashes, alpha=0.22)
        draw_lines(axes, [line.smooth], colour, width=2, linestyle=dashes, gid="smooth")
        for point in line.marks:
            if math.isfinite(point[1]):
                draw_dot(axes, point, colour, radius=3.5, filled=False, gid="mark")
    if len(chart.lines) > 1:
        _number_ends(axes, chart.lines)
    for number, line in enumerate(legend):
        _legend_entry(figure, line, column=number % 2, y=LEGEND_ROW * (rows - number // 2) - 8)
    return figure


def _number_ends(axes: "Axes", lines: Sequence[Curve]) -> None:
    """The number of each line at the height of its last point, moved as little as keeps it clear of the others."""
    low, high = axes.get_ylim()
    ends = [(found[-1], line) for line in lines if (found := [y for _, y in line.smooth if math.isfinite(y)])]
    ordered = sorted(ends, key=lambda end: end[0])
    gap = LINE_NUMBER * (high - low) / (CURVES - 8)
    heights = spread_apart([y for y, _ in ordered], gap=gap, low=low, high=high)
    for y, (_, line) in zip(heights, ordered, strict=True):
        colour, _ = _style(line)
        draw_text(axes, 1, y, str(line.style + 1), colour, size=11, shift=(7, -4))


def _histograms(chart: Histograms, *, title: str | None) -> "Figure":
    """One above the other over one axis; the tallest bar of each fills its height."""
    bottom = PANEL * len(chart.panels) - 4
    low, high = min(panel.edges[0] for panel in chart.panels), max(panel.edges[-1] for panel in chart.panels)
    figure = sheet(bottom + 36, title)
    axes = axes_of(figure, left=12, right=12, height=bottom, below=36)
    axes.set(xlim=(low, high if high > low else low + 1), ylim=(bottom, 0))
    label_x(axes, chart.x_label)
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
    draw_text(axes, 0, bottom - 88, panel.label)
    low, high = axes.get_xlim()
    draw_lines(axes, [[(low, bottom), (high, bottom)]], "muted")
    for bound in panel.bounds:
        draw_lines(axes, [[(bound, bottom - 66), (bound, bottom)]], "ink", linestyle=(0, (2, 3)), gid="bound")
        share = (bound - low) / (high - low)
        draw_text(axes, share, bottom - 70, f"{bound:.3g}", "muted", size=11, ha="right" if share > 0.5 else "left")


def _legend_entry(figure: "Figure", line: Curve, *, column: int, y: float) -> None:
    """A piece of the line and its label, in one of two columns, ``y`` points above the figure's lower edge."""
    from matplotlib.lines import Line2D

    height = figure.get_figheight() * POINTS_PER_INCH
    left = 12 + column * WIDTH / 2
    colour, dashes = _style(line)
    ends = [left / WIDTH, (left + 22) / WIDTH], [(y + 4) / height] * 2
    figure.add_artist(Line2D(*ends, color=PALETTE[colour], linewidth=2.5, linestyle=dashes))
    text = shortened(f"{line.style + 1} {line.label}", 22)
    figure.text((left + 28) / WIDTH, y / height, text, size=11, color=PALETTE["ink"])


def _style(line: Curve) -> tuple[str, Any]:
    """Colour and dashes of a curve."""
    return f"s{line.style % NUM_STYLES}", (0, (5, 3)) if is_dashed(line.style) else "solid"


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
            for name, written in (("d", _path), ("x", _rounded), ("y", _rounded)):
                if name in element.attrib:
                    leaf.set(name, written(element.attrib[name]))
            leaf.set("style", _page_style(element.attrib.get("style", "")))
    return page


def _rounded(coordinates: str) -> str:
    """The same with a tenth of a point at most: a third of the size."""
    return NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), " ".join(coordinates.split()))


def _path(commands: str) -> str:
    """A rounded path; in one of straight lines each goes so far from the last point, which has fewer digits than where to."""
    letters = set(re.findall("[A-Za-z]", NUMBER.sub("", commands)))
    if not letters <= {"M", "L", "z"}:
        return _rounded(commands)
    written, last = [], (0, 0)
    for letter, numbers in re.findall(r"([MLz])([^MLz]*)", commands):
        if letter == "z":
            written.append("z")
            continue
        x, y = (round(10 * float(number)) for number in numbers.split())
        origin = (0, 0) if letter == "M" else last
        written.append(f"{'M' if letter == 'M' else 'l'}{_tenths(x - origin[0])} {_tenths(y - origin[1])}")
        last = (x, y)
    return "".join(written)


def _tenths(number: int) -> str:
    return f"{number / 10:.1f}".removesuffix(".0")


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
