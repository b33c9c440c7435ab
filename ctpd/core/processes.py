"""The processes of one launch, and collective operations on CPU values (a wrapper of `torch.distributed`).

A launcher (`--num-processes`, `torchrun`, `accelerate launch`) sets RANK, WORLD_SIZE and LOCAL_RANK. Without them there
is one process, and every collective operation returns at once.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpd.core.errors import CtpdError, UserError

RENDEZVOUS = (
    "CTPD_RENDEZVOUS"  # environment variable in the processes of `--num-processes`: the file of the group's store
)
_GLOO_THREAD = "pt_gloo_runloop"
_THREAD_SECONDS = 60.0  # how long gloo's threads may take to end: on a busy machine they wait for a core
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

        is_gpu = device.startswith("cuda")
        if is_gpu:
            torch.cuda.set_device(self.local_rank)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo", timeout=_TIMEOUT, **self._rendezvous()
        )

    def _rendezvous(self) -> dict[str, Any]:
        """Where the processes find each other: the file of our launch, which needs no port, or what the launcher says."""
        import torch

        if RENDEZVOUS not in os.environ:
            return {}
        store = torch.distributed.FileStore(os.environ[RENDEZVOUS], self.world_size)  # type: ignore[attr-defined]
        store.set_timeout(_TIMEOUT)
        return {"store": store, "rank": self.rank, "world_size": self.world_size}

    def destroy_process_group(self) -> None:
        """Destroy the default group; to be called last when the program ends without an error."""
        import torch

        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            _check_threads_ended()

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


def _check_threads_ended() -> None:
    """Warn if gloo's threads still run: they can abort the process while the interpreter shuts down. Linux only."""
    end = time.monotonic() + _THREAD_SECONDS
    while any(_name(thread) == _GLOO_THREAD for thread in Path("/proc/self/task").glob("*/comm")):
        if time.monotonic() > end:
            warnings.warn("threads of the destroyed process group still run: something holds the group", stacklevel=3)
            return
        time.sleep(0.01)


def _name(thread: Path) -> str:
    try:
        return thread.read_text().strip()
    except OSError:  # it has ended
        return ""


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
