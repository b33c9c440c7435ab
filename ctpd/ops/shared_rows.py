"""Rows that begin alike, computed once: a pair's prompt is one stretch of a sequence that both responses continue.

Two rows `prompt + chosen` and `prompt + rejected` are packed into the sequence `[prompt, chosen, rejected]`. Everything
in a decoder that treats positions one by one (embeddings, projections, norms, MLPs) sees each prompt token once. Only
attention looks at several positions: there the sequence is taken apart into its two rows, which need no mask of their
own but the causal one, and the result is packed again.

Shape legend: P sequences, W packed tokens, R = 2 P rows (all first rows, then all second rows), T tokens of the longest
row, A heads, D head size, F features of a position.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_OF_SEPARATE = 0.9
"""Packing must leave at most this share of the positions: the taking apart costs something too."""


class SharedRows(NamedTuple):
    """Where the tokens of R rows stand in P packed sequences, and back. All indices are into flattened arrays.

    Attributes:
        positions: [P, W] position of each packed token in its row: what rotary embeddings are told.
        unpack: [R, T] packed place of each token of a row; padding points at a token that is there.
        pack: [P, W] row place of each packed token, the first row's for a shared one; -1 for padding.
        twice: [P, S] for the first S packed tokens, S the longest common beginning: the second row's place of a shared
            token; -1 for one that is not shared.
        owned: [R, T] whether a token's result is the one that is packed.
    """

    positions: Int[Tensor, "P W"]
    unpack: Int[Tensor, "R T"]
    pack: Int[Tensor, "P W"]
    twice: Int[Tensor, "P S"]
    owned: Tensor


def share_rows(ids_RT: NDArray[np.int64], lengths_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], SharedRows] | None:
    """Pack the rows of pairs, padded on the right; None where it would save too little.

    Returns:
        The packed ids [P, W] and where everything stands.
    """
    num_pairs, width = len(ids_RT) // 2, ids_RT.shape[1]
    first_P, second_P = lengths_R[:num_pairs], lengths_R[num_pairs:]
    alike_PT = np.logical_and.accumulate(ids_RT[:num_pairs] == ids_RT[num_pairs:], axis=1)
    shared_P = np.minimum(alike_PT.sum(axis=1), np.minimum(first_P, second_P) - 1)
    packed = int((first_P + second_P - shared_P).max())
    if packed * num_pairs > MOST_OF_SEPARATE * ids_RT.size:
        return None
    column_T, sequence_P1 = np.arange(width), np.arange(num_pairs)[:, None] * packed
    first_PT = sequence_P1 + column_T
    second_PT = np.where(column_T < shared_P[:, None], first_PT, first_PT + (first_P - shared_P)[:, None])
    is_token_RT = column_T < lengths_R[:, None]
    unpack_RT = np.where(is_token_RT, np.concatenate([first_PT, second_PT]), np.tile(sequence_P1, (2, 1)))
    owned_RT = is_token_RT & (np.arange(len(ids_RT))[:, None] < num_pairs)
    owned_RT[num_pairs:] = is_token_RT[num_pairs:] & (column_T >= shared_P[:, None])
    pack, place_RT = np.full(num_pairs * packed, -1), np.arange(ids_RT.size).reshape(ids_RT.shape)
    pack[unpack_RT[owned_RT]] = place_RT[owned_RT]
    shared_PT = column_T < shared_P[:, None]
    twice_PT = np.where(shared_PT, place_RT[num_pairs:], -1)[:, : int(shared_P.max())]
    packed_ids = np.where(pack >= 0, ids_RT.reshape(-1)[pack], 0).reshape(num_pairs, packed)
    positions = np.where(pack >= 0, pack % width, 0).reshape(num_pairs, packed)
    arrays = (positions, unpack_RT, pack.reshape(num_pairs, packed), twice_PT, owned_RT)
    return packed_ids, SharedRows(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))


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
    apart = [_take_apart(states, shared) for states in (query_PAWD, key_PBWD, value_PBWD)]
    width = shared.unpack.shape[1]
    mask = None
    if sliding_window is not None and width > sliding_window:
        mask = _near(width, sliding_window, query_PAWD.device)
    output_RTAE, _ = attention(module, *apart, mask, sliding_window=sliding_window, **options)
    num_rows, _, *features = output_RTAE.shape
    packed: Tensor = _Pack.apply(output_RTAE.reshape(num_rows * width, -1), shared)
    return packed.view(*shared.pack.shape, *features), None


@functools.lru_cache(maxsize=2)
def _near(width: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, T] the tokens that a token sees through a sliding window: the same for all layers."""
    distance = torch.arange(width, device=device)
    distance = distance[:, None] - distance[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _take_apart(states_PAWD: Tensor, shared: SharedRows) -> Tensor:
    by_place = states_PAWD.transpose(1, 2)
    rows: Tensor = _Unpack.apply(by_place.flatten(2).flatten(0, 1), shared)
    return rows.view(*shared.unpack.shape, *by_place.shape[2:]).transpose(1, 2)


def _picked(values_NF: Tensor, place: Tensor) -> Tensor:
    """The rows at these places, zeros at -1."""
    picked = values_NF.index_select(0, place.clamp(min=0).flatten())
    return picked.mul_((place >= 0).flatten().unsqueeze(1))


class _Unpack(torch.autograd.Function):
    """Packed places to places of rows. The backward pass gathers, too: every place has at most two sources."""

    @staticmethod
    def forward(ctx: Any, packed_NF: Tensor, shared: SharedRows) -> Tensor:
        ctx.shared = shared
        return packed_NF.index_select(0, shared.unpack.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        shared: SharedRows = ctx.shared
        grad = _picked(grad_NF, shared.pack)
        longest = shared.twice.shape[1]
        grad.view(*shared.pack.shape, -1)[:, :longest] += _picked(grad_NF, shared.twice).view(*shared.twice.shape, -1)
        return grad, None


class _Pack(torch.autograd.Function):
    """Places of rows to packed places; a shared token's result is the first row's, which is also the second's."""

    @staticmethod
    def forward(ctx: Any, rows_NF: Tensor, shared: SharedRows) -> Tensor:
        ctx.shared = shared
        return _picked(rows_NF, shared.pack)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        shared: SharedRows = ctx.shared
        grad = grad_NF.index_select(0, shared.unpack.flatten())
        return grad.mul_(shared.owned.flatten().unsqueeze(1)), None
