"""What the spelling of a vocabulary's tokens says, whatever the kind of tokenizer."""

from collections.abc import Collection, Sequence

SPACE_MARKERS = ("Ġ", "▁", " ")
_SPACE_STARTS = (*SPACE_MARKERS, "Ċ", "ĉ", "\n", "\t", "<0x20>", "<0x0A>", "<0x09>")


def boundary_ids(tokens: Sequence[str], special_ids: Collection[int]) -> list[int]:
    """The ids after which a word is known to have ended before them: tokens that start with white space, and special ones.

    Args:
        tokens: the tokenizer's own spelling by id.
        special_ids: ids of special tokens, the end of turn among them.
    """
    return sorted({i for i, token in enumerate(tokens) if token.startswith(_SPACE_STARTS)} | set(special_ids))
