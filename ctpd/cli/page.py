"""The page that `ctpd inspect spans --html` writes: one file without anything from elsewhere, light and dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ctpd.cli.draw import fidelity_lines, shown, sizes

if TYPE_CHECKING:
    from ctpd.inspection.tokenizers import Comparison

_MOST_SPANS = 1500  # of one text; a page of more is slow to read and to show
_CLASSES = {"1:1": "one", "1:n": "split", "n:1": "merged", "n:m": "many"}
_MEANINGS = {
    "1:1": "one token each",
    "1:n": "one teacher token, several student tokens",
    "n:1": "several teacher tokens, one student token",
    "n:m": "several each",
}
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --faint: #62707d; --line: #dce1e6; --card: #f5f7f9;
  --one: #e9edf1; --split: #bfe3f2; --merged: #fae3a3; --many: #efc6ea; --one-bar: #93a1af; --split-bar: #2492bd;
  --merged-bar: #c28f0c; --many-bar: #a94aa0; }
@media (prefers-color-scheme: dark) { :root { --back: #14181c; --text: #e4e8ec; --faint: #98a5b2; --line: #323a42;
  --card: #1c2227; --one: #2a323a; --split: #124b63; --merged: #5a4405; --many: #5a2455; --one-bar: #6b7884;
  --split-bar: #3fa9d2; --merged-bar: #d6a52c; --many-bar: #c76cbe; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
p { margin: .25rem 0; color: var(--faint); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); }
td.number, th.number { text-align: right; }
td.kind { white-space: nowrap; }
td.inner { padding-left: 1.25rem; color: var(--faint); }
.grid { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.bar { display: flex; height: 1rem; gap: 2px; margin: .5rem 0 .75rem; }
.bar i { min-width: 3px; border-radius: 2px; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .5rem; }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .75rem; line-height: 1;
  font-family: ui-monospace, monospace; font-size: .8rem; }
.row { display: flex; flex-wrap: wrap; gap: .5rem 3px; }
.break { flex-basis: 100%; height: 0; }
.span { display: inline-grid; gap: 2px; padding: 3px; border-radius: 4px; }
.span div { display: flex; gap: 2px; }
.span b { font-weight: 400; flex: 1; text-align: center; padding: 3px 4px; border-radius: 2px; background: var(--back);
  white-space: pre; }
.one { background: var(--one); } .split { background: var(--split); } .merged { background: var(--merged); }
.many { background: var(--many); }
.bar .one, .key.one { background: var(--one-bar); } .bar .split, .key.split { background: var(--split-bar); }
.bar .merged, .key.merged { background: var(--merged-bar); } .bar .many, .key.many { background: var(--many-bar); }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
"""


def spans_page(found: "Comparison", drawn: Sequence[Sequence[Mapping[str, Any]]], *, teacher: str, student: str) -> str:
    """The whole page.

    Args:
        found: what was measured on all texts.
        drawn: the spans of the texts to show (`ctpd.inspection.tokenizers.drawn_spans`).
        teacher: names the teacher's tokenizer.
        student: names the student's.
    """
    title = f"{escape(teacher)} → {escape(student)}"
    counts = found.counts
    skipped = f", {counts['skipped']:,} without tokens skipped" if counts["skipped"] else ""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Aligned spans: {title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f"<p>{counts['texts']:,} texts{skipped}, {counts['characters']:,} characters, {counts['spans']:,} aligned spans. "
        "The teacher's tokens stand above the student's; a frame is a span, the finest part that both share.</p>",
        '<div class="grid">',
        f"<section><h2>Span types</h2>{_types(found)}</section>",
        f"<section><h2>Tokens</h2>{_tokens(found)}</section>",
        "</div>",
        f"<h2>Fidelity</h2>{_fidelity(found)}",
        _exceptions(found),
        *(f"<h2>Text {number}</h2>{_text(text)}" for number, text in enumerate(drawn, start=1)),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _types(found: "Comparison") -> str:
    total = found.counts["spans"]
    bars = "".join(
        f'<i class="{_CLASSES[name]}" style="flex:{n / total:.5f}" title="{name}: {100 * n / total:.2f} %"></i>'
        for name, n in found.types.items()
        if n
    )
    rows = "".join(
        f'<tr><td class="kind"><i class="key {_CLASSES[name]}"></i>{name}</td><td>{_MEANINGS[name]}</td>'
        f'<td class="number">{n:,}</td><td class="number">{100 * n / total:.2f}&nbsp;%</td></tr>'
        for name, n in found.types.items()
    )
    return f'<div class="bar">{bars}</div><table>{rows}</table>'


def _tokens(found: "Comparison") -> str:
    counts, total = found.counts, found.counts["spans"]
    lines = {
        "tokens": [f"{counts[f'{s}_tokens']:,}" for s in ("teacher", "student")],
        "characters a token": [f"{counts['characters'] / counts[f'{s}_tokens']:.2f}" for s in ("teacher", "student")],
        "tokens a span": [f"{counts[f'{s}_tokens'] / total:.3f}" for s in ("teacher", "student")],
    } | {f"spans of {label} token{'s' if label != '1' else ''}": cells for label, cells in sizes(found, most=4)}
    rows = "".join(
        f"<tr><td>{label}</td>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>"
        for label, cells in lines.items()
    )
    head = '<tr><th></th><th class="number">teacher</th><th class="number">student</th></tr>'
    return f"<table>{head}{rows}</table>"


def _fidelity(found: "Comparison") -> str:
    rows = "".join(
        f'<tr><td{" class=inner" if label.startswith(" ") else ""}>{escape(label.strip())}</td><td class="number">{escape(value)}</td></tr>'
        for label, value in fidelity_lines(found)
    )
    return f"<table>{rows}</table>"


def _exceptions(found: "Comparison") -> str:
    if not found.examples:
        return ""
    rows = "".join(
        f"<tr><td>{escape(kind.replace('_', ' '))}</td>"
        + "".join(f"<td><code>{escape(shown(case[part]))}</code></td>" for part in ("text", "teacher", "student"))
        + "</tr>"
        for kind, cases in found.examples.items()
        for case in cases
    )
    head = "<tr><th>exception</th><th>the span's text</th><th>teacher spells</th><th>student spells</th></tr>"
    return f"<h2>Examples of exceptions</h2><table>{head}{rows}</table>"


def _text(text: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for span in text[:_MOST_SPANS]:
        sides = "".join(f"<div>{_chips(span[side])}</div>" for side in ("teacher", "student"))
        cells.append(f'<span class="span {_CLASSES[span["type"]]}" title="{span["type"]}">{sides}</span>')
        if "\n" in span["text"]:
            cells.append('<i class="break"></i>')
    left = len(text) - _MOST_SPANS
    note = f"<p>{left:,} more spans of this text are not shown.</p>" if left > 0 else ""
    return f'<div class="text"><div class="row">{"".join(cells)}</div></div>{note}'


def _chips(tokens: Sequence[str]) -> str:
    return "".join(f"<b>{escape(shown(token)) or '&#8203;'}</b>" for token in tokens)
