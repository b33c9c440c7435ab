"""Pairs whose prompt is computed once: a sequence holds the prompt and, after it, both responses.

Two rows `prompt + chosen` and `prompt + rejected` are packed into the sequence `[prompt, chosen, rejected]`. Everything
in a decoder that treats positions independently (embeddings, projections, norms, MLPs) processes each prompt token
once. Only attention looks at several positions: there the first row is the beginning of the sequence as it is, the
second row is gathered from it, and neither needs a mask but the causal one.

Shape legend: P sequences, W packed tokens, R = 2 P rows (all first rows, then all second rows), T tokens of the longest
row, U of the longest second row, N of the longest second row's own part, S of the longest common beginning, L of the
shortest first row, A heads, D head size, F features of a position.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_OF_SEPARATE = 0.9
"""Pairs are packed only if that leaves at most this share of the positions: splitting for attention costs time too."""


class PackedLayout(NamedTuple):
    """Maps between the tokens of R rows and those of P packed sequences. Indices are into flattened arrays.

    Attributes:
        positions: position of each packed token in its row, for the rotary embeddings.
        unpack: packed index of each token of each row; of padding, the index of some token of the sequence.
        second: packed index of each token of the second rows, padding likewise.
        is_own: which of these belong to the second row alone.
        own: packed index of each token that belongs to the second row alone, padding likewise.
        is_common: which of the first S packed tokens belong to both rows.
        tail: for the packed tokens from L on, the index among those of ``second``; -1 for a token of the first row.
        own_tail: the same among those of ``own``.
    """

    positions: Int[Tensor, "P W"]
    unpack: Int[Tensor, "R T"]
    second: Int[Tensor, "P U"]
    is_own: Bool[Tensor, "P U"]
    own: Int[Tensor, "P N"]
    is_common: Bool[Tensor, "P S"]
    tail: Int[Tensor, "P W-L"]
    own_tail: Int[Tensor, "P W-L"]


def pack_pairs(
    ids_RT: NDArray[np.int64], lengths_R: NDArray[np.int64]
) -> tuple[NDArray[np.int64], PackedLayout] | None:
    """Pack the rows of pairs, padded on the right; None where it would save too little (`MOST_OF_SEPARATE`).

    Args:
        ids_RT: the first rows of all pairs, then the second rows.
        lengths_R: tokens of each row.

    Returns:
        The packed ids [P, W] and their layout.
    """
    num_pairs, width = len(ids_RT) // 2, ids_RT.shape[1]
    first_P1, second_P1 = lengths_R[:num_pairs, None], lengths_R[num_pairs:, None]
    alike_PT = np.logical_and.accumulate(ids_RT[:num_pairs] == ids_RT[num_pairs:], axis=1)
    common_P1 = np.minimum(alike_PT.sum(axis=1, keepdims=True), np.minimum(first_P1, second_P1) - 1)
    packed = int((first_P1 + second_P1 - common_P1).max())
    if packed * num_pairs > MOST_OF_SEPARATE * ids_RT.size:
        return None
    begin_P1, column_T = np.arange(num_pairs)[:, None] * packed, np.arange(width)
    first_PT = begin_P1 + column_T
    second_PT = np.where(column_T < common_P1, first_PT, first_PT + first_P1 - common_P1)
    is_token_RT = column_T < lengths_R[:, None]
    unpack_RT = np.where(is_token_RT, np.concatenate([first_PT, second_PT]), np.tile(begin_P1, (2, 1)))
    longest, num_own = int(second_P1.max()), int((second_P1 - common_P1).max())
    is_own_PU = (is_token_RT[num_pairs:] & (column_T >= common_P1))[:, :longest]
    own_PN = begin_P1 + first_P1 + np.minimum(np.arange(num_own), second_P1 - common_P1 - 1)
    # The packed token at column c belongs to the second row from `first` on, and is its token c - first + common.
    column = np.arange(int(first_P1.min()), packed)
    is_second = (column >= first_P1) & (column < first_P1 + second_P1 - common_P1)
    own_column, row_P1 = column - first_P1, np.arange(num_pairs)[:, None]
    packed_ids, positions = np.zeros(num_pairs * packed, dtype=np.int64), np.zeros(num_pairs * packed, dtype=np.int64)
    for part in (slice(num_pairs, None), slice(num_pairs)):
        index = unpack_RT[part][is_token_RT[part]]
        packed_ids[index] = ids_RT[part][is_token_RT[part]]
        positions[index] = np.broadcast_to(column_T, ids_RT[part].shape)[is_token_RT[part]]
    arrays = (
        positions.reshape(num_pairs, packed),
        unpack_RT,
        unpack_RT[num_pairs:, :longest],
        is_own_PU,
        own_PN,
        np.arange(int(common_P1.max())) < common_P1,
        np.where(is_second, row_P1 * longest + own_column + common_P1, -1),
        np.where(is_second, row_P1 * num_own + own_column, -1),
    )
    layout = PackedLayout(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
    return packed_ids.reshape(num_pairs, packed), layout


def packed_attention(
    attention: Callable[..., tuple[Tensor, Any]],
    query_PAWD: Float[Tensor, "P A W D"],
    key_PBWD: Float[Tensor, "P B W D"],
    value_PBWD: Float[Tensor, "P B W E"],
    *,
    layout: PackedLayout,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "P W A E"], None]:
    """Causal attention within each row of packed sequences, by a function in the form of `transformers`.

    Args:
        attention: `(query, key, value, attention_mask, ...) -> (output [rows, T, A, E], weights)`; without a mask it is
            causal.
        sliding_window: how many tokens a token attends to, itself included; None for all before it.
    """
    # A prompt token's result is the first row's. So the second row needs queries for its own tokens only, against all
    # its keys; with a mask, attention computes them all and not the causal half, which pays if they are fewer than half.
    only_own = 2 * layout.own.shape[1] <= layout.second.shape[1]
    keys, values = _split(key_PBWD, layout, only_own=False), _split(value_PBWD, layout, only_own=False)
    queries = _split(query_PAWD, layout, only_own=only_own)
    outputs = []
    for query, key, value in zip(queries, keys, values, strict=True):
        mask: Tensor | None = None
        if query.shape[2] < key.shape[2]:
            mask = _seen(layout, sliding_window)
        elif sliding_window is not None and sliding_window < key.shape[2]:
            mask = _near(key.shape[2], sliding_window, key.device)
        output, _ = attention(query, key, value, mask, sliding_window=sliding_window, **options)
        outputs.append(output.flatten(2))
    packed: Tensor = _Merge.apply(*outputs, layout, only_own)
    return packed.view(*layout.positions.shape, query_PAWD.shape[1], -1), None


def _seen(layout: PackedLayout, window: int | None) -> Tensor:
    """[P, 1, N, U] which tokens of its row a second row's own token attends to."""
    query_PN1 = layout.positions.flatten()[layout.own].unsqueeze(2)
    distance_PNU = query_PN1 - torch.arange(layout.second.shape[1], device=query_PN1.device)
    seen = distance_PNU >= 0
    return (seen if window is None else seen & (distance_PNU < window)).unsqueeze(1)


@functools.lru_cache(maxsize=2)
def _near(width: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, T] which tokens a token attends to with a sliding window: the same for all layers."""
    distance = torch.arange(width, device=device)
    distance = distance[:, None] - distance[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _split(states_PAWD: Tensor, layout: PackedLayout, *, only_own: bool) -> tuple[Tensor, Tensor]:
    """The states [P, A, T, D] of the first rows and [P, A, U, D] of the second, or [P, A, N, D] of their own tokens."""
    heads = states_PAWD.shape[1]
    first, second = _Split.apply(states_PAWD.transpose(1, 2).flatten(2), layout, only_own)
    return tuple(part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (first, second))


def _picked(values_KF: Tensor, index: Tensor) -> Tensor:
    """The values at these indices, zeros at -1."""
    picked = values_KF.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, -1)
    return picked.mul_((index >= 0).unsqueeze(-1))


class _Split(torch.autograd.Function):
    """Packed tokens to those of first and second rows. The backward pass gathers: no token has more than two copies."""

    @staticmethod
    def forward(ctx: Any, packed_PWF: Tensor, layout: PackedLayout, only_own: bool) -> tuple[Tensor, Tensor]:
        ctx.layout, ctx.only_own = layout, only_own
        index = layout.own if only_own else layout.second
        second = packed_PWF.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
        # After a first row that is shorter than others come tokens of the second, which causal attention does not read.
        return packed_PWF[:, : layout.unpack.shape[1]], second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PTF: Tensor, grad_second: Tensor) -> tuple[Tensor, None, None]:
        layout: PackedLayout = ctx.layout
        num_pairs, width = layout.positions.shape
        grad = grad_PTF.new_zeros(num_pairs, width, grad_PTF.shape[2])
        grad[:, : grad_PTF.shape[1]] = grad_PTF
        if not ctx.only_own:
            common_PS1 = layout.is_common.unsqueeze(2).to(grad.dtype)
            longest = common_PS1.shape[1]
            grad[:, :longest].addcmul_(grad_second[:, :longest], common_PS1)
        tail = layout.own_tail if ctx.only_own else layout.tail
        grad[:, width - tail.shape[1] :] += _picked(grad_second.flatten(0, 1), tail)
        return grad, None, None


class _Merge(torch.autograd.Function):
    """Results of first and second rows to packed ones; a common token's is the first row's, which is the second's too."""

    @staticmethod
    def forward(ctx: Any, first_PTF: Tensor, second: Tensor, layout: PackedLayout, only_own: bool) -> Tensor:
        ctx.layout, ctx.only_own = layout, only_own
        num_pairs, width = layout.positions.shape
        packed = first_PTF.new_zeros(num_pairs, width, first_PTF.shape[2])
        packed[:, : first_PTF.shape[1]] = first_PTF
        tail = layout.own_tail if only_own else layout.tail
        behind = packed[:, width - tail.shape[1] :]
        behind.mul_((tail < 0).unsqueeze(2)).add_(_picked(second.flatten(0, 1), tail))
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PWF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        layout: PackedLayout = ctx.layout
        width, num_tail = grad_PWF.shape[1], layout.tail.shape[1]
        first = grad_PWF[:, : layout.unpack.shape[1]].clone()
        behind = first[:, width - num_tail :]
        behind.mul_((layout.tail[:, : behind.shape[1]] < 0).unsqueeze(2))
        index = layout.own if ctx.only_own else layout.second
        second = grad_PWF.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
        # Padding of `own` repeats a token; its result is not used, so it gets no gradient.
        counts = _counts(layout.own) if ctx.only_own else layout.is_own
        return first, second.mul_(counts.unsqueeze(2)), None, None


def _counts(own_PN: Tensor) -> Tensor:
    """Which entries are no padding: padding repeats the last index of its row, and the first of equal ones counts."""
    repeats = torch.zeros_like(own_PN, dtype=torch.bool)
    repeats[:, 1:] = own_PN[:, 1:] == own_PN[:, :-1]
    return ~repeats
