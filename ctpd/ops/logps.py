"""Log-probabilities of given tokens without the logits of a whole batch.

The output embedding is applied tile by tile: some rows against some of the vocabulary. A tile is float32 (float64 for
float64 inputs), is changed in place, and the next one overwrites it. The extra memory is one tile, and its rounded copy
with 16-bit inputs, whatever the number of rows and the vocabulary. A row's sum of exponentials is accumulated over its
tiles, scaled to the largest logit so far. What is saved for the backward pass depends on what has a gradient:

- the embedding is trained: one number per row; the backward pass computes each tile again;
- the embedding is frozen: the gradient of every log-probability with respect to its hidden state, computed in the
  forward pass while the tiles are in memory. The loss is a function of the log-probabilities, so the incoming gradient
  only scales it, and the backward pass needs no tile at all;
- nothing has a gradient: nothing.

Shape legend: N rows (predicting positions), H hidden size, V vocabulary, R rows and C columns of one tile.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_CACHED = 4 * 2**20  # bytes of a tile on a CPU: it stays in the CPU's cache between the operations on it
_SMALLEST, _LARGEST = 64 * 2**20, 2**30  # on a GPU, where few large operations are better than many small ones
_ROWS = 1024  # of a tile that does not hold the whole vocabulary: enough for full speed of the products


@functools.cache
def tile_bytes_for(device: torch.device) -> int:
    """The bytes of a tile on a device: what fits the cache of a CPU, or a small part of a GPU's memory."""
    if device.type != "cuda":
        return _CACHED
    return min(max(torch.cuda.get_device_properties(device).total_memory // 128, _SMALLEST), _LARGEST)


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    is_last: bool  # of its rows


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


class _Head(NamedTuple):
    """How hidden states become the logits of a tile: ``softcap(scale * (hidden @ weight.T + bias))``."""

    softcap: float | None
    scale: float
    product: torch.dtype  # of the matrix products
    tile: torch.dtype  # of everything else
    tile_bytes: int

    def tiles(self, num_rows: int, num_columns: int) -> Iterator[_Tile]:
        """All tiles, those of the same rows one after another; soft-capping needs a second buffer of the same size."""
        size = max(1, self.tile_bytes // (self.tile.itemsize * (1 if self.softcap is None else 2)))
        rows = max(1, min(num_rows, size, max(_ROWS, size // max(num_columns, 1))))
        columns = max(1, min(num_columns, size // rows))
        for top in range(0, num_rows, rows):
            for left in range(0, num_columns, columns):
                right = min(left + columns, num_columns)
                yield _Tile(slice(top, min(top + rows, num_rows)), slice(left, right), right == num_columns)


def token_logps(
    hidden_NH: Float[Tensor, "N H"],
    weight_VH: Float[Tensor, "V H"],
    targets_N: Int[Tensor, " N"],
    *,
    bias_V: Float[Tensor, " V"] | None = None,
    transform: LogitTransform = NO_TRANSFORM,
    tile_bytes: int | None = None,
) -> Float[Tensor, " N"]:
    """Log-softmax of ``transform(hidden @ weight.T + bias)`` at the target of each row, in nats.

    Exact values and gradients for hidden states, weight and bias; the result is float32, or float64 for float64 inputs.
    With 16-bit inputs, or under autocast, the matrix products are 16-bit, as the model's own logits are; all sums over
    the vocabulary and over tiles are float32.
    Differentiable once. Leave out rows that are not scored (prompt, padding): every row costs a product with V.

    Args:
        hidden_NH: the hidden states that predict the targets.
        weight_VH: the output embedding.
        targets_N: token ids.
        bias_V: of the output embedding; None for none.
        transform: what the model does to its logits.
        tile_bytes: the size of a tile; None for `tile_bytes_for` the device.
    """
    size = tile_bytes_for(hidden_NH.device) if tile_bytes is None else tile_bytes
    head = _Head(transform.softcap, transform.scale, *_dtypes(hidden_NH, weight_VH), size)
    needs_grad = [t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias_V)]
    logps_N: Tensor
    if not (torch.is_grad_enabled() and any(needs_grad)):
        logps_N = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head).logps
    elif any(needs_grad[1:]):
        logps_N = _TrainedHead.apply(hidden_NH, weight_VH, bias_V, targets_N, head)
    else:
        logps_N = _FrozenHead.apply(hidden_NH, weight_VH, bias_V, targets_N, head)
    return logps_N


def token_logps_module(
    hidden_NH: Float[Tensor, "N H"],
    head: Callable[[Tensor], Tensor],
    targets_N: Int[Tensor, " N"],
    *,
    transform: LogitTransform = NO_TRANSFORM,
    tile_rows: int = 256,
) -> Float[Tensor, " N"]:
    """The same for an output embedding that is only known as a module: with an adapter, quantised, replaced.

    The module is called once per tile of ``tile_rows`` rows and again in the backward pass, so that no more than a few
    tiles are alive; its parameters receive their gradients as usual.
    """

    def tile_logps(hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        logits_RV = head(hidden_RH)
        logits_RV = transform(logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)))
        return logits_RV.log_softmax(-1).gather(-1, targets_R.long().unsqueeze(-1)).squeeze(-1)

    tiles = list(zip(torch.split(hidden_NH, tile_rows), torch.split(targets_N, tile_rows), strict=True))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(tile_logps, *tile, use_reentrant=False) for tile in tiles])
    return torch.cat([tile_logps(*tile) for tile in tiles])


def _dtypes(hidden_NH: Tensor, weight_VH: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the matrix products and of the tiles."""
    product = torch.promote_types(hidden_NH.dtype, weight_VH.dtype)
    device = hidden_NH.device.type
    if product != torch.float64 and torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    return product, torch.promote_types(product, torch.float32)


class _Weights(NamedTuple):
    """The output embedding in the dtype of the products, and a buffer that every tile is written into."""

    weight_VH: Tensor
    bias_V: Tensor | None
    buffer: Tensor

    @classmethod
    def of(cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, head: _Head) -> "_Weights":
        tiles = head.tiles(len(hidden_NH), len(weight_VH))
        first = next(tiles, _Tile(slice(0, 0), slice(0, 0), is_last=True))
        size = first.rows.stop * first.columns.stop if head.product == head.tile else 0
        return cls(weight_VH.to(head.product), bias_V, hidden_NH.new_empty(size, dtype=head.tile))

    def logits(self, hidden_RH: Tensor, columns: slice, *, head: _Head) -> tuple[Tensor, Tensor | None]:
        """One tile of logits, to be overwritten, and d softcap(z) / dz there; None without soft-capping."""
        weight_CH = self.weight_VH[columns]
        if head.product == head.tile:
            shape = len(hidden_RH), len(weight_CH)
            tile_RC = self.buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(hidden_RH, weight_CH.T, out=tile_RC)
        else:
            tile_RC = torch.mm(hidden_RH, weight_CH.T).to(head.tile)
        if self.bias_V is not None:
            tile_RC += self.bias_V[columns]
        if head.scale != 1.0:
            tile_RC *= head.scale
        if head.softcap is None:
            return tile_RC, None
        tile_RC.div_(head.softcap).tanh_()
        slopes_RC = tile_RC.square().neg_().add_(1.0)
        tile_RC *= head.softcap
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


class _Sums:
    """What is accumulated of some rows over their tiles. All sums are in units of exp(``largest``).

    Attributes:
        target_R1, slope_R1: the target's logit, and d softcap(z) / dz there.
        largest_R1: the largest logit so far.
        others_R1: the exponentials of all other tokens. Without the target's own, 1 - p is exact where p is nearly 1.
        towards_RH: the sum of their slopes times their embeddings, if the gradient is formed.
    """

    def __init__(self, hidden_RH: Tensor, *, head: _Head, forms_gradient: bool) -> None:
        zeros_R1 = hidden_RH.new_zeros((len(hidden_RH), 1), dtype=head.tile)
        self.target_R1, self.slope_R1, self.others_R1 = zeros_R1, torch.ones_like(zeros_R1), zeros_R1
        self.largest_R1 = torch.full_like(zeros_R1, -torch.inf)
        self.towards_RH = torch.zeros_like(hidden_RH, dtype=head.tile) if forms_gradient else None

    def add(self, tile_RC: Tensor, slopes_RC: Tensor | None, targets: _Targets, weight_CH: Tensor) -> None:
        """Add one tile; it is overwritten."""
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
            product_RC = tile_RC.to(weight_CH.dtype)
            if product_RC.dtype == self.towards_RH.dtype:
                self.towards_RH.mul_(shrink_R1).addmm_(product_RC, weight_CH)
            else:
                self.towards_RH.mul_(shrink_R1).add_(product_RC @ weight_CH)

    @property
    def log_sum_R1(self) -> Tensor:
        """Log-sum-exp of the logits."""
        return self.largest_R1 + self._all_R1.log()

    @property
    def _all_R1(self) -> Tensor:
        return self.others_R1 + (self.target_R1 - self.largest_R1).exp()

    def gradient(self, weight_RH: Tensor, *, head: _Head) -> Tensor:
        """d logp / d hidden [R, H] from the targets' embeddings: no difference of two nearly equal sums."""
        assert self.towards_RH is not None
        own_RH = (self.others_R1 * self.slope_R1) * weight_RH
        return (own_RH - self.towards_RH).mul_(head.scale / self._all_R1)


class _Forward(NamedTuple):
    logps: Tensor
    log_sums: Tensor
    gradients_NH: Tensor | None


def _forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    head: _Head,
    forms_gradient: bool = False,
) -> _Forward:
    """Log-probabilities and log-sum-exp of each row, and d logp / d hidden where asked for."""
    result = _Forward(
        torch.empty(len(hidden_NH), dtype=head.tile, device=hidden_NH.device),
        torch.empty(len(hidden_NH), dtype=head.tile, device=hidden_NH.device),
        torch.empty_like(hidden_NH, dtype=head.product) if forms_gradient else None,
    )
    targets_N = targets_N.long()
    with torch.autocast(hidden_NH.device.type, enabled=False):
        left_NH = hidden_NH.to(head.product)
        weights = _Weights.of(left_NH, weight_VH, bias_V, head=head)
        sums = None
        for rows, columns, is_last in head.tiles(len(hidden_NH), len(weight_VH)):
            sums = sums or _Sums(left_NH[rows], head=head, forms_gradient=forms_gradient)
            tile_RC, slopes_RC = weights.logits(left_NH[rows], columns, head=head)
            sums.add(tile_RC, slopes_RC, _Targets.of(targets_N[rows], columns), weights.weight_VH[columns])
            if is_last:
                result.log_sums[rows] = sums.log_sum_R1.squeeze(1)
                result.logps[rows] = sums.target_R1.squeeze(1) - result.log_sums[rows]
                if result.gradients_NH is not None:
                    result.gradients_NH[rows] = sums.gradient(weights.weight_VH[targets_N[rows]], head=head).to(
                        head.product
                    )
                sums = None
    return result


class _FrozenHead(torch.autograd.Function):
    """Only the hidden states have a gradient: it is formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: _Head
    ) -> Tensor:
        result = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head, forms_gradient=True)
        ctx.save_for_backward(result.gradients_NH)
        ctx.hidden_dtype = hidden_NH.dtype
        return result.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradients_NH,) = ctx.saved_tensors
        return (grad_N.unsqueeze(1) * gradients_NH).to(ctx.hidden_dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """The output embedding has a gradient: every tile is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: _Head
    ) -> Tensor:
        result = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, result.log_sums)
        ctx.head = head
        return result.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, log_sums_N = ctx.saved_tensors
        head: _Head = ctx.head
        targets_N, log_sums_N1, grad_N1 = targets_N.long(), log_sums_N.unsqueeze(1), grad_N.unsqueeze(1).to(head.tile)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sums over tiles are kept in the tile's dtype and rounded once to the parameter's.
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=head.tile) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=head.tile) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=head.tile) if needs_bias else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            left_NH = hidden_NH.to(head.product)
            weights = _Weights.of(left_NH, weight_VH, bias_V, head=head)
            for rows, columns, _ in head.tiles(len(hidden_NH), len(weight_VH)):
                tile_RC, slopes_RC = weights.logits(left_NH[rows], columns, head=head)
                tile_RC.sub_(log_sums_N1[rows]).exp_().mul_(-grad_N1[rows])
                # grad * (onehot - p), complete before the products: in 16 bits the difference of two products would
                # drown the small gradient of a token that is nearly certain.
                _Targets.of(targets_N[rows], columns).add(tile_RC, grad_N1[rows])
                if slopes_RC is not None:
                    tile_RC *= slopes_RC
                if head.scale != 1.0:
                    tile_RC *= head.scale
                if grad_bias_V is not None:
                    grad_bias_V[columns] += tile_RC.sum(0)
                product_RC = tile_RC.to(head.product)
                if grad_hidden_NH is not None:
                    _add_product(grad_hidden_NH[rows], product_RC, weights.weight_VH[columns])
                if grad_weight_VH is not None:
                    _add_product(grad_weight_VH[columns], product_RC.T, left_NH[rows])
        return (
            None if grad_hidden_NH is None else grad_hidden_NH.to(hidden_NH.dtype),
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
        )


def _add_product(sum_AB: Tensor, left_AK: Tensor, right_KB: Tensor) -> None:
    """``sum += left @ right``, where the sum may be of higher precision."""
    if left_AK.dtype == sum_AB.dtype:
        sum_AB.addmm_(left_AK, right_KB)
    else:
        sum_AB += left_AK @ right_KB
