"""Numbers that are NaN or infinite: noticed on the device, without waiting for it, and named when they are reported."""

from collections.abc import Callable

import torch
from torch import Tensor

from ctpd.ops.finite import own_shard

_NEVER = 2**62


class FirstBadStep:
    """For each watched number of a training the first step at which it was not finite, kept on the device."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def watch(self, name: str, value: Tensor | float | None, *, step: int) -> None:
        """Look at a number of any shape, without waiting for the device; of a sharded one at this rank's shard."""
        if not isinstance(value, Tensor):
            value = torch.tensor(0.0 if value is None else value)
        bad = ~own_shard(value.detach()).isfinite().all()
        at = torch.where(bad, step, _NEVER)
        self._first[name] = torch.minimum(at, self._first[name]) if name in self._first else at

    def found(self, gather: Callable[[Tensor], Tensor]) -> tuple[str, int] | None:
        """The number that went wrong first, in any rank, and its step; None if none did. Waits for the device.

        Args:
            gather: from this rank's [1, numbers] to that of all ranks, [ranks, numbers].
        """
        names = sorted(self._first, reverse=True)  # the loss before its gradient
        if not names:
            return None
        device = self._first[names[0]].device  # the norm of gradients that FSDP keeps on the CPU is there
        own = torch.stack([self._first[name].to(device) for name in names])
        steps = gather(own[None]).amin(dim=0).tolist()
        first = min(range(len(names)), key=lambda i: steps[i])
        return None if steps[first] == _NEVER else (names[first], int(steps[first]))
