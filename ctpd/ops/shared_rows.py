"""Rows that begin alike, computed once: a pair's prompt is one stretch of a sequence that both responses continue.

Two rows `prompt + chosen` and `prompt + rejected` are packed into the sequence `[prompt, chosen, rejected]`. Everything
in a decoder that treats positions one by one (embeddings, projections, norms, MLPs) sees each prompt token once. Only
attention looks at several positions: the first row is the beginning of the sequence as it stands, the second one is put
together for it, and neither needs a mask but the causal one.

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
"""Packing must leave at most this share of the positions: the taking apart costs something too."""


class SharedRows(NamedTuple):
    """Where the tokens of R rows stand in P packed sequences, and back. Places are indices into flattened arrays.

    Attributes:
        positions: position of each packed token in its row: what rotary embeddings are told.
        unpack: packed place of each token of each row; padding points at a token that is there.
        second: packed place of each token of the second rows, padding likewise.
        is_own: which of these are the second row's alone.
        own: packed place of each token that is the second row's alone, padding likewise.
        is_common: which of the first S packed tokens both rows have.
        tail: for the packed tokens from L on the place among those of ``second``; -1 for a token of the first row.
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


def share_rows(ids_RT: NDArray[np.int64], lengths_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], SharedRows] | None:
    """Pack the rows of pairs, padded on the right; None where it would save too little.

    Returns:
        The packed ids [P, W] and where everything stands.
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
        place = unpack_RT[part][is_token_RT[part]]
        packed_ids[place] = ids_RT[part][is_token_RT[part]]
        positions[place] = np.broadcast_to(column_T, ids_RT[part].shape)[is_token_RT[part]]
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
    shared = SharedRows(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
    return packed_ids.reshape(num_pairs, packed), shared


def attend_apart(
    attention: Callable[..., tuple[Tensor, Any]],
    module: torch.nn.Module,
    query_PAWD: Float[Tensor, "P A W D"],
    key_PBWD: Float[Tensor, "P B W D"],
    value_PBWD: Float[Tensor, "P B W E"],
    *,
    shared: SharedRows,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "P W A E"], None]:
    """Causal attention within each row of packed sequences, by a function in the form of `transformers`.

    Args:
        attention: `(module, query, key, value, attention_mask, ...) -> (output [rows, T, A, E], weights)`; without a
            mask it is causal.
        sliding_window: a token sees so many tokens, itself included; None for all before it.
    """
    # A prompt token's result is the first row's. So the second row needs queries for its own tokens only, against all
    # its keys; a mask then costs the causal half of them, which is worth it where they are fewer than half.
    only_own = 2 * shared.own.shape[1] <= shared.second.shape[1]
    keys, values = _split(key_PBWD, shared, only_own=False), _split(value_PBWD, shared, only_own=False)
    queries = _split(query_PAWD, shared, only_own=only_own)
    outputs = []
    for query, key, value in zip(queries, keys, values, strict=True):
        mask: Tensor | None = None
        if query.shape[2] < key.shape[2]:
            mask = _seen(shared, sliding_window)
        elif sliding_window is not None and sliding_window < key.shape[2]:
            mask = _near(key.shape[2], sliding_window, key.device)
        output, _ = attention(module, query, key, value, mask, sliding_window=sliding_window, **options)
        outputs.append(output.flatten(2))
    packed: Tensor = _Join.apply(*outputs, shared, only_own)
    return packed.view(*shared.positions.shape, query_PAWD.shape[1], -1), None


def _seen(shared: SharedRows, window: int | None) -> Tensor:
    """[P, 1, N, U] which tokens of its row a second row's own token sees."""
    query_PN1 = shared.positions.flatten()[shared.own].unsqueeze(2)
    distance_PNU = query_PN1 - torch.arange(shared.second.shape[1], device=query_PN1.device)
    seen = distance_PNU >= 0
    return (seen if window is None else seen & (distance_PNU < window)).unsqueeze(1)


@functools.lru_cache(maxsize=2)
def _near(width: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, T] the tokens that a token sees through a sliding window: the same for all layers."""
    distance = torch.arange(width, device=device)
    distance = distance[:, None] - distance[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _split(states_PAWD: Tensor, shared: SharedRows, *, only_own: bool) -> tuple[Tensor, Tensor]:
    """The states [P, A, T, D] of the first rows and [P, A, U, D] of the second, or [P, A, N, D] of what is theirs alone."""
    heads = states_PAWD.shape[1]
    first, second = _Split.apply(states_PAWD.transpose(1, 2).flatten(2), shared, only_own)
    return tuple(part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (first, second))


def _picked(values_KF: Tensor, place: Tensor) -> Tensor:
    """The values at these places, zeros at -1."""
    picked = values_KF.index_select(0, place.clamp(min=0).flatten()).view(*place.shape, -1)
    return picked.mul_((place >= 0).unsqueeze(-1))


class _Split(torch.autograd.Function):
    """Packed tokens to those of first and second rows. The backward pass gathers: no place has more than two sources."""

    @staticmethod
    def forward(ctx: Any, packed_PWF: Tensor, shared: SharedRows, only_own: bool) -> tuple[Tensor, Tensor]:
        ctx.shared, ctx.only_own = shared, only_own
        places = shared.own if only_own else shared.second
        second = packed_PWF.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, -1)
        # Behind a first row that is shorter than others stand tokens of the second; causal attention never sees them.
        return packed_PWF[:, : shared.unpack.shape[1]], second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PTF: Tensor, grad_second: Tensor) -> tuple[Tensor, None, None]:
        shared: SharedRows = ctx.shared
        num_pairs, width = shared.positions.shape
        grad = grad_PTF.new_zeros(num_pairs, width, grad_PTF.shape[2])
        grad[:, : grad_PTF.shape[1]] = grad_PTF
        if not ctx.only_own:
            common_PS1 = shared.is_common.unsqueeze(2).to(grad.dtype)
            longest = common_PS1.shape[1]
            grad[:, :longest].addcmul_(grad_second[:, :longest], common_PS1)
        tail = shared.own_tail if ctx.only_own else shared.tail
        grad[:, width - tail.shape[1] :] += _picked(grad_second.flatten(0, 1), tail)
        return grad, None, None


class _Join(torch.autograd.Function):
    """Results of first and second rows to packed ones; a shared token's is the first row's, which is the second's too."""

    @staticmethod
    def forward(ctx: Any, first_PTF: Tensor, second: Tensor, shared: SharedRows, only_own: bool) -> Tensor:
        ctx.shared, ctx.only_own = shared, only_own
        num_pairs, width = shared.positions.shape
        packed = first_PTF.new_zeros(num_pairs, width, first_PTF.shape[2])
        packed[:, : first_PTF.shape[1]] = first_PTF
        tail = shared.own_tail if only_own else shared.tail
        behind = packed[:, width - tail.shape[1] :]
        behind.mul_((tail < 0).unsqueeze(2)).add_(_picked(second.flatten(0, 1), tail))
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PWF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        shared: SharedRows = ctx.shared
        width, num_tail = grad_PWF.shape[1], shared.tail.shape[1]
        first = grad_PWF[:, : shared.unpack.shape[1]].clone()
        behind = first[:, width - num_tail :]
        behind.mul_((shared.tail[:, : behind.shape[1]] < 0).unsqueeze(2))
        places = shared.own if ctx.only_own else shared.second
        second = grad_PWF.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, -1)
        # Padding of `own` repeats a token, and its result is nobody's.
        counts = _counts(shared.own) if ctx.only_own else shared.is_own
        return first, second.mul_(counts.unsqueeze(2)), None, None


def _counts(own_PN: Tensor) -> Tensor:
    """Which entries are no padding: padding repeats the last place of its row, and the first of equals counts."""
    repeats = torch.zeros_like(own_PN, dtype=torch.bool)
    repeats[:, 1:] = own_PN[:, 1:] == own_PN[:, :-1]
    return ~repeats
