"""Tiles of logits: how they are cut, what is done to one, and what is accumulated over them (see `ctpd.ops.logps`).

Shape legend: N rows (predicting positions), H hidden size, V vocabulary, R rows and C columns of one tile.
"""

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class _Layout(NamedTuple):
    """What tiles look like on a kind of device.

    Attributes:
        size: bytes of a tile.
        rows: the most rows of a tile that does not hold the whole vocabulary: enough for full speed of the products.
        multiple: of the number of columns of such a tile.
    """

    size: int
    rows: int
    multiple: int


# On a CPU a tile stays in the cache between the operations on it. On a GPU few large operations are better than many
# small ones; all rows together, so that the weight's gradient is complete with a tile, and products of aligned rows.
_CPU, _GPU = _Layout(4 * 2**20, 1024, 1), _Layout(256 * 2**20, 16384, 128)
_ROWS = 2048  # of which the gradient is formed at a time: that needs copies of them


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: Triton is there, and what it compiles them with."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from ctpd.kernels import try_on

        try_on(device)
    except Exception as error:  # no C compiler, no folder for what is compiled, a GPU that Triton does not know
        warnings.warn(
            f"Triton does not compile kernels for {device} ({error}): the output head uses torch's operations, which are "
            "slower there. Triton needs a C compiler (`CC`), and writes to `~/.triton` or `TRITON_CACHE_DIR`",
            stacklevel=2,
        )
        return False
    return True


class Tile(NamedTuple):
    """Rows and columns; whether they are the first and the last of what is added up (see `TiledHead.tiles`)."""

    rows: slice
    columns: slice
    is_first: bool
    is_last: bool


class LogitTransform(NamedTuple):
    """What a model does to its logits after the output embedding: ``z -> softcap * tanh(scale * z / softcap)``.

    Attributes:
        scale: factor of the logits (Cohere, Granite, Falcon H1).
        softcap: bound of the logits (Gemma 2); None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits_RV: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """The transformed logits, a new tensor unless there is nothing to do."""
        if self.scale != 1.0:
            logits_RV = logits_RV * self.scale
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)


NO_TRANSFORM = LogitTransform()


class TiledHead(NamedTuple):
    """How hidden states become the logits of a tile: ``transform(hidden @ weight.T + bias)``."""

    transform: LogitTransform
    product: torch.dtype  # of the matrix products
    tile: torch.dtype  # of everything else
    layout: _Layout
    is_fused: bool  # the passes over a tile are Triton kernels

    @classmethod
    def of(cls, hidden_NH: Tensor, weight_VH: Tensor, transform: LogitTransform, tile_bytes: int | None) -> "TiledHead":
        """The head of these states and this weight; ``tile_bytes`` None for what suits the device."""
        product, tile = _dtypes(hidden_NH, weight_VH)
        device = hidden_NH.device
        layout = _GPU if device.type == "cuda" else _CPU
        layout = layout if tile_bytes is None else layout._replace(size=tile_bytes)
        is_fused = tile == torch.float32 and _has_kernels(device)
        return cls(transform, product, tile, layout, is_fused)

    def tiles(self, num_rows: int, num_columns: int, *, by_columns: bool = False) -> Iterator[Tile]:
        """All tiles, those of the same rows one after another, or those of the same columns.

        Soft-capping needs a second buffer of the same size.
        """
        itemsize = self.product.itemsize if self.is_fused else self.tile.itemsize
        buffers = 1 if self.transform.softcap is None or self.is_fused else 2
        size = max(1, self.layout.size // (itemsize * buffers))
        height = max(1, min(num_rows, size, max(self.layout.rows, size // max(num_columns, 1))))
        width = max(1, min(num_columns, size // height))
        if self.layout.multiple < width < num_columns:
            width -= width % self.layout.multiple
        rows, columns = _slices(num_rows, height), _slices(num_columns, width)
        if by_columns:
            return (Tile(r, c, r is rows[0], r is rows[-1]) for c in columns for r in rows)
        return (Tile(r, c, c is columns[0], c is columns[-1]) for r in rows for c in columns)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _dtypes(hidden_NH: Tensor, weight_VH: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the matrix products and of the tiles."""
    product = torch.promote_types(hidden_NH.dtype, weight_VH.dtype)
    device = hidden_NH.device.type
    if product != torch.float64 and torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    return product, torch.promote_types(product, torch.float32)


class Weights(NamedTuple):
    """The output embedding in the dtype of the products, and a buffer that every tile is written into."""

    weight_VH: Tensor
    bias_V: Tensor | None
    buffer: Tensor
    head: TiledHead

    @classmethod
    def of(cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, head: TiledHead) -> "Weights":
        """Weight and bias for the tiles of these hidden states."""
        first = next(head.tiles(len(hidden_NH), len(weight_VH)), None)
        size = 0 if first is None else first.rows.stop * first.columns.stop
        bias_V = None if bias_V is None else bias_V.contiguous()
        return cls(weight_VH.to(head.product), bias_V, hidden_NH.new_empty(size, dtype=head.product), head)

    def product(self, hidden_RH: Tensor, columns: slice) -> Tensor:
        """Hidden states times some columns, to be overwritten."""
        weight_CH = self.weight_VH[columns]
        shape = len(hidden_RH), len(weight_CH)
        return torch.mm(hidden_RH, weight_CH.T, out=self.buffer[: shape[0] * shape[1]].view(shape))

    def logits(self, product_RC: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        """One tile of logits, to be overwritten, and d softcap(z) / dz there; None without soft-capping."""
        scale, softcap = self.head.transform
        tile_RC = product_RC.to(self.head.tile)
        if self.bias_V is not None:
            tile_RC += self.bias_V[columns]
        if scale != 1.0:
            tile_RC *= scale
        if softcap is None:
            return tile_RC, None
        tile_RC.div_(softcap).tanh_()
        slopes_RC = tile_RC.square().neg_().add_(1.0)
        tile_RC *= softcap
        return tile_RC, slopes_RC


class _Targets(NamedTuple):
    """Where the targets of some rows are in a tile, if they are there."""

    column_R1: Tensor
    is_here_R1: Tensor

    @classmethod
    def of(cls, targets_R: Tensor, columns: slice) -> "_Targets":
        column_R1 = (targets_R - columns.start).unsqueeze(1)
        width = columns.stop - columns.start
        return cls(column_R1.clamp(0, width - 1), (column_R1 >= 0) & (column_R1 < width))

    def taken(self, tile_RC: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(self.is_here_R1, tile_RC.gather(1, self.column_R1), otherwise)

    def clear(self, tile_RC: Tensor) -> None:
        """Set them to zero."""
        tile_RC.scatter_(1, self.column_R1, tile_RC.gather(1, self.column_R1).masked_fill_(self.is_here_R1, 0.0))

    def add(self, tile_RC: Tensor, value_R1: Tensor) -> None:
        tile_RC.scatter_add_(1, self.column_R1, value_R1.masked_fill(~self.is_here_R1, 0.0))


class Sums:
    """What is accumulated of some rows over their tiles. All sums are in units of exp(``largest``).

    Attributes:
        target_R1, slope_R1: the target's logit, and d softcap(z) / dz there.
        largest_R1: the largest logit so far.
        others_R1: the exponentials of all other tokens. Without the target's own, 1 - p is exact where p is nearly 1.
        towards_RH: the sum of their slopes times their embeddings, if the gradient is formed.
    """

    def __init__(self, hidden_RH: Tensor, *, head: TiledHead, forms_gradient: bool) -> None:
        zeros_R1 = hidden_RH.new_zeros((len(hidden_RH), 1), dtype=head.tile)
        self.head = head
        self.target_R1, self.slope_R1, self.others_R1 = zeros_R1, torch.ones_like(zeros_R1), zeros_R1
        self.largest_R1 = torch.full_like(zeros_R1, -torch.inf)
        self.towards_RH = torch.zeros_like(hidden_RH, dtype=head.tile) if forms_gradient else None

    @classmethod
    def of(cls, hidden_RH: Tensor, *, head: TiledHead, forms_gradient: bool) -> "Sums":
        """The sums of rows of which no tile has been seen."""
        kind = _FusedSums if head.is_fused else Sums
        return kind(hidden_RH, head=head, forms_gradient=forms_gradient)

    def add(self, product_RC: Tensor, columns: slice, targets_R: Tensor, weights: Weights) -> None:
        """Add one tile; it is overwritten."""
        tile_RC, slopes_RC = weights.logits(product_RC, columns)
        targets = _Targets.of(targets_R, columns)
        self.target_R1 = targets.taken(tile_RC, self.target_R1)
        largest_R1 = torch.maximum(self.largest_R1, tile_RC.amax(1, keepdim=True))
        tile_RC.sub_(largest_R1).exp_()
        targets.clear(tile_RC)
        shrink_R1 = (self.largest_R1 - largest_R1).exp_()
        self.others_R1, self.largest_R1 = self.others_R1 * shrink_R1 + tile_RC.sum(1, keepdim=True), largest_R1
        if self.towards_RH is not None:
            if slopes_RC is not None:
                self.slope_R1 = targets.taken(slopes_RC, self.slope_R1)
                tile_RC *= slopes_RC
            self._add_towards(tile_RC, shrink_R1, weights.weight_VH[columns])

    def _add_towards(self, tile_RC: Tensor, shrink_R1: Tensor, weight_CH: Tensor) -> None:
        assert self.towards_RH is not None
        self.towards_RH *= shrink_R1
        multiply(tile_RC.to(weight_CH.dtype), weight_CH, out=self.towards_RH, add=True)

    @property
    def log_sum_R1(self) -> Tensor:
        """Log-sum-exp of the logits."""
        return self.largest_R1 + self._all_R1.log()

    @property
    def _all_R1(self) -> Tensor:
        return self.others_R1 + (self.target_R1 - self.largest_R1).exp()

    def write_gradient(self, weight_VH: Tensor, targets_R: Tensor, *, out_RH: Tensor) -> None:
        """Write d logp / d hidden, from the targets' embeddings: no difference of two nearly equal sums."""
        assert self.towards_RH is not None
        factor_R1, all_R1 = self.others_R1 * self.slope_R1, self._all_R1
        for part in _slices(len(out_RH), _ROWS):
            own_RH = factor_R1[part] * weight_VH[targets_R[part]]
            out_RH[part] = own_RH.sub_(self.towards_RH[part]).mul_(self.head.transform.scale / all_R1[part])


class _FusedSums(Sums):
    """The same from one kernel a tile."""

    def __init__(self, hidden_RH: Tensor, *, head: TiledHead, forms_gradient: bool) -> None:
        from ctpd.kernels import new_statistics

        super().__init__(hidden_RH, head=head, forms_gradient=forms_gradient)
        self._statistics_SR = new_statistics(len(hidden_RH), hidden_RH.device)
        views_R1 = self._statistics_SR.unsqueeze(-1).unbind()
        self.target_R1, self.slope_R1, self.largest_R1, self.others_R1, self._shrink_R1 = views_R1

    def add(self, product_RC: Tensor, columns: slice, targets_R: Tensor, weights: Weights) -> None:
        """Add one tile; it is overwritten."""
        from ctpd.kernels import TileOf, accumulate

        tile_of = TileOf(columns.start, weights.bias_V, *self.head.transform)
        accumulate(product_RC, targets_R, self._statistics_SR, tile_of, keep=self.towards_RH is not None)
        if self.towards_RH is not None:
            self._add_towards(product_RC, self._shrink_R1, weights.weight_VH[columns])


class OfRows(NamedTuple):
    """What the backward pass has of some rows."""

    targets_R: Tensor
    log_sums_R: Tensor
    incoming_R: Tensor

    def slice(self, rows: slice) -> "OfRows":
        """The same of fewer rows."""
        return OfRows(*(of_row[rows] for of_row in self))


def to_gradient(tile_RC: Tensor, columns: slice, of_rows: OfRows, weights: Weights) -> Tensor:
    """From a matrix product, which is overwritten, to the gradient with respect to it.

    It is grad * (onehot - p), complete before the products: in 16 bits the difference of two products would drown the
    small gradient of a token that is nearly certain.
    """
    transform = weights.head.transform
    if weights.head.is_fused:
        from ctpd.kernels import TileOf, differentiate

        differentiate(tile_RC, *of_rows, TileOf(columns.start, weights.bias_V, *transform))
        return tile_RC
    tile_RC, slopes_RC = weights.logits(tile_RC, columns)
    incoming_R1 = of_rows.incoming_R.unsqueeze(1)
    tile_RC.sub_(of_rows.log_sums_R.unsqueeze(1)).exp_().mul_(-incoming_R1)
    _Targets.of(of_rows.targets_R, columns).add(tile_RC, incoming_R1)
    if slopes_RC is not None:
        tile_RC *= slopes_RC
    if transform.scale != 1.0:
        tile_RC *= transform.scale
    return tile_RC


class ColumnSums:
    """The gradient of the output embedding, which gets its tiles column by column."""

    def __init__(self, weight_VH: Tensor, *, head: TiledHead) -> None:
        self.result_VH, self._dtype = torch.zeros_like(weight_VH), head.tile
        self._sum_CH = self.result_VH

    def add(self, tile_RC: Tensor, hidden_RH: Tensor, tile: Tile) -> None:
        """Add ``tile.T @ hidden`` to the tile's columns."""
        result_CH = self.result_VH[tile.columns]
        is_all = tile.is_first and tile.is_last
        if tile.is_first:
            is_exact = result_CH.dtype == self._dtype or (is_all and result_CH.dtype == tile_RC.dtype)
            self._sum_CH = result_CH if is_exact else torch.empty_like(result_CH, dtype=self._dtype)
        multiply(tile_RC.T, hidden_RH, out=self._sum_CH, add=not tile.is_first)
        if tile.is_last and self._sum_CH is not result_CH:
            result_CH.copy_(self._sum_CH)


def multiply(left_AK: Tensor, right_KB: Tensor, *, out: Tensor, add: bool) -> None:
    """``out = left @ right``, or ``out += left @ right``, where ``out`` may be of higher precision."""
    if left_AK.dtype == out.dtype:
        torch.addmm(out, left_AK, right_KB, beta=int(add), out=out)
    elif left_AK.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(out, left_AK, right_KB, beta=int(add), out_dtype=out.dtype, out=out)  # not rounded in between
    elif add:
        out += left_AK @ right_KB
    else:
        out.copy_(left_AK @ right_KB)
