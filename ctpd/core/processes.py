"""The processes of one launch, and the collective calls they need on CPU values.

A launcher (`--num-processes`, `torchrun`, `accelerate launch`) sets RANK, WORLD_SIZE and LOCAL_RANK. Without them there
is one process, and every call here returns at once.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from ctpd.core.errors import CtpdError, UserError

_TIMEOUT = timedelta(days=7)  # one process may build a stage for hours while the others wait


class ProcessLost(CtpdError):
    """Another process of the launch ended while this one waited for it."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch.

    Attributes:
        rank: from 0.
        world_size: the number of processes on all machines.
        local_rank: the rank on this machine, which is the index of the device.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def init_process_group(self, device: str = "cpu") -> None:
        """Initialize the default group: gloo for CPU tensors, NCCL for GPU tensors. A second call does nothing.

        Call it before anything of `accelerate`, which then uses this group: its own has a short timeout.

        Args:
            device: the torch device that this process computes on.
        """
        import torch

        if self.world_size == 1 or torch.distributed.is_initialized():
            return
        # Ten functions of this module hold the group that exists when it is imported as a default argument. Imported
        # after the next lines, it would keep the group alive after destroy_process_group, and gloo's threads would
        # still run while the interpreter shuts down, which aborts the process.
        import torch.distributed.nn.functional

        if device.startswith("cuda"):
            torch.cuda.set_device(self.local_rank)
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
        else:
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)

    def destroy_process_group(self) -> None:
        """Destroy the default group; the last call before the program ends without an error."""
        import torch

        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Return when every process has called this."""
        self.all_reduce(np.zeros(1, dtype=np.int64))  # after a broadcast rank 0 would not wait for the others

    def broadcast(self, number: int) -> int:
        """The number of rank 0, in every process."""
        if self.world_size == 1:
            return number
        import torch

        value = torch.tensor([number], dtype=torch.int64)
        with _peers_required():
            torch.distributed.broadcast(value, src=0)
        return int(value)

    def all_reduce(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """The sum over all processes of arrays of one shape: exact where at most one process has a nonzero entry."""
        if self.world_size == 1:
            return array
        import torch

        total = torch.from_numpy(np.ascontiguousarray(array))
        with _peers_required():
            torch.distributed.all_reduce(total)
        return np.asarray(total.numpy())


@contextlib.contextmanager
def _peers_required() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("Another process of this launch has ended; its own error says why.") from error


def processes() -> Processes:
    """This process, from its launcher's environment.

    Raises:
        UserError: WORLD_SIZE is set and RANK is not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" not in os.environ:
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} and no RANK",
            fix="Start the processes with torchrun or accelerate, or take WORLD_SIZE out of the environment",
        )
    rank, world_size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Processes(rank, world_size, local_rank) if world_size > 1 else Processes()
