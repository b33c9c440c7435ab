"""The LaTeX of tables: escaping, booktabs rules, and a file that compiles alone as well as inside a paper."""

import re
from collections.abc import Sequence

from ctpd.core.printing import one_line, printable_lines

_OPENING = (
    "% Input this file into a paper that loads booktabs, or compile it alone: outside a document it brings its own.",
    r"\expandafter\ifx\csname @nodocument\endcsname\relax",  # LaTeX forgets this command when a document begins
    r"  \let\closetable\relax",
    r"\else",
    r"  \documentclass{article}\usepackage[landscape,margin=1cm]{geometry}\usepackage{booktabs}\begin{document}",
    r"  \def\closetable{\end{document}}",
    r"\fi",
)

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", "±": r"$\pm$", "–": "--", "—": "---", "−": "$-$", "†": r"$\dagger$", "§": r"\S{}",
    "⟨": r"$\langle$", "⟩": r"$\rangle$", "×": r"$\times$", "→": r"$\to$", "↓": r"$\downarrow$", "≥": r"$\ge$", "≤": r"$\le$", "β": r"$\beta$", "μ": r"$\mu$",
}  # fmt: skip


_ARGUMENTS = ("[", "*")  # at the beginning of a row they would be arguments of the command before it


def escape(text: str) -> str:
    """Text on one line as LaTeX shows it literally; text between two backticks becomes typewriter text."""
    text = printable_lines(one_line(text))
    parts = ["".join(_SPECIAL.get(character, character) for character in part) for part in re.split("`([^`]+)`", text)]
    return "".join(rf"\texttt{{{part}}}" if i % 2 else part for i, part in enumerate(parts))


def tabular(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a booktabs tabular: the header is escaped here, the cells are LaTeX already."""
    columns = "l" + "r" * (len(header) - 1)
    lines = [" & ".join(cells) + r" \\" for cells in ([escape(name) for name in header], *rows)]
    lines = [f"{{}}{line}" if line.startswith(_ARGUMENTS) else line for line in lines]
    opening = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return [*opening, *lines[1:], r"\bottomrule", r"\end{tabular}"]


def notes(texts: Sequence[str]) -> list[str]:
    """Footnotes below a tabular, a paragraph each."""
    if not texts:
        return []
    paragraphs = [escape(text) + r"\par" for text in texts]
    return [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", *paragraphs, r"\end{minipage}"]


def table(body: Sequence[str], *, caption: str, label: str) -> str:
    """The whole file: ``body`` in a ``table`` environment, and a document around it when it is compiled alone."""
    name = re.sub("[^A-Za-z0-9-]", "-", label)
    opening = [r"\begin{table}[tb]", r"\centering", r"\small", r"\setlength{\tabcolsep}{4pt}"]
    opening += [rf"\caption{{{escape(caption)}}}", rf"\label{{tab:{name}}}", r"\par\smallskip"]
    return "\n".join([*_OPENING, *opening, *body, r"\end{table}", r"\closetable"]) + "\n"
