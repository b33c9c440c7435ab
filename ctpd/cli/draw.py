"""What `ctpd inspect` prints: spans in colour, summaries, tables in Markdown, histograms of weights."""

import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ctpd.inspection.tokenizers import Comparison

COLOURS: Mapping[str, str | None] = {"1:1": None, "1:n": "cyan", "n:1": "yellow", "n:m": "magenta"}
_TYPE_MEANINGS = {
    "1:1": "one token each",
    "1:n": "one teacher token, several student tokens",
    "n:1": "several teacher tokens, one student token",
    "n:m": "several each",
}
_SIDES = ("teacher", "student")
_BAR = " ▏▎▍▌▋▊▉█"
_HEIGHTS = " ▁▂▃▄▅▆▇█"
_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def shown(text: str) -> str:
    """A token with its white space visible and without control characters."""
    return "".join(
        _MARKS.get(c, c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in text
    )  # fmt: skip


def spans(text: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Both sides' tokens of one text, span under span, wrapped to the terminal; `|` parts the tokens of a span."""
    columns = max(shutil.get_terminal_size((100, 24)).columns, 40)
    lines = [click.style(title, bold=True)]
    rows, used = (["T "], ["S "]), 2
    for span in text:
        cells = ["|".join(map(shown, span[side])) for side in _SIDES]
        size = max(map(width, cells))
        if used + size + 1 > columns and used > 2:
            lines += _flush(rows)
            rows, used = (["T "], ["S "]), 2
        for row, cell in zip(rows, cells, strict=True):
            row.append(_coloured(cell, span["type"]) + " " * (size - width(cell)))
        used += size + 1
    lines += _flush(rows)
    return "\n".join(lines).rstrip()


def legend() -> str:
    """What the colours mean."""
    return "   ".join(f"{_coloured(name, name)} {meaning}" for name, meaning in _TYPE_MEANINGS.items())


def summary(found: "Comparison", *, teacher: str, student: str) -> str:
    """Span types, tokens per span and fidelity, for a terminal."""
    counts, total = found.counts, found.counts["spans"]
    lines = [
        click.style(f"{teacher} -> {student}", bold=True),
        f"{counts['texts']:,} texts, {counts['characters']:,} characters, {total:,} spans"
        + (f"; {counts['skipped']:,} texts without tokens skipped" if counts["skipped"] else ""),
        "",
        click.style("Span types (teacher first)", bold=True),
    ]
    lines += [
        f"  {_coloured(name, name)}  {n:>10,}  {_percent(n, total):>8}  {_coloured(bar(n / total, 30), name)}"
        for name, n in found.types.items()
    ]
    lines += ["", click.style("Tokens", bold=True)]
    for side in _SIDES:
        sizes, tokens = found.tokens_per_span[side], counts[f"{side}_tokens"]
        lines.append(
            f"  {side:<8} {tokens:>10,}  {counts['characters'] / tokens:.2f} characters a token, {tokens / total:.3f} "
            f"tokens a span (most {max(sizes)})"
        )
    lines += ["", click.style("Fidelity", bold=True)]
    lines += [f"  {label:<46} {value}" for label, value in fidelity_lines(found)]
    for kind, cases in found.examples.items():
        shown_cases = "; ".join(
            f"{shown(case['text'])!r} (teacher {shown(case['teacher'])!r}, student {shown(case['student'])!r})"
            for case in cases[:2]
        )
        lines.append(f"    e.g. {kind}: {shown_cases}")
    return "\n".join(lines)


def fidelity_lines(found: "Comparison") -> list[tuple[str, str]]:
    """Label and value of every line about fidelity; classes that do not occur are left out."""
    from ctpd.text.fidelity import EXCEPTIONS, FORGIVEN

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
            (f"  {'but for ' if name in FORGIVEN else 'exception: '}{name.replace('_', ' ')}", f"{spelled[name]:,}")
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
    lines = [
        click.style(title, bold=True),
        f"{settings['strategy']}, {settings['granularity']}; k {settings['k']:g}, mu {settings['mu']:g}, clamped to "
        f"[{settings['lower']:g}, {settings['upper']:g}]; key {found['key'][:12]}",
        f"{found['units']:,} units without end spans, {100 * found['clamped_low']:.2f} % clamped low, "
        f"{100 * found['clamped_high']:.2f} % clamped high"
        + ("" if found["auroc"] is None else f"; AUROC of the log ratio {_value(found['auroc']['pooled'])}"),
        "",
    ]
    for side, part in found["sides"].items():
        if not part["units"]:
            continue
        edges = part["histogram"]["edges"]
        quantiles = "  ".join(f"{float(q) * 100:g} %: {v:.3f}" for q, v in part["quantiles"].items())
        lines += [
            f"{side:<9} mean {part['mean']:.3f}, spread {part['std']:.3f}",
            f"  {edges[0]:.2f} {heights(part['histogram']['counts'])} {edges[-1]:.2f}",
            f"  {quantiles}",
        ]
    lines += ["", *_lines("tenth of the response", dict(zip(map(str, range(1, 11)), found["positions"], strict=True)))]
    if "types" in found:
        lines += ["", *_lines("span type", found["types"])]
    return "\n".join(lines)


def bar(share: float, size: int) -> str:
    """A bar of at most ``size`` characters; anything above 0 shows."""
    eighths = max(round(8 * share * size), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _BAR[eighths % 8].strip()


def heights(counts: Sequence[int]) -> str:
    """A histogram in one line; anything above 0 shows."""
    most = max(counts) or 1
    return "".join(_HEIGHTS[0 if not n else max(1, round(8 * n / most))] for n in counts)


def _lines(head: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"{head:<22} {'units':>9} {'mean chosen':>12} {'mean rejected':>14} {'clamped low %':>14} {'high %':>7}"]
    for label, line in rows.items():
        low, high = (None if line[n] is None else 100 * line[n] for n in ("clamped_low", "clamped_high"))
        lines.append(
            f"{label:<22} {line['units']:>9,} {_value(line['chosen']):>12} {_value(line['rejected']):>14} "
            f"{_value(low, 1):>14} {_value(high, 1):>7}"
        )
    return lines


def _value(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(part: int, whole: int) -> str:
    """Never rounded up to 100 %, nor down to 0 %."""
    share = 100 * part / whole if whole else 100.0
    if 0 < part < whole and not 0.005 <= share < 99.995:
        return "> 99.99 %" if share > 50 else "< 0.01 %"
    return f"{share:.2f} %"


def _coloured(text: str, kind: str) -> str:
    return click.style(text, fg=COLOURS[kind]) if COLOURS[kind] else text


def _flush(rows: tuple[list[str], list[str]]) -> list[str]:
    return ["".join([row[0], " ".join(row[1:])]).rstrip() for row in rows] + [""]


def width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )  # fmt: skip
