"""Text from users (names of runs, labels, paths) made safe for a terminal."""


def printable(text: str) -> str:
    """The text on one line, with its code point in place of every character that does not print.

    A name with a line break or an escape sequence is shown, not obeyed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in text)
