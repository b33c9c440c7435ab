"""Peak memory in MiB: allocated memory on a GPU, the resident set of the process on a CPU."""

from pathlib import Path

import numpy as np
import torch

from ctpd.core.processes import processes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: str) -> None:
    """Reset the peak of a device's memory to what is in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # Linux: the peak of the resident set starts again from now


def peak_mebibytes(device: str) -> float | None:
    """The peak since `reset_peak`, the largest of all ranks; None where the platform does not report it."""
    ranks = processes()
    peaks = np.zeros(ranks.world_size)
    own = _own_peak(device)
    peaks[ranks.rank] = np.nan if own is None else own
    highest = float(ranks.all_reduce(peaks).max())
    return None if np.isnan(highest) else highest


def _own_peak(device: str) -> float | None:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if not _STATUS.exists():
        return None
    lines = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 1024 if lines else None
