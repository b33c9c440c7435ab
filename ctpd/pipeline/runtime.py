"""How a run is executed, as opposed to what it computes: recorded, never hashed."""

import functools
import os
import platform
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

RECORDED_PACKAGES = (
    "ctpd", "torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "lm_eval", "numpy", "pandas",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Execution settings.

    Attributes:
        device: torch device; `auto` takes CUDA where there is one, and with several processes each its own GPU.
        micro_batch_tokens: padded tokens that one forward and backward pass may hold; pairs per pass follow from it.
        signal_batch_tokens: the same for passes without a gradient.
        checkpoint_seconds: a training saves its resume state this often.
        report_to: loggers of `transformers` that receive the training's metrics.
        fsdp: how the weights in training are shared out over the processes of a launch; None: each holds all.
    """

    device: str = "auto"
    micro_batch_tokens: int = 16384
    signal_batch_tokens: int = 32768
    checkpoint_seconds: float = 600.0
    report_to: tuple[str, ...] = ()
    fsdp: FsdpSpec | None = None

    @classmethod
    def of(cls, launch: LaunchSpec, **settings: Any) -> "Runtime":
        """These settings, with those of a recipe's ``launch`` that matter now: one process shares nothing out."""
        return cls(fsdp=launch.fsdp if processes().world_size > 1 else None, **settings)

    def torch_device(self) -> str:
        """The device in torch's own words.

        Raises:
            UserError: several processes are told to share one GPU.
        """
        several = processes().world_size > 1
        if several and self.device not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"`--device {self.device}` names one device for all {processes().world_size} processes",
                fix="Leave it out, and each takes the GPU of its number, or give `--device cpu`",
            )
        if self.device not in ("auto", "cuda"):
            return self.device
        import torch

        if self.device == "auto" and not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{processes().local_rank}" if several else "cuda"


def provenance(runtime: Runtime) -> dict[str, Any]:
    """What made an artifact: versions, machine, source commit, command."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": source_commit(),
        "command": " ".join(["ctpd", *sys.argv[1:]]),
        "runtime": to_plain(runtime),
        "processes": processes().world_size,
    }


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that can move a number."""
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
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
