"""Errors that the command line prints as one paragraph: `UserError` for wrong input (exit code 2), `CtpdError` otherwise (1)."""

import difflib
from collections.abc import Iterable

_LONGEST_WORD, _LONGEST = 300, 2000  # characters of what is wrong: names and values of a user can be of any length


class CtpdError(Exception):
    """Base of every error that the command line prints as one paragraph."""

    exit_code = 1


class UserError(CtpdError, ValueError):
    """Bad input. The text is one paragraph: where, what is wrong, and how to correct it.

    Args:
        what: what is wrong, a sentence.
        where: the file, line, row, column or artifact in which it is.
        fix: how to correct it, a sentence.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        what = shortened(" ".join(shortened(word, most=_LONGEST_WORD) for word in what.split()), most=_LONGEST)
        parts = [_sentence(what)]
        if where is not None:
            parts.insert(0, f"{where}:")
        if fix is not None:
            parts[-1] += "." if parts[-1].endswith("`") else ""
            parts.append(_sentence(fix))
        super().__init__(" ".join(parts))
        self.what, self.where, self.fix = what, where, fix


class NotReproduced(CtpdError):
    """Numbers that should be the same as others are not; what differs has been printed."""


class DamagedArtifact(UserError):
    """A stored artifact whose files do not match its manifest."""


class NotFinite(UserError):
    """A number that a model, a training or an evaluation gave is NaN or infinite: nothing is made of it."""


class Unmeasurable(UserError):
    """A column cannot be measured on a model, whatever is tried again: its answers do not fit into the model's context."""


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?", ":", "`")) else text + "."


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the option closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def listed(names: Iterable[object], *, most: int = 8, to: str | None = None) -> str:
    """Names for a message, in quotes: all of them, or those nearest to ``to`` and how many more there are."""
    texts = [str(name) for name in names]
    shown = texts[:most]
    if to is not None and len(texts) > most:
        shown = difflib.get_close_matches(to, texts, n=most, cutoff=0.0)
    quoted = ", ".join(repr(shortened(name)) for name in shown)
    return quoted if len(shown) == len(texts) else f"{quoted} and {len(texts) - len(shown):,} more"


def shortened(text: str, *, most: int = 100) -> str:
    """The text, or its beginning and how many characters follow."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} more characters)"
