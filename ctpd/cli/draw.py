"""What `ctpd inspect` prints: spans in colour, summaries, tables in Markdown, histograms of weights."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.text import Text

from ctpd.cli.terminal import columns, heading, indented, rendered, table
from ctpd.core.printing import printable

if TYPE_CHECKING:
    from ctpd.inspection.pairs import ShownPair
    from ctpd.inspection.templates import TemplateReport
    from ctpd.inspection.tokenizers import Comparison

COLOURS: Mapping[str, str] = {"1:1": "", "1:n": "cyan", "n:1": "yellow", "n:m": "magenta"}
_TYPE_MEANINGS = {
    "1:1": "one token each",
    "1:n": "one teacher token, several student tokens",
    "n:1": "several teacher tokens, one student token",
    "n:m": "several each",
}
_END = {False: "bold green", True: "red"}
_ROLES: Mapping[str | None, str] = {None: "dim", "system": "magenta", "user": "cyan", "assistant": "yellow"}
_SIDES = ("teacher", "student")
_BAR = " ▏▎▍▌▋▊▉█"
_HEIGHTS = " ▁▂▃▄▅▆▇█"
_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_NARROWEST, _WIDTH_OF_A_FILE = 40, 100  # columns
_LONGEST = 300  # characters of a conversation that are shown


def shown(text: str) -> str:
    """A token with its white space visible and without control characters."""
    return "".join(_MARKS.get(c, c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in text)


def spans(text: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Both sides' tokens of one text, the teacher's above the student's; `|` stands between the tokens of a span.

    Lines are wrapped between spans, at the terminal's width.
    """
    width = max(columns(_WIDTH_OF_A_FILE), _NARROWEST)
    lines = [heading(title)]
    rows = _new_rows()
    for span in text:
        cells = ["|".join(map(shown, span[side])) for side in _SIDES]
        size = max(map(cell_len, cells))
        if rows[0].cell_len + size > width and rows[0].cell_len > 2:
            lines += [*rows, Text()]
            rows = _new_rows()
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell, style=COLOURS[span["type"]]).append(" " * (size - cell_len(cell) + 1))
    return rendered(*lines, *rows, width=_widest([*lines, *rows]))


def _new_rows() -> tuple[Text, Text]:
    return Text("T "), Text("S ")


def _widest(lines: Sequence[Text]) -> int:
    return max(line.cell_len for line in lines) or 1


def pair(found: "ShownPair", *, number: int) -> str:
    """A pair as both models read it: the prompt's messages in the colour of their role, what is scored in green."""
    from ctpd.inspection.pairs import prompt_parts

    roles = Text(", ").join(Text(turn["role"], style=_ROLES[turn["role"]]) for turn in found.turns)
    rows: list[tuple[Text, ...]] = [(Text(), Text("roles"), roles)] if found.turns else []
    for role, sides in found.rows.items():
        chosen = next(iter(sides.values()))
        prompt = Text.assemble(*((shown(text), _ROLES[of]) for of, text in prompt_parts(chosen.prompt, found.turns)))
        rows.append((Text(role), Text("prompt"), prompt))
        for side, row in sides.items():
            text = Text(shown(row.response), style="green").append(shown(row.between), style="dim")
            text.append(
                " no end: the response was cut" if row.end is None else f" {shown(row.end)}",
                style=_END[row.end is None],
            )
            rows.append((Text(), Text(side), text))
            rows.append((Text(), Text(), Text(f"{row.tokens:,} tokens, {row.scored:,} scored", style="dim")))
    heads = ["", "", ""]
    return rendered(heading(f"pair {number}: {found.id} ({found.split})"), table(heads, rows))


def pair_legend() -> str:
    """What the colours of pairs mean."""
    roles = Text(", ").join(Text(role or "template", style=style) for role, style in _ROLES.items())
    parts = (
        Text("scored", style="green"),
        Text("end token, scored", style=_END[False]),
        Text.assemble("not scored: ", roles),
    )
    note = Text("Of each response the text and, after a space, the end token are scored; of the prompt nothing.")
    return rendered("", note, *([Text("   ").join(parts)] if sys.stdout.isatty() else []))


def legend() -> str:
    """What the colours mean."""
    parts = [Text.assemble((name, COLOURS[name]), " ", meaning) for name, meaning in _TYPE_MEANINGS.items()]
    return rendered(Text("   ").join(parts))


def summary(found: "Comparison", *, teacher: str, student: str) -> str:
    """Span types, tokens per span and fidelity, for a terminal."""
    counts, total = found.counts, found.counts["spans"]
    skipped = f"; {counts['skipped']:,} texts without tokens skipped" if counts["skipped"] else ""
    types = [
        (_coloured(name, name), f"{n:,}", _percent(n, total), _coloured(bar(n / total, 30), name))
        for name, n in found.types.items()
    ]
    tokens = [
        (
            side,
            f"{counts[f'{side}_tokens']:,}",
            f"{counts['characters'] / counts[f'{side}_tokens']:.2f}",
            f"{counts[f'{side}_tokens'] / total:.3f}",
            str(max(found.tokens_per_span[side])),
        )
        for side in _SIDES
    ]
    parts: list[RenderableType] = [
        heading(f"{teacher} -> {student}"),
        f"{counts['texts']:,} texts, {counts['characters']:,} characters, {total:,} spans{skipped}",
        "",
        heading("Span types (teacher first)"),
        indented(table(["", "", "", ""], types, right=(1, 2))),
        "",
        indented(
            table(
                ["Tokens", "number", "characters a token", "tokens a span", "most in a span"],
                tokens,
                right=(1, 2, 3, 4),
            )
        ),
        "",
        heading("Fidelity"),
        indented(table(["", ""], fidelity_lines(found))),
    ]
    return rendered(*parts, *_examples(found))


def _examples(found: "Comparison") -> list[Text]:
    lines = []
    for kind, cases in found.examples.items():
        shown_cases = "; ".join(
            f"{shown(case['text'])!r} (teacher {shown(case['teacher'])!r}, student {shown(case['student'])!r})"
            for case in cases[:2]
        )
        lines.append(Text(f"    e.g. {kind}: {shown_cases}"))
    return lines


def fidelity_lines(found: "Comparison") -> list[tuple[str, str]]:
    """Label and value of every line about fidelity; classes that do not occur are left out."""
    from ctpd.text.fidelity import EXCEPTIONS, FORGIVEN, MEANINGS

    total, characters = found.both["spans"], found.counts["characters"]
    lines = [("characters in a span", _percent(found.counts["covered"], characters))]
    for side in _SIDES:
        parts = [f"{_percent(n, characters)} {name.replace('_', ' ')}" for name, n in found.coverage[side].items() if n]
        lines.append((f"  {side}: covered by", ", ".join(parts)))
    equal, exact = found.both["equal"], found.both["equal_exactly"]
    lines.append(("spans that both sides spell alike, normalised", f"{_percent(equal, total)} ({total - equal:,} not)"))
    lines.append(("  byte for byte", f"{_percent(exact, total)} ({total - exact:,} not)"))
    for side in _SIDES:
        spelled = found.spelling[side]
        same = sum(spelled.get(name, 0) for name in FORGIVEN)
        lines.append((f"spans that the {side} spells as the text", f"{_percent(same, total)} ({total - same:,} not)"))
        lines += [
            (
                f"  {'but for ' if name in FORGIVEN else 'exception: '}{name.replace('_', ' ')}",
                f"{spelled[name]:,} ({MEANINGS[name]})",
            )
            for name in (*FORGIVEN[1:], *EXCEPTIONS)
            if spelled.get(name)
        ]
    return lines


def markdown(found: "Comparison", facts: Mapping[str, Any], *, teacher: str, student: str) -> str:
    """The mismatch of two tokenizers as tables."""
    total, counts = found.counts["spans"], found.counts

    def row(label: str, cells: Sequence[str]) -> str:
        return f"| {label} | {' | '.join(cells)} |"

    per_side = {
        "tokenizer": [f"`{teacher}`", f"`{student}`"],
        "model": [facts[s]["model"] for s in _SIDES],
        "normalizer": [facts[s]["normalizer"] or "none" for s in _SIDES],
        "vocabulary": [f"{facts[s]['tokens']:,}" for s in _SIDES],
        "of it spelled by a token of the other": [f"{100 * facts[s]['shared']:.1f} %" for s in _SIDES],
        "tokens": [f"{counts[f'{s}_tokens']:,}" for s in _SIDES],
        "characters a token": [f"{counts['characters'] / counts[f'{s}_tokens']:.2f}" for s in _SIDES],
        "tokens a span": [f"{counts[f'{s}_tokens'] / total:.3f}" for s in _SIDES],
    }
    head = ["| | teacher | student |", "| --- | ---: | ---: |"]
    lines = [*head, *(row(label, cells) for label, cells in per_side.items())]
    lines += ["", "| span type | spans | share | meaning |", "| --- | ---: | ---: | --- |"]
    lines += [row(name, [f"{n:,}", _percent(n, total), _TYPE_MEANINGS[name]]) for name, n in found.types.items()]
    lines += ["", "| tokens in a span | teacher | student |", "| --- | ---: | ---: |"]
    lines += [row(label, cells) for label, cells in sizes(found)]
    lines += ["", "| fidelity | |", "| --- | --- |"]
    lines += [row(label.replace("  ", "&ensp;"), [value]) for label, value in fidelity_lines(found)]
    skipped = f", {counts['skipped']:,} without tokens skipped" if counts["skipped"] else ""
    lines += [
        "",
        f"{counts['texts']:,} texts{skipped}, {counts['characters']:,} characters, {total:,} spans; bare text.",
    ]
    return "\n".join(lines)


def sizes(found: "Comparison", *, most: int = 5) -> list[tuple[str, list[str]]]:
    """Number of spans with 1, 2, ... and more tokens, of both sides."""
    lines = []
    for n in range(1, most + 1):
        is_last = n == most
        cells = [
            f"{sum(num for k, num in found.tokens_per_span[s].items() if k == n or (is_last and k > n)):,}"
            for s in _SIDES
        ]
        lines.append((f"{n} or more" if is_last else str(n), cells))
    return lines


def weights(title: str, found: Mapping[str, Any]) -> str:
    """One weights artifact: distribution, clamped shares, by position and by span type."""
    settings = found["settings"]
    auroc = "" if found["auroc"] is None else f"; AUROC of the log ratio {_value(found['auroc']['pooled'])}"
    parts: list[RenderableType] = [
        heading(title),
        f"{settings['strategy']}, {settings['granularity']}; k {settings['k']:g}, mu {settings['mu']:g}, clamped to "
        f"[{settings['lower']:g}, {settings['upper']:g}]; key {found['key'][:12]}",
        f"{found['units']:,} units without end spans, {100 * found['clamped_low']:.2f} % clamped low, "
        f"{100 * found['clamped_high']:.2f} % clamped high{auroc}",
        "",
    ]
    for side, part in found["sides"].items():
        if part["units"]:
            parts += _distribution(side, part)
    tenths = dict(zip(map(str, range(1, 11)), found["positions"], strict=True))
    parts += ["", _by("tenth of the response", tenths)]
    if "types" in found:
        parts += ["", _by("span type", found["types"])]
    return rendered(*parts)


def _distribution(side: str, part: Mapping[str, Any]) -> list[RenderableType]:
    edges = part["histogram"]["edges"]
    quantiles = "  ".join(f"{float(q) * 100:g} %: {v:.3f}" for q, v in part["quantiles"].items())
    return [
        f"{side:<9} mean {part['mean']:.3f}, standard deviation {part['std']:.3f}",
        f"  {edges[0]:.2f} {heights(part['histogram']['counts'])} {edges[-1]:.2f}",
        f"  {quantiles}",
    ]


def _by(head: str, rows: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """A table with a row for each group of units."""
    cells = []
    for label, row in rows.items():
        low, high = (None if row[name] is None else 100 * row[name] for name in ("clamped_low", "clamped_high"))
        cells.append(
            [
                f"{label:<22}",
                f"{row['units']:,}",
                *(_value(row[side]) for side in ("chosen", "rejected")),
                *(_value(share, 1) for share in (low, high)),
            ]
        )
    heads = [head, "units", "mean chosen", "mean rejected", "clamped low %", "high %"]
    return table(heads, cells, right=(1, 2, 3, 4, 5))


def bar(share: float, size: int) -> str:
    """A bar of at most ``size`` characters; anything above 0 shows."""
    eighths = max(round(8 * share * size), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _BAR[eighths % 8].strip()


def heights(counts: Sequence[int]) -> str:
    """A histogram in one line; anything above 0 shows."""
    most = max(counts) or 1
    return "".join(_HEIGHTS[0 if not n else max(1, round(8 * n / most))] for n in counts)


def _value(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(part: int, whole: int) -> str:
    """Never rounded up to 100 %, nor down to 0 %."""
    share = 100 * part / whole if whole else 100.0
    if 0 < part < whole and not 0.005 <= share < 99.995:
        return "> 99.99 %" if share > 50 else "< 0.01 %"
    return f"{share:.2f} %"


def _coloured(text: str, kind: str) -> Text:
    return Text(text, style=COLOURS[kind])


def template(found: "TemplateReport", *, title: str) -> str:
    """How a model's template renders conversations, and the first row of each kind that it renders otherwise."""
    from ctpd.text.templates import MEANINGS

    ends = ", ".join(found.end_tokens) or "none"
    lines = [
        f"{title} {printable(found.name)}: {found.rows:,} rows; they end with {printable(ends)} ({', '.join(found.ends_from)})"
    ]
    total = sum(found.differences.values())
    lines.append(f"  {found.rows - total:,} are what the template itself makes of the whole conversation")
    for kind, number in found.differences.items():
        row, ours, own = found.examples[kind]
        lines += [f"  {number:,} {kind}: {MEANINGS[kind]}; first in pair {printable(row)}"]
        lines += [f"    as used:  {_shown(ours)}", f"    template: {_shown(own)}"]
    lines += [f"  {number:,} pairs refused: {printable(why)}" for why, number in found.refused.items()]
    return "\n".join(lines)


def _shown(text: str) -> str:
    """The end of a rendered conversation, on one line."""
    line = printable(text.replace("\n", "\\n"))
    return line if len(line) <= _LONGEST else "..." + line[-_LONGEST:]
