"""The processes of one launch, and collective operations on CPU values (a wrapper of `torch.distributed`).

A launcher (`--num-processes`, `torchrun`, `accelerate launch`) sets RANK, WORLD_SIZE and LOCAL_RANK. Without them there
is one process, and every collective operation returns at once.
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

        Call it before `accelerate` is used, which then uses this group; the group that it would create has a short
        timeout.

        Args:
            device: the torch device that this process computes on.
        """
        import torch

        if self.world_size == 1 or torch.distributed.is_initialized():
            return
        # Import this module before the group exists: ten of its functions bind the current group as a default argument. That
        # would keep the group alive after destroy_process_group, and gloo's threads, still running while the interpreter
        # shuts down, would abort the process.
        import torch.distributed.nn.functional

        if device.startswith("cuda"):
            torch.cuda.set_device(self.local_rank)
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
        else:
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)

    def destroy_process_group(self) -> None:
        """Destroy the default group; to be called last when the program ends without an error."""
        import torch

        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Return when every process has called this."""
        self.all_reduce(np.zeros(1, dtype=np.int64))  # a broadcast would not make rank 0 wait for the others

    def broadcast(self, number: int) -> int:
        """Broadcast an integer from rank 0; returned in every process."""
        if self.world_size == 1:
            return number
        import torch

        value = torch.tensor([number], dtype=torch.int64)
        with _peers_required():
            torch.distributed.broadcast(value, src=0)
        return int(value)

    def all_reduce(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Sum arrays of equal shape over all processes; exact wherever at most one process has a nonzero entry."""
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
            f"the environment sets WORLD_SIZE={os.environ['WORLD_SIZE']} and no RANK",
            fix="Start the processes with torchrun or accelerate, or unset WORLD_SIZE",
        )
    rank, world_size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Processes(rank, world_size, local_rank) if world_size > 1 else Processes()
