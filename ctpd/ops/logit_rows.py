"""Rows of logits that are never all in memory: hidden states and an output head, applied to a tile of rows at a time.

Shape legend: N rows (predicting positions), H hidden size, V vocabulary, R rows of one tile, K stored tokens of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ctpd.core.errors import UserError
from ctpd.ops.logps import token_logps, token_logps_module
from ctpd.ops.tiles import NO_TRANSFORM, LogitTransform

# A loss over whole rows makes several copies of a tile: 32 MiB is 64 rows of a vocabulary of 128k.
_TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Head:
    """An output embedding and what the model does to its logits: ``transform(module(hidden))``.

    Attributes:
        module: [R, H] -> [R, V]; `nn.Linear` in the usual case.
        width: V, the number of columns.
        transform: scale and soft cap of the logits.
        is_constant: the module's parameters get no gradient from this use.
    """

    module: nn.Module
    width: int
    transform: LogitTransform = NO_TRANSFORM
    is_constant: bool = False

    def __call__(self, hidden_RH: Float[Tensor, "R H"]) -> Float[Tensor, "R V"]:
        """Logits, float32 (float64 for float64)."""
        if self.linear is not None:  # read, not called: FSDP's hooks on it expect one call a forward pass
            weight_VH: Tensor = self.linear.weight
            bias_V: Tensor | None = self.linear.bias
            if self.is_constant:
                weight_VH, bias_V = weight_VH.detach(), None if bias_V is None else bias_V.detach()
            logits_RV = linear(hidden_RH, weight_VH, bias_V)
        elif self.is_constant:
            constants = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
            logits_RV = functional_call(self.module, constants, (hidden_RH,))
        else:
            logits_RV = self.module(hidden_RH)
        return self.transform(logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)))

    def check(self, targets_N: Int[Tensor, " N"]) -> None:
        """Refuse a target beyond the last column, whose log-probability would be a number of no token.

        Raises:
            UserError: there is one; on another device than the CPU, which is not waited for, an assertion of the kernel.
        """
        inside = (targets_N < self.width).all()
        if targets_N.device.type != "cpu":
            torch._assert_async(inside)
        elif not inside:
            raise UserError(
                f"the token {int(targets_N.max())} is beyond the {self.width:,} columns of the model's logits",
                fix="Use the tokenizer that belongs to the model",
            )

    @property
    def linear(self) -> nn.Linear | None:
        """The module if it is a plain `nn.Linear`, so that its weight may be read: no adapter, not quantised."""
        kinds = type(self.module).__mro__
        own = kinds[2] if is_sharded(self.module) else kinds[0]  # FSDP puts two classes before it
        return self.module if isinstance(self.module, nn.Linear) and own is nn.Linear else None

    def constant(self) -> "Head":
        """The same head as a constant: gradients pass through it to the hidden states only."""
        return Head(self.module, self.width, self.transform, is_constant=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP has sharded this very module."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # 0.8 s, which a plan of a recipe need not wait for

    return isinstance(module, FSDPModule)


@runtime_checkable
class RowWise(Protocol):
    """Anything with one entry a row that can be sliced: a tensor, `LogitRows`, `TopRows`."""

    def __getitem__(self, rows: slice, /) -> Any:
        """The entries of these rows."""
        ...


class Top(NamedTuple):
    """The K likeliest tokens of some rows, likeliest first: what is stored of a distribution."""

    ids: Int[Tensor, "R K"]
    logps: Float[Tensor, "R K"]

    @property
    def rest(self) -> Float[Tensor, " R"]:
        """The probability of all tokens that are not stored."""
        return (1.0 - self.logps.exp().sum(-1)).clamp(min=0.0)


class TopRows:
    """N stored rows; the counterpart of `LogitRows` for a teacher that is not in memory."""

    def __init__(self, ids_NK: Int[Tensor, "N K"], logps_NK: Float[Tensor, "N K"]) -> None:
        self.ids, self.logps = ids_NK, logps_NK

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Top:
        return Top(self.ids[rows].long(), self.logps[rows])

    def select(self, index_N: Int[Tensor, " N"]) -> "TopRows":
        """These rows, in this order; a row may occur more than once."""
        return TopRows(self.ids[index_N], self.logps[index_N])


class LogitRows:
    """N rows of logits; slicing computes those rows."""

    def __init__(self, hidden_NH: Float[Tensor, "N H"], head: Head, *, tile_bytes: int = _TILE_BYTES) -> None:
        self.hidden, self.head, self._tile_bytes = hidden_NH, head, tile_bytes

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice) -> Float[Tensor, "R V"]:
        return self.head(self.hidden[rows])

    def select(self, index_N: Int[Tensor, " N"]) -> "LogitRows":
        """These rows, in this order; a row may occur more than once."""
        return LogitRows(self.hidden[index_N], self.head, tile_bytes=self._tile_bytes)

    def constant(self) -> "LogitRows":
        """The same rows without any gradient."""
        return LogitRows(self.hidden.detach(), self.head.constant(), tile_bytes=self._tile_bytes)

    def logps(self, targets_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Log-probability of each row's target; see `ctpd.ops.logps.token_logps`."""
        head = self.head
        if head.linear is not None and not head.is_constant:
            weight_VH, bias_V = head.linear.weight, head.linear.bias
            return token_logps(self.hidden, weight_VH, targets_N, bias_V=bias_V, transform=head.transform)
        plain = Head(head.module, head.width, is_constant=head.is_constant)
        return token_logps_module(self.hidden, plain, targets_N, transform=head.transform)

    def map(self, function: Callable[..., Tensor], *others: RowWise) -> Tensor:
        """``function(logits_RV, *tiles)`` of every tile of rows, concatenated: [N, ...].

        Only what the function returns is kept; a tile is computed again in the backward pass. The function must treat
        rows independently of each other and must not change its arguments.

        Args:
            function: gets the logits of a tile, and the entries of ``others`` for the same rows.
            others: N entries each.
        """

        def of_tile(hidden_RH: Tensor, rows: slice) -> Tensor:
            return function(self.head(hidden_RH), *(other[rows] for other in others))

        if not torch.is_grad_enabled():
            return torch.cat([of_tile(self.hidden[rows], rows) for rows in self._tiles()])
        return torch.cat([checkpoint(of_tile, self.hidden[rows], rows, use_reentrant=False) for rows in self._tiles()])

    def _tiles(self) -> Iterator[slice]:
        itemsize = torch.promote_types(self.hidden.dtype, torch.float32).itemsize
        step = max(1, self._tile_bytes // (itemsize * max(self.head.width, 1)))
        return (slice(start, min(start + step, len(self))) for start in range(0, max(len(self), 1), step))
