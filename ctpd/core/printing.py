"""Text for a terminal: user-given names with control characters escaped, and commands that can be pasted into a shell."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpd.core.names import unfit_text

DEFAULT_STORE = "runs"  # the folder of the artifacts, relative to the working directory


def printable(text: str) -> str:
    """The text with every non-printable character replaced by its code point, such as ``⟨U+001B⟩``.

    A line break or an escape sequence in a name is shown and has no effect on the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in text)


def printable_lines(text: str) -> str:
    """The text with control characters and the like replaced as by `printable`, and its line breaks and tabs kept."""
    if unfit_text(text) is None:
        return text
    return "".join(c if unfit_text(c) is None else printable(c) for c in text)


def one_line(text: str) -> str:
    """The text with a space in place of each line break."""
    lines = text.splitlines()
    return text if lines == [text] else " ".join(line.strip() for line in lines)


def command(*words: str, store: Path) -> str:
    """The command `ctpd WORDS`, quoted for a shell; with --store where it is not the default."""
    named = [] if str(store) == DEFAULT_STORE else ["--store", str(store)]
    return shlex.join(["ctpd", *words, *named])


def json_text(value: Any) -> str:
    """A value as JSON, which knows neither NaN nor infinity: a number that is not finite is null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
