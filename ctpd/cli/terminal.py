"""Tables and coloured text for the terminal, drawn by rich; plain text where the output is no terminal."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ctpd.core.printing import printable

_TRAILING_SPACES = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$")
_UNLIMITED = 10_000  # columns of an output that is no terminal: nothing is wrapped or cut for a pipe


def columns(otherwise: int = _UNLIMITED) -> int:
    """The width of the terminal; ``otherwise`` where the output is none."""
    size = shutil.get_terminal_size((otherwise, 24)).columns
    return size if sys.stdout.isatty() or "COLUMNS" in os.environ else otherwise


def rendered(*parts: RenderableType, width: int | None = None) -> str:
    """Text with ANSI colours, which `click.echo` takes out where the output is no terminal.

    Strings are printed literally; ``width`` is the terminal's if it is None.
    """
    console = Console(
        file=StringIO(),
        force_terminal=True,
        color_system=None if os.environ.get("TERM") == "dumb" else "standard",
        width=width or columns(),
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(_TRAILING_SPACES.sub(r"\1", line) for line in captured.get().splitlines())


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[int] = ()) -> Table:
    """A table without lines between its cells.

    Args:
        heads: one a column; no head is shown if all are empty.
        rows: the cells; strings are printed literally, with the code point of what does not print.
        right: the columns, from 0, whose cells end at the right.

    What is too long for the last column goes on in the next line, also inside a word.
    """
    drawn = Table(box=None, padding=(0, 1), pad_edge=False, show_header=any(heads), header_style="bold")
    for index, head in enumerate(heads):
        is_last = index == len(heads) - 1
        drawn.add_column(
            Text(head),
            justify="right" if index in right else "left",
            no_wrap=not is_last,
            overflow="fold" if is_last else "ellipsis",
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return drawn


def indented(part: RenderableType) -> Padding:
    """The same, two columns to the right."""
    return Padding(part, (0, 0, 0, 2), expand=False)


def heading(text: str) -> Text:
    """A line in bold."""
    return Text(printable(text), style="bold")
