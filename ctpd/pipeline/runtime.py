"""How a run is executed. These settings are recorded and are not part of any key."""

import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ctpd.core.config import to_plain
from ctpd.core.errors import UserError
from ctpd.core.processes import processes
from ctpd.recipe import LaunchSpec
from ctpd.train.config import FsdpSpec

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?")
LOGS = "logs"  # the folder of a store into which loggers write
_NOT_RECORDED = {"log_dir", "project"}  # of `Runtime`
RECORDED_PACKAGES = (
    "ctpd",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "datasets",
    "lm_eval",
    "numpy",
    "pandas",
)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Execution settings.

    Attributes:
        device: torch device; `auto` is CUDA where torch finds a GPU, else the CPU; each process of a launch uses the
            GPU of its local rank.
        micro_batch_tokens: largest number of padded tokens in one forward and backward pass; it limits the pairs per
            pass.
        signal_batch_tokens: the same for scoring passes, which need no gradient.
        checkpoint_seconds: seconds between two resume states of a training.
        report_to: loggers of `transformers` that receive the training's metrics.
        fsdp: how the trained weights are sharded over the processes of a launch; None: DDP.
        log_dir: where the loggers write files; None: the folder `logs` of the store. Not recorded.
        project: the loggers' project, which is the recipe's name. Not recorded.
    """

    device: str = "auto"
    micro_batch_tokens: int = 16384
    signal_batch_tokens: int = 32768
    checkpoint_seconds: float = 600.0
    report_to: tuple[str, ...] = ()
    fsdp: FsdpSpec | None = None
    log_dir: Path | None = None
    project: str = "ctpd"

    @classmethod
    def of(cls, launch: LaunchSpec, **settings: Any) -> "Runtime":
        """These settings and the ``launch`` block's `fsdp`, which needs more than one process."""
        return cls(fsdp=launch.fsdp if processes().world_size > 1 else None, **settings)

    def torch_device(self) -> str:
        """The device of this process as torch names it.

        Raises:
            UserError: no such device here, or one GPU is named for several processes.
        """
        import torch

        several = processes().world_size > 1
        if several and self.device not in ("auto", "cpu", "cuda"):
            raise one_device_for_all(self.device, processes().world_size)
        check_device(self.device)
        if self.device not in ("auto", "cuda"):
            return self.device
        if self.device == "auto" and not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{processes().local_rank}" if several else "cuda"


def one_device_for_all(device: str, count: int) -> UserError:
    """The error for a single GPU that is named for ``count`` processes."""
    return UserError(
        f"`--device {device}` names one device for all {count} processes",
        fix="Leave it out, and each takes the GPU of its number, or give `--device cpu`",
    )


def check_device(device: str) -> None:
    """Refuse a device that does not exist on this machine.

    Raises:
        UserError: not a name of a device, or torch finds none of that name.
    """
    import torch

    kind, _, number = device.partition(":")
    if not _DEVICE.fullmatch(device):
        raise UserError(f"`--device {device}` is not a device", fix="Give auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("torch finds no `mps` device here", fix="Leave `--device` out, or give `--device cpu`")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"`--device {device}` asks for a GPU, and torch finds none here",
            fix="Leave it out or give `--device cpu`; `ctpd doctor` shows what torch finds",
        )
    if number and int(number) >= torch.cuda.device_count():
        raise UserError(
            f"`--device {device}` does not exist: torch finds {torch.cuda.device_count()} here, numbered from 0",
            fix="Give another number",
        )


def provenance(runtime: Runtime) -> dict[str, Any]:
    """How an artifact was made: versions, machine, source commit, command."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": source_commit(),
        "command": shlex.join(["ctpd", *sys.argv[1:]]),
        "runtime": to_plain({name: value for name, value in vars(runtime).items() if name not in _NOT_RECORDED}),
        "processes": processes().world_size,
    }


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def source_commit() -> str | None:
    """The commit of a source checkout, with `+changes` when its tracked files differ; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, dirty = _git(root, "rev-parse", "--short=12", "HEAD"), _git(root, "status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    """What git prints."""
    argv = ["git", "-C", str(root), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
