"""The probability that a word boundary follows a token: what ALM adds to the likelihood of a chunk.

Shape legend: N rows (predicting positions), R rows of one tile, V vocabulary, S ids that begin with a boundary.
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctpd.ops.logit_rows import LogitRows

# Space, newline and tab as byte-level tokenizers spell them, as SentencePiece does, and as they are.
_STARTS = ("Ġ", "Ċ", "ĉ", "▁", "<0x20>", "<0x0A>", "<0x09>", " ", "\n", "\t")


def boundary_ids(tokens: Sequence[str], special_ids: Collection[int]) -> list[int]:
    """The ids before which a word ends: they begin with a space, a newline or a tab, or are special.

    tokenkit's `get_space_mask`. DEVIATION: that knows the byte-level spelling only, because it converts all
    tokenizers to it.

    Args:
        tokens: the tokenizer's own spelling of each id.
        special_ids: the tokenizer's special tokens, the end of turn among them.
    """
    return [index for index, token in enumerate(tokens) if index in special_ids or token.startswith(_STARTS)]


def boundary_logps(rows: LogitRows, ids_S: Int[Tensor, " S"]) -> Float[Tensor, " N"]:
    """`log sum over ids_S of softmax(row)`, at most 0; the gradient goes where the rows' does."""

    def of_tile(logits_RV: Tensor) -> Tensor:
        return (logits_RV[:, ids_S].logsumexp(-1) - torch.logsumexp(logits_RV, -1)).clamp(max=0.0)

    return rows.map(of_tile)
