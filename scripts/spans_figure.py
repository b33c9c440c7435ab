"""Draw the README's figure: one text in the tokens of two models, and the spans that both share.

`python scripts/spans_figure.py` writes `docs/spans.svg`. The ends of the tokens are those of docs/method.md#a-worked-example.
"""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctpd import align_spans
from ctpd.text.mismatch import SPAN_TYPES, span_types
from harness.drawing import PALETTE, axes_of, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT = "Wolfgang Amadeus Mozart composed 626 works."
TEACHER = 4, 8, 11, 16, 23, 32, 33, 34, 35, 36, 42, 43  # where Gemma 3's tokens end, in characters
STUDENT = 1, 3, 8, 11, 14, 16, 23, 32, 33, 36, 42, 43  # where Llama 3.1's do
COLOURS = {"1:1": "#8a9099", "1:n": PALETTE["s0"], "n:1": PALETTE["s2"], "n:m": PALETTE["s1"]}
WIDTH, HEIGHT = 800, 188  # points
TEACHER_Y, TEXT_Y, STUDENT_Y, TYPES_Y = 3.0, 1.92, 0.84, -0.12  # the middle of each row
BOX = 0.62  # the height of a token
FILE = Path(__file__).resolve().parents[1] / "docs" / "spans.svg"


def spans() -> list[tuple[int, int, str]]:
    """Begin, end and type of each span."""
    teacher, student = (list(pairwise((0, *ends))) for ends in (TEACHER, STUDENT))
    aligned = align_spans(teacher, student, len(TEXT))
    kinds = [SPAN_TYPES[i] for i in span_types(np.bincount(aligned.teacher_span), np.bincount(aligned.student_span))]
    borders = pairwise((0, *map(int, aligned.boundaries)))
    return [(begin, end, kind) for (begin, end), kind in zip(borders, kinds, strict=True)]


def draw_tokens(axes: "Axes", name: str, ends: tuple[int, ...], y: float, *, index_y: float) -> None:
    """A row of boxes, with the index of each token above or below."""
    axes.text(-0.7, y, name, ha="right", va="center", size=12, color=PALETTE["ink"])
    axes.text(-0.7, index_y, "index of the token", ha="right", va="center", size=7.5, color=PALETTE["muted"])
    kinds = {begin: kind for first, last, kind in spans() for begin in range(first, last)}
    for index, (begin, end) in enumerate(pairwise((0, *ends))):
        colour = COLOURS[kinds[begin]]
        draw_box(axes, begin, end, y, colour)
        axes.text((begin + end) / 2, index_y, str(index), ha="center", va="center", size=7.5, color=PALETTE["muted"])
    draw_characters(axes, y)


def draw_box(axes: "Axes", begin: int, end: int, y: float, colour: str) -> None:
    """One token."""
    from matplotlib.patches import FancyBboxPatch

    corner, size = (begin + 0.07, y - BOX / 2), (end - begin - 0.14, BOX)
    shape = FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.12", mutation_aspect=0.28)
    shape.set(facecolor=(*_rgb(colour), 0.16), edgecolor=colour, linewidth=1.1)
    axes.add_patch(shape)


def draw_characters(axes: "Axes", y: float) -> None:
    """The text, a character a unit; spaces are marked."""
    for index, character in enumerate(TEXT):
        shown, colour = ("\N{OPEN BOX}", "muted") if character == " " else (character, "ink")
        style = {"ha": "center", "va": "center", "size": 12.5, "family": "DejaVu Sans Mono"}
        axes.text(index + 0.5, y, shown, style, color=PALETTE[colour])


def draw_borders(axes: "Axes") -> None:
    """Lines through all rows where both models end a token; short ones where one of them does."""
    shared = {end for _, end, _ in spans()}
    middle = TEXT_Y
    for end in shared - {len(TEXT)}:
        axes.plot([end, end], [STUDENT_Y - BOX / 2, TEACHER_Y + BOX / 2], color=PALETTE["ink"], linewidth=0.9)
    for ends, y in ((TEACHER, TEACHER_Y - BOX / 2), (STUDENT, STUDENT_Y + BOX / 2)):
        for end in set(ends) - shared:
            stop = middle + (0.3 if y > middle else -0.3)
            axes.plot([end, end], [y, stop], color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (2, 1.6)))


def draw_spans(axes: "Axes") -> None:
    """The text between the two rows in its spans, and the type of each below."""
    for label, y in (("text", TEXT_Y), ("span", TYPES_Y)):
        axes.text(-0.7, y, label, ha="right", va="center", size=12, color=PALETTE["ink"])
    draw_characters(axes, TEXT_Y)
    for begin, end, kind in spans():
        axes.fill_between([begin, end], TEXT_Y - 0.28, TEXT_Y + 0.28, color=COLOURS[kind], alpha=0.2, linewidth=0)
        colour, weight = (PALETTE["muted"], "normal") if kind == "1:1" else (COLOURS[kind], "bold")
        axes.text((begin + end) / 2, TYPES_Y, kind, ha="center", va="center", size=9.5, color=colour, weight=weight)


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def draw(path: Path) -> None:
    """Write the figure."""
    import matplotlib

    figure = sheet(HEIGHT, None, width=WIDTH)
    axes = axes_of(figure, left=106, right=14, height=HEIGHT - 12, below=6)
    axes.set(xlim=(0, len(TEXT)), ylim=(-0.45, 3.75))
    draw_spans(axes)
    draw_borders(axes)
    draw_tokens(axes, "Gemma 3", TEACHER, TEACHER_Y, index_y=TEACHER_Y + 0.5)
    draw_tokens(axes, "Llama 3.1", STUDENT, STUDENT_Y, index_y=STUDENT_Y - 0.46)
    with matplotlib.rc_context({"svg.hashsalt": "ctpd", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(FILE)
    print(FILE)
