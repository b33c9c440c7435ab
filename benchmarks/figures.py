"""Figures as SVG files that stand alone: bars with their spread and bound, and curves over logarithmic axes."""

import html
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from harness.charts import number_text

WIDTH = 720
LABEL = 360
"""Width of the labels beside bars."""
_STYLE = """
svg { --paper: #fdfdfb; --ink: #1d1f23; --muted: #5f646d; --faint: #e7e7e2; --s0: #1f5fa8; --s1: #c2570c; --s2: #2b8050;
  --s3: #a3346f; --s4: #6a51b5; --s5: #8a6d00; --s6: #197d8c; --s7: #6b6b6b; font: 13px system-ui, "Segoe UI", Roboto,
  "Noto Sans", "Liberation Sans", sans-serif; }
@media screen and (prefers-color-scheme: dark) { svg { --paper: #16181c; --ink: #e6e6e3; --muted: #a2a7b0; --faint: #2a2e35;
  --s0: #7fb2ee; --s1: #f0a15e; --s2: #6fc593; --s3: #e58ab9; --s4: #b3a0f0; --s5: #d8bd55; --s6: #62c6d4; --s7: #b0b0b0; } }
.paper { fill: var(--paper); } text { fill: var(--ink); } .number { fill: var(--muted); font-size: 12px; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .title { font-size: 15px; font-weight: 600; }
path { fill: none; } .grid { stroke: var(--faint); } .axis { stroke: var(--muted); } .bound { stroke: var(--ink); stroke-width: 2; }
.whisker { stroke: var(--ink); stroke-width: 1.5; } .line { stroke-width: 2; } .dash { stroke-dasharray: 5 3; }
""" + "".join(
    f"rect.s{n}, text.s{n} {{ fill: var(--s{n}); }} circle.s{n} {{ fill: var(--paper); stroke: var(--s{n}); stroke-width: 2; }} "
    f"path.s{n} {{ stroke: var(--s{n}); }}\n"
    for n in range(8)
)


class Scale(NamedTuple):
    """From a value to a position: ``first`` is shown at ``start`` and ``last`` at ``end``."""

    first: float
    last: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The position of a value, to a tenth of a unit."""
        share = (value - self.first) / ((self.last - self.first) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round values inside [low, high], about so many: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


class Bar(NamedTuple):
    """One bar: the median, the least and the greatest value, and a bound where one was promised."""

    label: str
    values: Sequence[float]
    bound: float | None = None
    style: int = 0


class Line(NamedTuple):
    """Measured points (x, y), both above 0, joined by a line."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dashed: bool = False


def bars(rows: Sequence[Bar], *, title: str, unit: str) -> str:
    """Horizontal bars from 0; whiskers from the least to the greatest value, a bold mark at a bound.

    Raises:
        ValueError: no bar.
    """
    if not rows:
        raise ValueError("there is nothing to draw")
    top = max(max([*bar.values, bar.bound or 0.0]) for bar in rows)
    x = Scale(0, 1.02 * top or 1.0, LABEL, WIDTH - 70)
    bottom = 44 + 26 * len(rows)
    body = [f'<path class="grid" d="M{x(t)} 40V{bottom}"/>' for t in ticks(x.first, x.last)]
    for number, bar in enumerate(rows):
        y = 46 + 26 * number
        low, middle, high = min(bar.values), statistics.median(bar.values), max(bar.values)
        body.append(_text(LABEL - 8, y + 13, bar.label, "end"))
        body.append(
            f'<rect class="s{bar.style % 8}" x="{LABEL}" y="{y}" width="{max(x(middle) - LABEL, 0.5):g}" height="18" rx="2"/>'
        )
        if high > low:
            body.append(
                f'<path class="whisker" d="M{x(low)} {y + 5}v8M{x(high)} {y + 5}v8M{x(low)} {y + 9}H{x(high)}"/>'
            )
        if bar.bound is not None:
            body.append(f'<path class="bound" d="M{x(bar.bound)} {y - 2}v22"/>')
        body.append(_text(x(max(high, bar.bound or 0.0)) + 6, y + 13, f"{float(f'{middle:.3g}'):,.6g}", "number"))
    body.append(f'<path class="axis" d="M{LABEL} {bottom}H{x.end}"/>')
    body += [_text(x(t), bottom + 16, number_text(t), "number middle") for t in ticks(x.first, x.last)]
    body.append(_text((x.start + x.end) / 2, bottom + 34, unit, "number middle"))
    words = "; ".join(f"{bar.label}: {', '.join(f'{v:.3g}' for v in bar.values)}" for bar in rows)
    return _svg(bottom + 46, title, f"{unit}. {words}.", body)


def log_lines(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Curves over two logarithmic axes, labelled at their ends.

    Raises:
        ValueError: a point is not above 0, or there is none.
    """
    points = [point for line in lines for point in line.points]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError("logarithmic axes need points above 0")
    x = _log_scale([p[0] for p in points], 60, WIDTH - 190)
    y = _log_scale([p[1] for p in points], 300, 50)
    body = []
    for tick in _round_numbers(y):
        body.append(f'<path class="grid" d="M60 {y(math.log2(tick))}H{x.end}"/>')
        body.append(_text(54, y(math.log2(tick)) + 4, number_text(tick), "number end"))
    for tick in sorted({p[0] for p in points}):
        body.append(_text(x(math.log2(tick)), 318, f"{tick:,.6g}", "number middle"))
    labels: list[float] = []
    for line in lines:
        places = [(x(math.log2(px)), y(math.log2(py))) for px, py in line.points]
        path = "M" + "L".join(f"{px} {py}" for px, py in places)
        body.append(f'<path class="line s{line.style % 8}{" dash" if line.dashed else ""}" d="{path}"/>')
        body += [f'<circle class="s{line.style % 8}" cx="{px}" cy="{py}" r="3.5"/>' for px, py in places]
        place = places[-1][1] + 4
        while any(abs(place - other) < 15 for other in labels):
            place += 1
        labels.append(place)
        body.append(_text(places[-1][0] + 8, place, line.label, f"s{line.style % 8}"))
    body.append(f'<path class="axis" d="M60 300H{x.end}"/>')
    body.append(_text((x.start + x.end) / 2, 338, x_label, "number middle"))
    body.append(_text(12, 42, y_label, "number"))
    words = "; ".join(f"{line.label}: " + ", ".join(f"{px:g} {py:.3g}" for px, py in line.points) for line in lines)
    return _svg(350, title, f"{y_label} over {x_label}. {words}.", body)


def _log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    low, high = math.log2(min(values)), math.log2(max(values))
    return Scale(low - 0.1, max(high, low + 1) + 0.1, start, end)


def _round_numbers(scale: Scale) -> list[float]:
    """1, 2 and 5 times powers of ten inside the axis; on a long axis the powers alone."""
    first, last = (math.floor(math.log10(2) * end) for end in (scale.first, scale.last))
    factors = (1, 2, 5) if last - first < 3 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in found if scale.first <= math.log2(value) <= scale.last]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{html.escape(text)}</text>'


def _svg(height: float, title: str, description: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img">',
            f"<title>{html.escape(title)}</title>", f"<desc>{html.escape(description)}</desc>", f"<style>{_STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{height:g}"/>', _text(12, 24, title, "title"), *body, "</svg>", "",
        ]
    )  # fmt: skip
