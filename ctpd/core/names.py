"""What names and texts of a user may hold: they are printed, and become part of tables, pages and file names."""

import unicodedata

LONGEST_NAME = 200  # characters
_DIRECTIONS = range(0x202A, 0x202F), range(0x2066, 0x206A)  # they change the order in which other text is shown


def unfit_name(name: str) -> str | None:
    """Why a text cannot be a name, or None: empty, too long, or with a character that `unfit_text` refuses."""
    if not name.strip():
        return "is empty"
    if len(name) > LONGEST_NAME:
        return f"has {len(name):,} characters, more than {LONGEST_NAME}"
    return unfit_text(name, lines=False)


def unfit_text(text: str, *, lines: bool = True) -> str | None:
    """Why a text cannot be shown everywhere, or None: control characters, half a surrogate pair, no character at all.

    Args:
        text: of any length.
        lines: whether line breaks and tabs may be in it.
    """
    for position, character in enumerate(text):
        if not character.isprintable() and not (lines and character in "\n\t"):
            found = _unfit(character)
            if found is not None:
                return f"has {found}, U+{ord(character):04X}, as character {position + 1}"
    return None


def _unfit(character: str) -> str | None:
    code, category = ord(character), unicodedata.category(character)
    if category == "Cc":
        return "a line break" if character in "\n\r" else "a control character"
    if category == "Cs":
        return "half of a surrogate pair"
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
        return "a code point that is no character"
    if any(code in span for span in _DIRECTIONS):
        return "a character that turns the direction of text"
    return None
