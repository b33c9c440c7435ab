"""Log-probabilities of given tokens without the logits of a whole batch.

The output embedding is applied to tiles of rows. A tile is float32 (float64 for float64 inputs), is worked on in place
and is dropped: peak extra memory is O(tile x vocabulary), whatever the number of rows. What is saved for the backward
pass depends on what has a gradient:

- the embedding is trained: one number per row; the backward pass computes each tile again;
- the embedding is frozen: the gradient of every log-probability with respect to its hidden state, formed in the
  forward pass while the tile is there. The loss is a function of the log-probabilities, so the incoming gradient only
  scales it, and the backward pass needs no tile at all;
- nothing has a gradient: nothing.

Shape legend: N rows (predicting positions), H hidden size, V vocabulary, R rows of one tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# About 256 rows of a vocabulary of 128k: large enough for full speed of the matrix product, small beside a model.
_TILE_BYTES = 128 * 2**20
# Vocabulary entries per block where a 16-bit product is added to a float32 sum.
_BLOCK = 2**14


class _Head(NamedTuple):
    """How hidden states become the logits of a tile: ``softcap(scale * (hidden @ weight.T + bias))``."""

    softcap: float | None
    scale: float
    product: torch.dtype  # of the matrix products
    tile: torch.dtype  # of everything else
    tile_bytes: int

    def slices(self, num_rows: int, num_columns: int) -> Iterator[slice]:
        """Cut the rows into tiles; soft-capping needs a second buffer of the same size."""
        buffers = 1 if self.softcap is None else 2
        step = max(1, self.tile_bytes // (buffers * self.tile.itemsize * max(num_columns, 1)))
        return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def token_logps(
    hidden_NH: Float[Tensor, "N H"],
    weight_VH: Float[Tensor, "V H"],
    targets_N: Int[Tensor, " N"],
    *,
    bias_V: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    tile_bytes: int = _TILE_BYTES,
) -> Float[Tensor, " N"]:
    """Log-softmax of ``softcap(scale * (hidden @ weight.T + bias))`` at the target of each row, in nats.

    ``softcap(z)`` is ``softcap * tanh(z / softcap)``. Exact values and gradients for hidden states, weight and bias;
    the result is float32, or float64 for float64 inputs. With 16-bit inputs, or under autocast, the matrix products
    are 16-bit, as the model's own logits are; all sums over the vocabulary and over tiles are float32.
    Differentiable once. Leave out rows that are not scored (prompt, padding): every row costs a product with V.

    Args:
        tile_bytes: the size of a tile; at least one row is taken.
    """
    head = _Head(softcap, scale, *_dtypes(hidden_NH, weight_VH), tile_bytes)
    needs_grad = [t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias_V)]
    logps_N: Tensor
    if not (torch.is_grad_enabled() and any(needs_grad)):
        logps_N = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head)
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
    softcap: float | None = None,
    scale: float = 1.0,
    tile_rows: int = 256,
) -> Float[Tensor, " N"]:
    """The same for an output embedding that is only known as a module: with an adapter, quantised, replaced.

    The module is called once per tile of ``tile_rows`` rows and again in the backward pass, so that no more than a few
    tiles are alive; its parameters receive their gradients as usual.
    """

    def tile_logps(hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        logits_RV = head(hidden_RH)
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) * scale
        if softcap is not None:
            logits_RV = softcap * torch.tanh(logits_RV / softcap)
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


def _logits(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, head: _Head) -> Tensor:
    """One tile of logits, in a buffer that the caller may overwrite."""
    logits_RV = torch.mm(hidden_RH, weight_VH.T).to(head.tile)
    if bias_V is not None:
        logits_RV += bias_V
    if head.scale != 1.0:
        logits_RV *= head.scale
    if head.softcap is not None:
        logits_RV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_RV


def _softcap_slopes(logits_RV: Tensor, *, head: _Head) -> Tensor | None:
    """d softcap(z) / dz as a function of softcap(z), in a second buffer; None without soft-capping."""
    if head.softcap is None:
        return None
    return (logits_RV / head.softcap).square_().neg_().add_(1.0)


def _exponentials(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite a tile with exp(logits - maximum). Returns (logp, log-sum-exp, sum of the exponentials) of each row."""
    target_R = logits_RV.gather(1, targets_R.unsqueeze(1)).squeeze(1)
    maximum_R = logits_RV.amax(1)
    logits_RV.sub_(maximum_R.unsqueeze(1)).exp_()
    sum_R = logits_RV.sum(1)
    log_sum_R = sum_R.log()
    return target_R - maximum_R - log_sum_R, maximum_R + log_sum_R, sum_R


def _forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    head: _Head,
    logsumexp_N: Tensor | None = None,
    slopes_NH: Tensor | None = None,
) -> Tensor:
    """Log-probabilities, tile by tile. Fills, where given, the log-sum-exp and d logp / d hidden of each row."""
    logps_N = torch.empty(len(hidden_NH), dtype=head.tile, device=hidden_NH.device)
    targets_N = targets_N.long()

    def one_tile(rows: slice) -> None:  # a function, so that its tile is gone before the next one is made
        tile_RV = _logits(hidden_NH[rows], weight_VH, bias_V, head=head)
        softcap_RV = _softcap_slopes(tile_RV, head=head) if slopes_NH is not None else None
        logps_N[rows], logsumexp_R, sum_R = _exponentials(tile_RV, targets_N[rows])
        if logsumexp_N is not None:
            logsumexp_N[rows] = logsumexp_R
        if slopes_NH is not None:
            # d logp / d logits = onehot - p, complete before the product: in 16 bits the difference of two products
            # would drown the small gradient of a token that is nearly certain.
            tile_RV.mul_(-1.0 / sum_R.unsqueeze(1))
            _add_to_targets(tile_RV, targets_N[rows], 1.0)
            _through_softcap_and_scale(tile_RV, softcap_RV, head=head)
            slopes_NH[rows] = tile_RV.to(head.product) @ weight_VH

    with torch.autocast(hidden_NH.device.type, enabled=False):
        hidden_NH, weight_VH = hidden_NH.to(head.product), weight_VH.to(head.product)
        for rows in head.slices(len(hidden_NH), len(weight_VH)):
            one_tile(rows)
    return logps_N


def _add_to_targets(tile_RV: Tensor, targets_R: Tensor, value: Tensor | float) -> None:
    rows_R = torch.arange(len(targets_R), device=targets_R.device)
    tile_RV[rows_R, targets_R] += value


def _through_softcap_and_scale(tile_RV: Tensor, softcap_RV: Tensor | None, *, head: _Head) -> None:
    """From the gradient of the final logits to that of ``hidden @ weight.T + bias``, in place."""
    if softcap_RV is not None:
        tile_RV *= softcap_RV
    if head.scale != 1.0:
        tile_RV *= head.scale


class _FrozenHead(torch.autograd.Function):
    """Only the hidden states have a gradient: it is formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: _Head
    ) -> Tensor:
        slopes_NH = torch.empty_like(hidden_NH, dtype=head.product)
        logps_N = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head, slopes_NH=slopes_NH)
        ctx.save_for_backward(slopes_NH)
        ctx.hidden_dtype = hidden_NH.dtype
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_NH,) = ctx.saved_tensors
        return (grad_N.unsqueeze(1) * slopes_NH).to(ctx.hidden_dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """The output embedding has a gradient: every tile is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: _Head
    ) -> Tensor:
        logsumexp_N = torch.empty(len(hidden_NH), dtype=head.tile, device=hidden_NH.device)
        logps_N = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head, logsumexp_N=logsumexp_N)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N)
        ctx.head = head
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N = ctx.saved_tensors
        head: _Head = ctx.head
        targets_N = targets_N.long()
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        # Sums over tiles are kept in the tile's dtype and rounded once to the parameter's.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=head.tile) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=head.tile) if needs_bias else None
        left_NH, right_VH = hidden_NH.to(head.product), weight_VH.to(head.product)

        def one_tile(rows: slice) -> None:
            tile_RV = _logits(left_NH[rows], right_VH, bias_V, head=head)
            softcap_RV = _softcap_slopes(tile_RV, head=head)
            grad_R = grad_N[rows].to(head.tile)
            tile_RV.sub_(logsumexp_N[rows].unsqueeze(1)).exp_().mul_(-grad_R.unsqueeze(1))
            _add_to_targets(tile_RV, targets_N[rows], grad_R)
            _through_softcap_and_scale(tile_RV, softcap_RV, head=head)
            if grad_bias_V is not None:
                grad_bias_V.add_(tile_RV.sum(0))
            product_RV = tile_RV.to(head.product)
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = (product_RV @ right_VH).to(hidden_NH.dtype)
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, product_RV, left_NH[rows])

        with torch.autocast(hidden_NH.device.type, enabled=False):
            for rows in head.slices(len(hidden_NH), len(weight_VH)):
                one_tile(rows)
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
        )


def _add_product(sum_VH: Tensor, left_RV: Tensor, right_RH: Tensor) -> None:
    """``sum += left.T @ right``. A 16-bit product is taken in blocks, so that no second [V, H] is ever alive."""
    if left_RV.dtype == sum_VH.dtype:
        sum_VH.addmm_(left_RV.T, right_RH)
        return
    for start in range(0, len(sum_VH), _BLOCK):
        block = slice(start, start + _BLOCK)
        sum_VH[block] += left_RV[:, block].T @ right_RH
