"""Figures from numbers: positions of marks, texts, and unusual numbers."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.charts import (
    Bars,
    Chart,
    Curve,
    Curves,
    Estimate,
    Forest,
    Histograms,
    Named,
    number_text,
    reach,
    style_class,
)
from harness.drawing import DARK, PALETTE
from harness.figures import _path, inline_svg, write_figures
from harness.html import render

ROOT = Path(__file__).parents[2]
ITEMS = [
    Estimate("A & <B> $x$", 2.0, 1.0, 3.0, "+2", True),
    Estimate("C", -0.5, -2.0, 1.0, "−0.5", False),
    Estimate("D", -4, -5, -3, "−4", True),
]
CHARTS: dict[str, Chart] = {
    "forest": Forest("F & G", "points", reach(ITEMS), ITEMS),
    "curves": Curves("F & G", "step", [Curve("A<b>", 0, [(1, 3.0)], [(1, 3.0), (2, 5.0)], [])]),
    "histograms": Histograms("F & G", "weight", [Bars("A<b>", "chosen", [1, 2], [0, 1, 2], [])]),
}


def parsed(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(inline_svg(chart))


def paths(chart: Chart, kind: str) -> list[list[tuple[float, float]]]:
    """The corners of the paths of a class."""
    found = [one.attrib["d"] for one in parsed(chart).iter("path") if kind in one.attrib.get("class", "").split()]
    return [corners(path) for path in found]


def corners(path: str) -> list[tuple[float, float]]:
    """Where the commands of a path go; `l` goes so far from the last point."""
    found: list[tuple[float, float]] = []
    for letter, x, y in re.findall(r"([A-Za-z]?) ?(-?[\d.]+) (-?[\d.]+)", path):
        left, top = found[-1] if letter == "l" else (0.0, 0.0)
        found.append((left + float(x), top + float(y)))
    return found


def centres(chart: Chart, kind: str) -> list[float]:
    return [(min(x for x, _ in path) + max(x for x, _ in path)) / 2 for path in paths(chart, kind)]


def test_numbers_have_a_true_minus_sign() -> None:
    assert [number_text(value) for value in (-0.5, 0.0, 1e-7)] == ["−0.5", "0", "1e−07"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (-20, 48, ["−20", "0", "20", "40"]), (3, 3, ["3", "3.2", "3.4", "3.6", "3.8", "4"])],
)  # fmt: skip
def test_an_axis_has_round_numbers(low: float, high: float, expected: list[str]) -> None:
    chart = Histograms("t", "weight", [Bars("", "chosen", [1], [low, high], [])])
    assert [text.text for text in parsed(chart).iter("text") if text.text][: len(expected)] == expected


def test_a_forest_plot_sets_points_in_order_and_tells_intervals_that_leave_out_zero() -> None:
    assert len(paths(CHARTS["forest"], "clear")) == 2
    assert len(paths(CHARTS["forest"], "open")) == 1
    a, c, d = centres(CHARTS["forest"], "point")
    assert d < c < a
    left, right = 8, 352  # -5 and 3, with a margin of 4 % at each end
    zero = left + (right - left) * (5 + 0.32) / (8 + 0.64)
    assert c < zero < a
    assert a - zero == pytest.approx(-4 * (c - zero), abs=0.5)


def test_forest_plots_of_one_span_put_equal_values_at_equal_positions() -> None:
    first, second = [Estimate("A", 1.0, 0.5, 1.5, "", True)], [Estimate("A", 1.0, -9.0, 9.0, "", False)]
    span = reach([*first, *second])
    assert span == (-9.0, 9.0)
    positions = [centres(Forest("t", "u", span, items), "point") for items in (first, second)]
    assert positions[0] == positions[1]
    assert reach(first) == (0.0, 1.5)


def test_every_figure_has_a_title_and_says_its_numbers_in_words() -> None:
    said = {"forest": "A & <B> $x$: +2", "curves": "A<b>: from 3 to 5", "histograms": "A<b>, 3 from 0 to 2"}
    for kind, chart in CHARTS.items():
        root = parsed(chart)
        assert root.attrib["role"] == "img"
        assert root.findtext("title") == root.attrib["aria-label"] == "F & G"
        assert said[kind] in str(root.findtext("desc"))


@pytest.mark.parametrize("kind", sorted(CHARTS))
def test_a_figure_of_the_page_takes_its_colours_and_type_from_the_page_and_refers_to_nothing(kind: str) -> None:
    text = inline_svg(CHARTS[kind])
    assert not re.search(r"#[0-9a-fA-F]{3}|font-family|<style|<use|<defs| id=|url\(|http", text)
    assert "A &amp; &lt;B&gt; $x$" in text or kind != "forest"


def test_a_page_has_both_palettes_and_each_colour_one_name() -> None:
    light, _, dark = render("style.css").partition("@media")
    for style, palette in ((light, PALETTE), (dark, DARK)):
        variables = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style))
        assert {name: variables[name] for name in palette} == palette
    assert len(set(PALETTE.values())) == len(PALETTE) == len(DARK)


def test_curves_are_interrupted_where_a_value_is_not_finite() -> None:
    points = [(1.0, 1.0), (2.0, float("nan")), (3.0, 2.0), (4.0, 3.0)]
    curve = Curve("A", 0, points, points, [(4, float("inf")), (2, 2.0)])
    chart = Curves("t", "x", [curve])
    (drawn,) = (path.attrib["d"] for path in parsed(chart).iter("path") if path.attrib.get("class") == "smooth")
    assert drawn.count("l") == 1  # from 2.0 to 3.0 alone
    assert "nan" not in inline_svg(chart)
    assert len(paths(chart, "mark")) == 1
    assert curve.is_drawable
    assert not Curve("A", 0, [(1, float("nan"))], [], []).is_drawable


def test_bars_are_as_high_as_their_counts_and_the_bounds_are_drawn() -> None:
    chart = Histograms("t", "weight", [Bars("A", "chosen", [10, 0, 5], [0, 1, 2, 3], [0.5, 3.0])])
    ((*corners,),) = paths(chart, "bars")
    bottom = max(y for _, y in corners)
    first = [y for x, y in corners if x < 130]
    last = [y for x, y in corners if x > 230]
    assert bottom - min(first) == pytest.approx(2 * (bottom - min(last)), abs=0.2)
    assert len(paths(chart, "bound")) == 2
    assert inline_svg(Histograms("t", "w", [Bars("A", "chosen", [0], [1, 1], [])]))


def test_lines_beyond_the_colours_are_dashed() -> None:
    assert [style_class(number) for number in (0, 7, 8, 16)] == ["s0", "s7", "s0 dash", "s0"]


def test_files_of_a_figure_repeat_byte_by_byte_and_hold_title_and_legend(tmp_path: Path) -> None:
    charts = [Named(kind, chart) for kind, chart in CHARTS.items()]
    first, second = (write_figures(charts, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first[:3]] == ["forest.svg", "forest.pdf", "forest.png"]
    assert len(first) == 9
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    starts = {".pdf": b"%PDF-", ".png": b"\x89PNG"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in first if path.suffix in starts)
    alone = [inline_svg(chart).count("<path") for chart in CHARTS.values()]
    as_file = [path.read_text(encoding="utf-8").count("<path") for path in first if path.suffix == ".svg"]
    assert all(more > fewer for more, fewer in zip(as_file, alone, strict=True))


def test_a_name_in_any_script_is_drawn_without_a_warning(tmp_path: Path) -> None:
    items = [Estimate("学生 β ½", 1.0, 0.5, 1.5, "+1", True)]
    chart = Forest("学生", "points", reach(items), items)
    assert "学生 β ½" in inline_svg(chart)
    assert write_figures([Named("a", chart)], tmp_path)


def test_matplotlib_is_imported_when_a_figure_is_drawn_and_never_with_pyplot() -> None:
    code = (
        "import sys, harness.comparison; before = 'matplotlib' in sys.modules\n"
        "from harness.charts import *; from harness.figures import inline_svg\n"
        "inline_svg(Histograms('t', 'w', [Bars('A', 'chosen', [1], [0, 1], [])]))\n"
        "print(before, 'matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ["False", "False"]


def test_a_path_of_lines_is_written_by_the_steps_between_its_points() -> None:
    """Rounded where they are, so that no error adds up; curves, in other letters, stay as they are."""
    assert _path("M 10.04 20 \nL 12.06 19.94 \nL 12.06 25 \nz") == "M10 20l2.1 -0.1l0 5.1z"
    assert _path("M 0.333333 0 L 0.666666 0 L 1 0 M 5 5 L 4 4") == "M0.3 0l0.4 0l0.3 0M5 5l-1 -1"
    assert _path("M 1.26 2 C 1.26 2 3.04 4 5 6") == "M 1.3 2 C 1.3 2 3 4 5 6"
