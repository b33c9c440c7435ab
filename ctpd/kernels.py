"""The two passes over a tile of logits as Triton kernels: what `ctpd.ops.tiles` does on a GPU, and in torch elsewhere.

In torch each pass is half a dozen operations, and each of them reads and writes a float32 copy of the tile. Here a tile
stays what the matrix product has made, 16-bit with 16-bit inputs; a kernel reads it from memory once, and overwrites it
where the pass makes something of it. All arithmetic is float32; what is written is rounded to the dtype of the tile.

Shape legend: R rows and C columns of one tile, V vocabulary, S statistics of a row (`STATISTICS`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

STATISTICS = ("target", "slope", "largest", "others", "shrink")
"""Of a row, float32, see `accumulate`: the target's logit; d softcap(z) / dz there; the largest logit so far; the sum of
exp(logit - largest) over all other tokens; exp(largest before - largest), by which sums of earlier tiles are to be scaled."""

_BLOCK = 2048  # columns that one program has in its registers at a time
_WARPS = 8


class TileOf(NamedTuple):
    """Which columns a tile has, and what becomes of the matrix product there: ``softcap(scale * (product + bias))``.

    Attributes:
        first: the first column's token.
        bias_V: of the output embedding, of all tokens; None for none.
        scale: factor of the logits.
        softcap: bound of the logits; None for none.
    """

    first: int
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def new_statistics(num_rows: int, device: torch.device) -> Float[Tensor, "S R"]:
    """The statistics of rows of which no tile has been seen."""
    statistics_SR = torch.zeros(len(STATISTICS), num_rows, device=device)
    statistics_SR[STATISTICS.index("slope")] = 1.0
    statistics_SR[STATISTICS.index("largest")] = -torch.inf
    return statistics_SR


def accumulate(
    tile_RC: Float[Tensor, "R C"],
    targets_R: Int[Tensor, " R"],
    statistics_SR: Float[Tensor, "S R"],
    tile_of: TileOf,
    *,
    keep: bool,
) -> None:
    """Add one tile to the statistics of its rows.

    Args:
        tile_RC: the matrix product, contiguous.
        targets_R: token ids.
        statistics_SR: changed in place.
        tile_of: the tile's columns, and what is done to the product.
        keep: overwrite the tile with slope * exp(logit - largest), zero at the target.
    """
    with torch.cuda.device_of(tile_RC):  # Triton launches on the current device
        _accumulate[(len(tile_RC),)](
            tile_RC,
            targets_R,
            tile_RC if tile_of.bias_V is None else tile_of.bias_V,
            statistics_SR,
            tile_of.first,
            *tile_RC.shape,
            tile_of.scale,
            1.0 if tile_of.softcap is None else tile_of.softcap,
            HAS_BIAS=tile_of.bias_V is not None,
            HAS_SOFTCAP=tile_of.softcap is not None,
            KEEP=keep,
            BLOCK=min(_BLOCK, triton.next_power_of_2(tile_RC.shape[1])),
            num_warps=_WARPS,
        )


def differentiate(
    tile_RC: Float[Tensor, "R C"],
    targets_R: Int[Tensor, " R"],
    log_sums_R: Float[Tensor, " R"],
    incoming_R: Float[Tensor, " R"],
    tile_of: TileOf,
) -> None:
    """Overwrite a tile with the gradient of ``sum(incoming * logps)`` with respect to the matrix product.

    Args:
        tile_RC: the matrix product, contiguous.
        targets_R: token ids.
        log_sums_R: log-sum-exp of each row's logits, float32.
        incoming_R: float32.
        tile_of: the tile's columns, and what is done to the product.
    """
    block = min(_BLOCK, triton.next_power_of_2(tile_RC.shape[1]))
    with torch.cuda.device_of(tile_RC):  # Triton launches on the current device
        _differentiate[(len(tile_RC), triton.cdiv(tile_RC.shape[1], block))](
            tile_RC,
            targets_R,
            tile_RC if tile_of.bias_V is None else tile_of.bias_V,
            log_sums_R,
            incoming_R,
            tile_of.first,
            tile_RC.shape[1],
            tile_of.scale,
            1.0 if tile_of.softcap is None else tile_of.softcap,
            HAS_BIAS=tile_of.bias_V is not None,
            HAS_SOFTCAP=tile_of.softcap is not None,
            BLOCK=block,
            num_warps=_WARPS,
        )


def try_on(device: torch.device) -> None:
    """Compile the kernels and run them.

    Raises:
        Exception: whatever Triton raises where it cannot.
    """
    one_R = torch.zeros(1, device=device)
    tile_RC = torch.zeros(1, 16, device=device, dtype=torch.bfloat16)
    tile_of = TileOf(0, None, 1.0, None)
    accumulate(tile_RC, one_R.long(), new_statistics(1, device), tile_of, keep=True)
    differentiate(tile_RC, one_R.long(), one_R, one_R, tile_of)
    tile_RC.sum().item()  # waits for it


@triton.jit
def _logits(product, bias_at, is_column, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The logits, and their slopes before they are scaled."""
    logits = product.to(tl.float32)
    if HAS_BIAS:
        logits += tl.load(bias_at, mask=is_column, other=0.0).to(tl.float32)
    logits = logits * scale
    slopes = tl.full(logits.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        bounded = 2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0  # tanh
        logits = softcap * bounded
        slopes = 1.0 - bounded * bounded
    return logits, slopes


@triton.jit
def _accumulate(
    tile,
    targets,
    bias,
    statistics,
    first,
    num_rows,
    num_columns,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a row."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(targets + row) - first
    begin = tile + row * num_columns
    target_at, slope_at = statistics + row, statistics + num_rows + row
    largest_at, others_at = statistics + 2 * num_rows + row, statistics + 3 * num_rows + row
    is_here = (own >= 0) & (own < num_columns)
    # Read before anything is overwritten: the reductions below wait for all threads.
    target = tl.load(begin + own, mask=is_here, other=0.0)
    target, slope = _logits(target, bias + first + own, is_here, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(target_at, target, mask=is_here)
    tl.store(slope_at, slope, mask=is_here)
    before = tl.load(largest_at)
    largest = tl.maximum(before, tl.where(is_here, target, -float("inf")))

    # Each lane of the block has its own largest logit and its own sum, relative to that.
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for left in range(0, num_columns, BLOCK):
        columns = left + tl.arange(0, BLOCK)
        is_column = columns < num_columns
        product = tl.load(begin + columns, mask=is_column, other=0.0)
        logits, _ = _logits(product, bias + first + columns, is_column, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        is_other = is_column & (columns != own) & (logits != -float("inf"))
        if not KEEP:
            above = logits - highest
            term = tl.exp(-tl.abs(above))
            sums = tl.where(is_other, tl.where(above > 0.0, sums * term + 1.0, sums + term), sums)
        highest = tl.maximum(highest, tl.where(is_other, logits, -float("inf")))
    largest = tl.maximum(largest, tl.max(highest, axis=0))
    if KEEP:  # what is kept is relative to the largest of all: a second look, which the cache answers
        for left in range(0, num_columns, BLOCK):
            columns = left + tl.arange(0, BLOCK)
            is_column = columns < num_columns
            product = tl.load(begin + columns, mask=is_column, other=0.0)
            logits, slopes = _logits(product, bias + first + columns, is_column, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            terms = tl.where(is_column & (columns != own), tl.exp(logits - largest), 0.0)
            sums += terms
            tl.store(begin + columns, (terms * slopes).to(tile.dtype.element_ty), mask=is_column)
    else:
        sums *= tl.exp(highest - largest)
    shrink = tl.exp(before - largest)
    tl.store(largest_at, largest)
    tl.store(others_at, tl.load(others_at) * shrink + tl.sum(sums, axis=0))
    tl.store(statistics + 4 * num_rows + row, shrink)


@triton.jit
def _differentiate(
    tile,
    targets,
    bias,
    log_sums,
    incoming,
    first,
    num_columns,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_columns
    at = tile + row * num_columns + columns
    product = tl.load(at, mask=is_column, other=0.0)
    logits, slopes = _logits(product, bias + first + columns, is_column, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    is_target = (columns + first == tl.load(targets + row)).to(tl.float32)
    # Complete before the products: see `ctpd.ops.tiles.to_gradient`.
    towards_logits = tl.load(incoming + row) * (is_target - tl.exp(logits - tl.load(log_sums + row)))
    tl.store(at, (towards_logits * slopes * scale).to(tile.dtype.element_ty), mask=is_column)
