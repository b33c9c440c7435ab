"""A finished table as text: Markdown, LaTeX, CSV, HTML and plain. Scores become percentages here."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ctpd.core.printing import one_line, printable, printable_lines
from harness import html, latex
from harness.files import file_stem
from harness.footnotes import PARTIAL_MARK
from harness.published import Published
from harness.sheet import AVERAGE, Cell, Rank, Row, Table
from harness.statistics import Interval

MISSING = "missing"
NOT_FINITE = "not finite"
NOTHING = "–"

REPORTED = "(published)"
"""Marks a row of others among ours."""
NOT_OURS = "Reported by others; not our measurements."
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a spreadsheet takes for the beginning of a formula
LEGEND = "Bold: best of the column; underlined: second."


class View(NamedTuple):
    """A table as all formats show it: its header, its cells with their ranks, its caption and its notes."""

    caption: str
    header: list[str]
    rows: list[list["Styled"]]
    notes: tuple[str, ...]
    published: Published | None
    not_ours: str = NOT_OURS


class Details(NamedTuple):
    """A table of further numbers, as text."""

    header: list[str]
    rows: list[list[str]]


class Styled(NamedTuple):
    """Text of a cell and its rank: 1 for the best of its column, 2 for the second, else None."""

    text: str
    rank: int | None = None


def frame(table: Table) -> pd.DataFrame:
    """The table as numbers, in percent and percentage points: one line per row, empty where nothing was measured."""
    lines = []
    for row in table.rows:
        line: dict[str, object] = {
            "row": row.label,
            "run": row.run,
            "seeds": " ".join(str(seed) for seed in row.seeds if seed is not None),
            "missing_seeds": " ".join(map(str, row.missing_seeds)),
        }
        for name, cell in zip((*table.columns, AVERAGE), row.cells, strict=True):
            line[name] = None if cell is None or cell.mean is None else 100 * cell.mean
            line[f"{name} std"] = None if cell is None or cell.spread is None else 100 * cell.spread
        for end in ("value", "low", "high"):
            name = "difference" if end == "value" else f"difference {end}"
            line[name] = None if row.difference is None else 100 * getattr(row.difference, end)
        line["difference to"] = table.base_label
        line["paired seeds"] = " ".join(str(seed) for seed in row.paired_seeds if seed is not None)
        line["p (Holm)"] = row.p_value
        for end in ("low", "high"):
            line[f"given the seeds {end}"] = None if row.given_seeds is None else 100 * getattr(row.given_seeds, end)
        for name, ranks in zip((*table.columns, AVERAGE), row.ranks or [None] * len(row.cells), strict=True):
            for end in ("value", "low", "high"):
                key = f"{name} rank" if end == "value" else f"{name} rank {end}"
                line[key] = None if ranks is None else getattr(ranks, end)
        for end in ("value", "low", "high"):
            name = "difference to start" if end == "value" else f"difference to start {end}"
            line[name] = None if row.start is None else 100 * getattr(row.start.difference, end)
        line["marks"] = " ".join(row.marks)
        for name, tests in (row.mcnemar or {}).items():
            for seed, test in tests.items():
                line[f"{name} McNemar p (Holm)" + ("" if seed is None else f", seed {seed}")] = test.p_value
        line["partial columns"] = " ".join(table.partial)
        line["unhealthy"] = "; ".join(row.faults)
        lines.append(line)
    return pd.DataFrame(lines)


def json_rows(table: Table) -> list[dict[str, object]]:
    """The same for JSON, which knows no NaN: null where nothing was measured."""
    lines = frame(table).to_dict(orient="records")
    return [{str(name): None if pd.isna(value) else value for name, value in line.items()} for line in lines]


def to_csv(table: Table) -> str:
    """Our numbers only, at four decimals: published ones are never merged with ours.

    A name that a spreadsheet would take for a formula has a quote before it.
    """
    lines = frame(table).rename(columns=_no_formula)
    texts = lines.apply(lambda column: column.map(lambda cell: _no_formula(cell) if isinstance(cell, str) else cell))
    return printable_lines(str(texts.to_csv(index=False, float_format="%.4f", lineterminator="\n")))


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_markdown(table: Table) -> str:
    """A pipe table with its caption above and its footnotes below; published numbers in a table of their own."""
    header, rows = _grid(table)
    body = [[_mark(cell, _markdown) for cell in row] for row in rows]
    lines = [f"**{_markdown(_caption(table))}**", "", *_pipe_table(header, body)]
    lines += ["", *(f"- {_markdown(note)}" for note in (LEGEND, *table.footnotes))]
    if (published := table.published) is not None:
        lines += ["", f"**{_markdown(published.caption)}**", "", f"*{NOT_OURS}*", ""]
        lines += _pipe_table(published.header, [[_markdown(cell) for cell in row] for row in published.rows])
        lines += ["", *(f"- {_markdown(note)}" for note in published.notes)]
    return "\n".join(lines).rstrip() + "\n"


def to_latex(table: Table) -> str:
    """A ``table`` environment with booktabs rules. The file can be input into a paper, and compiles alone as well."""
    header, rows = _grid(table)
    body = [[_mark(cell, latex.escape, best=r"\textbf{%s}", second=r"\underline{%s}") for cell in row] for row in rows]
    lines = [*latex.tabular(header, body), *latex.notes((LEGEND, *table.footnotes))]
    if (published := table.published) is not None:
        heading = latex.escape(f"{published.caption}. {NOT_OURS}")
        lines += [r"\par\medskip", rf"\textit{{{heading}}}", r"\par\smallskip"]
        lines += latex.tabular(published.header, [[latex.escape(cell) for cell in row] for row in published.rows])
        lines += latex.notes(published.notes)
    return latex.table(lines, caption=_caption(table), label=table.spec.name)


def to_html(table: Table) -> str:
    """A page of its own, in the dress of the report: no script, no other file."""
    return printable_lines(html.render("table_page.html", title=_caption(table), table=view(table)))


def to_text(table: Table) -> str:
    """Aligned columns for a terminal: ``*`` marks the best of a column, ``+`` the second."""
    header, rows = _grid(table)
    body = [[printable(cell.text) + {1: " *", 2: " +"}.get(cell.rank or 0, "  ") for cell in row] for row in rows]
    lines = [_caption(table), "", *_aligned([f"{printable(name)}  " for name in header], body), ""]
    lines += _wrapped(("* Best of the column, + second.", *table.footnotes))
    if (published := table.published) is not None:
        lines += ["", f"{published.caption}. {NOT_OURS}", ""]
        lines += [*_aligned(published.header, published.rows), "", *_wrapped(published.notes)]
    return printable_lines("\n".join(lines).rstrip() + "\n")


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "md": to_markdown,
    "csv": to_csv,
    "tex": to_latex,
    "html": to_html,
    "txt": to_text,
}
"""By the suffix of the file."""


WRITTEN = ("md", "csv", "tex", "html")
"""The formats that are written to files."""


def write_table(table: Table, directory: Path, *, formats: Sequence[str] = WRITTEN) -> list[Path]:
    """Write a file for each format, named by the table (``file_stem``), and return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{file_stem(table.spec.name)}.{suffix}" for suffix in formats]
    for suffix, path in zip(formats, paths, strict=True):
        path.write_text(FORMATS[suffix](table), encoding="utf-8", newline="\n")
    return paths


def _caption(table: Table) -> str:
    caption = table.spec.caption.rstrip(".")
    return f"{caption} (partial: a part of the documents)" if table.partial else caption


def view(table: Table) -> View:
    """A table as all formats show it, before any escaping."""
    header, rows = _grid(table)
    return View(_caption(table), header, rows, (LEGEND, *table.footnotes), table.published)


def _grid(table: Table) -> tuple[list[str], list[list[Styled]]]:
    """Header and cells."""
    names = [f"{name} {PARTIAL_MARK}" if name in table.partial else name for name in table.columns]
    header = ["", *names, f"{AVERAGE} {PARTIAL_MARK}" if table.partial else AVERAGE]
    compared = any(row.difference is not None for row in table.rows)
    with_seeds = any(seed is not None for row in table.rows for seed in row.seeds)
    ranked = any(row.ranks for row in table.rows)
    header += [f"{AVERAGE} vs. {table.base_label} [95 %]", "p (Holm)"] if compared else []
    header += ["Rank [95 %]"] if ranked else []
    header += ["Seeds"] if with_seeds else []
    rows = []
    for row in table.rows:
        cells = [Styled(row.title), *(_score(cell, row) for cell in row.cells)]
        if compared:
            p_value = p_text(row.p_value, is_bound=row.p_is_bound)
            cells += [Styled(percent_interval(row.difference)), Styled(p_value)]
        cells += [Styled(rank_text(row.ranks[-1] if row.ranks else None))] if ranked else []
        cells += [Styled(_seeds(row))] if with_seeds else []
        rows.append(cells)
    for reported in table.reported:
        scores = [Styled(NOTHING if score is None else f"{score:.2f}") for score in reported.scores]
        cells = [Styled(f"{reported.label} {REPORTED}"), *scores]
        rows.append([*cells, *[Styled(NOTHING)] * (len(header) - len(cells))])
    return header, rows


def _score(cell: Cell | None, row: Row) -> Styled:
    if cell is None:
        return Styled(MISSING)
    if cell.unmeasured:
        return Styled(NOTHING)
    if cell.mean is None:
        return Styled(NOT_FINITE)
    text = f"{100 * cell.mean:.2f}" + (f" ± {100 * cell.spread:.2f}" if cell.spread is not None else "")
    if cell.num_seeds < len(row.seeds):
        text += f" ({cell.num_seeds} of {len(row.seeds)})"
    return Styled(text, cell.rank)


def percent_interval(interval: Interval | None) -> str:
    """A difference in percentage points, signed, with the ends of its interval."""
    if interval is None:
        return NOTHING
    value, low, high = (_signed(100 * end) for end in interval)
    return f"{value} [{low}, {high}]"


def rank_text(rank: Rank | None) -> str:
    """A rank with the first and the last that the row may have."""
    return NOTHING if rank is None else f"{rank.value} [{rank.low}–{rank.high}]"


def details(table: Table) -> Details | None:
    """Ranks by column, the difference to the start, and the interval over documents alone; None without any of them."""
    rows = [row for row in table.rows if row.ranks or row.start is not None or row.given_seeds is not None]
    if not rows:
        return None
    ranked = any(row.ranks for row in rows)
    started = any(row.start is not None for row in rows)
    compared = any(row.given_seeds is not None for row in rows)
    header = ["", *(f"Rank: {name} [95 %]" for name in (*table.columns, AVERAGE) if ranked)]
    header += [f"{AVERAGE} vs. its start [95 %]"] if started else []
    header += [f"{AVERAGE} vs. {table.base_label}, given the seeds [95 %]"] if compared else []
    lines = []
    for row in rows:
        line = [row.title]
        line += [rank_text(rank) for rank in row.ranks or [None] * len(row.cells)] if ranked else []
        line += [percent_interval(None if row.start is None else row.start.difference)] if started else []
        line += [percent_interval(row.given_seeds)] if compared else []
        lines.append(line)
    return Details(header, lines)


def _signed(points: float) -> str:
    """Two decimals with their sign; what rounds to zero has none."""
    text = f"{points:+.2f}".replace("-", "−")
    return text if float(f"{points:.2f}") else "0.00"


def p_text(p_value: float | None, *, is_bound: bool = False) -> str:
    """A p-value at three decimals; ``is_bound`` where it is only known to be no larger."""
    if p_value is None:
        return NOTHING
    if p_value < 0.001:
        return "< 0.001"
    return f"≤ {p_value:.3f}" if is_bound else f"{p_value:.3f}"


def _seeds(row: Row) -> str:
    if row.missing or row.seeds == (None,):
        return NOTHING
    if not row.missing_seeds:
        return str(len(row.seeds))
    return f"{len(row.seeds)} of {len(row.seeds) + len(row.missing_seeds)}"


def _mark(cell: Styled, escape: Callable[[str], str], *, best: str = "**%s**", second: str = "<ins>%s</ins>") -> str:
    text = escape(cell.text)
    return best % text if cell.rank == 1 else second % text if cell.rank == 2 else text


def _pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line([_markdown(name) for name in header]), line(["---", *["---:"] * (len(header) - 1)]), *map(line, rows)]


def _markdown(text: str) -> str:
    r"""Text on one line as Markdown shows it literally; text between two backticks stays code.

    Escaped are `\`, `|`, `*`, `<`, `~`, and where they would mean something `_`, `&` and the end of a link's text.
    """
    shown = printable_lines(one_line(text))
    return re.sub(r"[\\|*<~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|\](?=[(\[:])", r"\\\g<0>", shown)


def _wrapped(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, width=100, subsequent_indent="  ")]


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return [line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)]


def view_text(shown: View, kind: str, *, name: str) -> str:
    """A view without published numbers as Markdown, LaTeX, HTML or plain text; CSV is made of numbers.

    Args:
        shown: the table.
        kind: a key of ``FORMATS``.
        name: stem of its file.
    """
    caption, header, rows, notes, *_ = shown
    if kind == "md":
        body = [[_mark(cell, _markdown) for cell in row] for row in rows]
        lines = [f"**{_markdown(caption)}**", "", *_pipe_table(header, body), ""]
        return "\n".join([*lines, *(f"- {_markdown(note)}" for note in notes)]) + "\n"
    if kind == "tex":
        body = [[_mark(cell, latex.escape, best=r"\textbf{%s}") for cell in row] for row in rows]
        return latex.table([*latex.tabular(header, body), *latex.notes(notes)], caption=caption, label=name)
    if kind == "html":
        return printable_lines(html.render("table_page.html", title=caption, table=shown))
    body = [[printable(cell.text) + {1: " *"}.get(cell.rank or 0, "") for cell in row] for row in rows]
    lines = [caption, "", *_aligned([printable(name) for name in header], body), "", *_wrapped(notes)]
    return printable_lines("\n".join(lines).rstrip() + "\n")


def frame_csv(lines: pd.DataFrame) -> str:
    """Numbers at four decimals; a name that a spreadsheet would take for a formula has a quote before it."""
    lines = lines.rename(columns=_no_formula)
    texts = lines.apply(lambda column: column.map(lambda cell: _no_formula(cell) if isinstance(cell, str) else cell))
    return printable_lines(str(texts.to_csv(index=False, float_format="%.6g", lineterminator="\n")))
