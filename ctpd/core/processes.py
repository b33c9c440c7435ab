"""The processes of one launch, and the few things that they tell each other.

A launcher (`--num-processes`, `torchrun`, `accelerate launch`) says by environment variables which process this is and
how many there are. Without them there is one process, and everything here is immediate.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from ctpd.core.errors import CtpdError, UserError

_PATIENCE = timedelta(days=7)  # one process may build for hours while the others wait


class ProcessLost(CtpdError):
    """Another process of the launch has ended while this one waited for it."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch.

    Attributes:
        rank: its number, from 0.
        world: how many there are, on all machines.
        local_rank: its number on its own machine: the number of its device.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def join(self, device: str = "cpu") -> None:
        """Connect the processes: gloo between CPUs, and NCCL between GPUs. A second call does nothing.

        Call it before anything of `accelerate`, which then uses this group: its own would end long waits.

        Args:
            device: what this process computes on, in torch's words.
        """
        import torch

        if self.world == 1 or torch.distributed.is_initialized():
            return
        if device.startswith("cuda"):
            torch.cuda.set_device(self.local_rank)
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
        else:
            torch.distributed.init_process_group("gloo", timeout=_PATIENCE)

    def leave(self) -> None:
        """Disconnect; the last thing to do before the program ends without an error."""
        import torch

        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Go on when every process is here."""
        self.joined(np.zeros(1, dtype=np.int64))  # a broadcast would let the first process go on alone

    def agree(self, number: int) -> int:
        """The first process's number, in every process."""
        if self.world == 1:
            return number
        import torch

        told = torch.tensor([number], dtype=torch.int64)
        with _others_needed():
            torch.distributed.broadcast(told, src=0)
        return int(told)

    def joined(self, part: NDArray[np.generic]) -> NDArray[np.generic]:
        """The sum of arrays of one shape: exact where each entry is zero in all processes but one."""
        if self.world == 1:
            return part
        import torch

        total = torch.from_numpy(np.ascontiguousarray(part))
        with _others_needed():
            torch.distributed.all_reduce(total)
        return np.asarray(total.numpy())


@contextlib.contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("Another process of this launch has ended; its own error says why.") from error


def processes() -> Processes:
    """This process, as its launcher's environment says.

    Raises:
        UserError: the environment tells how many processes there are, and not which one this is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" not in os.environ:
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} and no RANK",
            fix="Start the processes with torchrun or accelerate, or take WORLD_SIZE out of the environment",
        )
    rank, world, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Processes(rank, world, local_rank) if world > 1 else Processes()
