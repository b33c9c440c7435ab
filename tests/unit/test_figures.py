"""Figures from numbers: marks stand where the numbers are, words say the same, and nothing breaks on odd numbers."""

import re
from xml.etree import ElementTree

import pytest

from harness.figures import (
    Bars,
    Curve,
    Estimate,
    Scale,
    curves,
    forest,
    histograms,
    reach,
    style_class,
    tick_text,
    ticks,
)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def places(svg: str, kind: str) -> list[float]:
    return [float(mark.attrib["cx"]) for mark in parsed(svg).iter("circle") if kind in mark.attrib["class"].split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-20, 48, [-20, 0, 20, 40]), (3, 3, [3]), (0, 92, [0, 20, 40, 60, 80])],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_have_a_true_minus_sign() -> None:
    assert [tick_text(value) for value in (-0.5, 0.0, 1e-7)] == ["−0.5", "0", "1e−07"]


def test_a_scale_is_linear_and_one_without_extent_does_not_divide_by_zero() -> None:
    scale = Scale(-1, 1, 0, 100)
    assert [scale(-1), scale(0), scale(1)] == [0, 50, 100]
    assert Scale(2, 2, 5, 9)(2) == 5


def test_a_forest_plot_sets_points_in_order_and_tells_intervals_that_leave_out_zero() -> None:
    items = [
        Estimate("A & B", 2.0, 1.0, 3.0, "+2"),
        Estimate("C", -0.5, -2.0, 1.0, "−0.5"),
        Estimate("D", -4, -5, -3, "−4"),
    ]
    svg = forest(items, title="Average", unit="points")
    assert len(places(svg, "clear")) == 2
    assert len(places(svg, "open")) == 1
    a, c, d = places(svg, "point")
    assert d < c < a
    zero = next(float(re.match(r"M([\d.]+)", p.attrib["d"])[1]) for p in parsed(svg).iter("path") if p.attrib["class"] == "zero")  # type: ignore[index]  # fmt: skip
    assert c < zero < a


def test_forest_plots_of_one_span_put_equal_values_at_equal_places() -> None:
    first, second = [Estimate("A", 1.0, 0.5, 1.5, "")], [Estimate("A", 1.0, -9.0, 9.0, "")]
    span = reach([*first, *second])
    assert span == (-9.0, 9.0)
    assert places(forest(first, title="t", unit="u", span=span), "point") == places(
        forest(second, title="t", unit="u", span=span), "point"
    )
    assert reach(first) == (0.0, 1.5)


def test_every_figure_has_a_title_and_says_its_numbers_in_words() -> None:
    figures = {
        "forest": forest([Estimate("A<b>", 1, 0, 2, "+1 [0, 2]")], title="F & G", unit="points"),
        "curves": curves([Curve("A<b>", 0, [(1, 3.0)], [(1, 3.0), (2, 5.0)], [])], title="F & G", x_label="step", y_label="Loss"),
        "histograms": histograms([Bars("A<b>", "chosen", [1, 2], [0, 1, 2], [])], title="F & G", x_label="weight"),
    }  # fmt: skip
    said = {"forest": "A<b>: +1 [0, 2]", "curves": "A<b>: from 3 to 5", "histograms": "A<b>, 3 from 0 to 2"}
    for kind, svg in figures.items():
        root = parsed(svg)
        assert root.attrib["role"] == "img"
        assert root.findtext("title") == root.attrib["aria-label"] == "F & G"
        assert said[kind] in str(root.findtext("desc"))


def test_curves_are_interrupted_where_a_value_is_not_finite() -> None:
    points = [(1.0, 1.0), (2.0, float("nan")), (3.0, 2.0), (4.0, 3.0)]
    svg = curves([Curve("A", 0, points, points, [(4, float("inf")), (2, 2.0)])], title="t", x_label="x", y_label="y")
    line = next(path.attrib["d"] for path in parsed(svg).iter("path") if "line" in path.attrib["class"].split())
    assert (line.count("M"), line.count("L")) == (2, 1)
    assert "nan" not in svg
    assert len(places(svg, "mark")) == 1
    with pytest.raises(ValueError, match="nothing to draw"):
        curves([Curve("A", 0, [(1, float("nan"))], [], [])], title="t", x_label="x", y_label="y")


def test_bars_are_as_high_as_their_counts_and_the_bounds_are_drawn() -> None:
    svg = histograms([Bars("A", "chosen", [10, 0, 5], [0, 1, 2, 3], [0.5, 3.0])], title="t", x_label="weight")
    (bars,) = (path.attrib["d"] for path in parsed(svg).iter("path") if "bars" in path.attrib["class"])
    (bottom, high), (_, half) = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)H", bars)
    assert float(bottom) - float(high) == pytest.approx(2 * (float(bottom) - float(half)))
    assert sum(path.attrib["class"] == "bound" for path in parsed(svg).iter("path")) == 2
    assert histograms([Bars("A", "chosen", [0], [1, 1], [])], title="t", x_label="w")


def test_lines_beyond_the_colours_are_dashed() -> None:
    assert [style_class(number) for number in (0, 7, 8, 16)] == ["s0", "s7", "s0 dash", "s0"]
