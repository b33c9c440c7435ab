"""Log-probabilities of given tokens without the logits of a whole batch.

The output embedding is applied tile by tile: some rows against some of the vocabulary. A tile is changed in place, and
the next one overwrites it; the extra memory is one tile, whatever the number of rows and the vocabulary, with 16-bit
inputs its float32 copy, and the float32 gradient of its hidden states. On a GPU no tile is copied: Triton kernels read
and overwrite the product itself (`ctpd.kernels`). A row's sum of exponentials is accumulated over its tiles, scaled to the largest logit so far. What is
saved for the backward pass depends on what has a gradient:

- the embedding is trained: one number per row; the backward pass computes each tile again;
- the embedding is frozen: the gradient of every log-probability with respect to its hidden state, computed in the
  forward pass while the tiles are in memory. The loss is a function of the log-probabilities, so the incoming gradient
  only scales it, and the backward pass needs no tile at all;
- nothing has a gradient: nothing.

Shape legend: N rows (predicting positions), H hidden size, V vocabulary, R rows and C columns of one tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ctpd.ops.tiles import (
    NO_TRANSFORM,
    ColumnSums,
    LogitTransform,
    OfRows,
    Sums,
    TiledHead,
    Weights,
    multiply,
    to_gradient,
)


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
        tile_bytes: the size of a tile; None for what suits the device.
    """
    head = TiledHead.of(hidden_NH, weight_VH, transform, tile_bytes)
    needs_grad = [t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias_V)]
    if needs_grad[2]:
        head = head._replace(is_fused=False)  # the bias' gradient is a sum of what a kernel would have rounded
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
    head: TiledHead,
    forms_gradient: bool = False,
) -> _Forward:
    """Log-probabilities and log-sum-exp of each row, and d logp / d hidden where asked for."""
    result = _Forward(
        torch.empty(len(hidden_NH), dtype=head.tile, device=hidden_NH.device),
        torch.empty(len(hidden_NH), dtype=head.tile, device=hidden_NH.device),
        torch.empty_like(hidden_NH, dtype=head.product) if forms_gradient else None,
    )
    targets_N = targets_N.long().contiguous()
    with torch.autocast(hidden_NH.device.type, enabled=False):
        left_NH = hidden_NH.to(head.product)
        weights = Weights.of(left_NH, weight_VH, bias_V, head=head)
        for rows, columns, is_first, is_last in head.tiles(len(hidden_NH), len(weight_VH)):
            if is_first:
                sums = Sums.of(left_NH[rows], head=head, forms_gradient=forms_gradient)
            sums.add(weights.product(left_NH[rows], columns), columns, targets_N[rows], weights)
            if is_last:
                result.log_sums[rows] = sums.log_sum_R1.squeeze(1)
                result.logps[rows] = sums.target_R1.squeeze(1) - result.log_sums[rows]
                if result.gradients_NH is not None:
                    sums.write_gradient(weights.weight_VH, targets_N[rows], out_RH=result.gradients_NH[rows])
    return result


class _FrozenHead(torch.autograd.Function):
    """Only the hidden states have a gradient: it is formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: TiledHead
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
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: TiledHead
    ) -> Tensor:
        result = _forward(hidden_NH, weight_VH, bias_V, targets_N, head=head)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, result.log_sums)
        ctx.head = head
        return result.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, log_sums_N = ctx.saved_tensors
        head: TiledHead = ctx.head
        of_rows = OfRows(targets_N.long().contiguous(), log_sums_N, grad_N.to(head.tile).contiguous())
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sums over tiles are kept in the tile's dtype and rounded once to the parameter's.
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=head.tile) if needs_hidden else None
        grad_weight_VH = ColumnSums(weight_VH, head=head) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=head.tile) if needs_bias else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            left_NH = hidden_NH.to(head.product)
            weights = Weights.of(left_NH, weight_VH, bias_V, head=head)
            for tile in head.tiles(len(hidden_NH), len(weight_VH), by_columns=True):
                rows, columns = tile.rows, tile.columns
                tile_RC = weights.product(left_NH[rows], columns)
                tile_RC = to_gradient(tile_RC, columns, of_rows.slice(rows), weights)
                if grad_bias_V is not None:
                    grad_bias_V[columns] += tile_RC.sum(0, dtype=head.tile)
                product_RC = tile_RC.to(head.product)
                if grad_hidden_NH is not None:
                    multiply(product_RC, weights.weight_VH[columns], out=grad_hidden_NH[rows], add=True)
                if grad_weight_VH is not None:
                    grad_weight_VH.add(product_RC, left_NH[rows], tile)
        return (
            None if grad_hidden_NH is None else grad_hidden_NH.to(hidden_NH.dtype),
            None if grad_weight_VH is None else grad_weight_VH.result_VH,
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
        )
