"""What a recipe may say about a training: data only, so that a recipe can be read without torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from ctpd.core.config import Config, NonNegative, PositiveInt, Share, Text
from ctpd.core.errors import UserError

FEW_STEPS = 10  # a training of fewer optimizer steps is reported
MANY_LEFT_OUT = 0.05  # so is one that leaves out a larger share of its items


class LoraSpec(Config):
    """Low-rank adapters instead of a training of all weights.

    Adapters are trained in float32. Stored references are those of the weights before they lost precision: with 4 bits
    a first DPO loss is near log 2, not log 2. The adapter is merged into those weights, too, for signals, evaluation
    and export.
    """

    r: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveInt = 32
    """The adapter's output is multiplied by alpha / r."""
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], MinLen(1)] = "all-linear"
    """Which modules get an adapter: all linear layers but the output head, or the modules of these names."""
    base: Literal["float32", "bfloat16", "4bit"] = "float32"
    """Form of the frozen weights in training: 4 bytes, 2 bytes or half a byte each (QLoRA's NF4, which needs bitsandbytes)."""


class Schedule(Config):
    """How a training runs, without its learning rate: shared by all methods of a comparison."""

    epochs: PositiveInt = 1
    """Passes over the training pairs; what does not fill a step is left out of a pass."""
    pairs_per_step: PositiveInt = 16
    """Pairs of one optimizer step, over all processes and micro-batches together."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after its warm-up: down to 0 along a cosine or a line, or constant."""
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay; 0 for none."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger norm are scaled down to it; 0 for no clipping."""
    lora: LoraSpec | None = None
    """Train low-rank adapters; left out, all weights are trained."""
    activation_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    evaluations_per_epoch: PositiveInt = 1
    """How often in an epoch the loss on the evaluation pairs is computed, if there are any."""


@dataclass(frozen=True)
class Steps:
    """How many optimizer steps a training has.

    Attributes:
        total: all of them.
        warmup: those over which the learning rate rises; it is 0 in the first of them.
        items: training items (pairs) of one epoch.
        left_out: items of each epoch that do not fill a step.
        per_step: items of one step.
    """

    total: int
    warmup: int
    items: int
    left_out: int
    per_step: int

    @classmethod
    def of(cls, num_items: int, schedule: Schedule, *, max_steps: int | None = None) -> "Steps":
        """The steps of a schedule on so many items.

        Args:
            num_items: training items of one epoch.
            schedule: epochs, items a step and warm-up.
            max_steps: all steps, in place of the schedule's epochs; None for the epochs.

        Raises:
            UserError: fewer items than one step, or a learning rate of 0 in every step.
        """
        per_step = schedule.pairs_per_step
        of_epoch = num_items // per_step
        if of_epoch == 0:
            raise UserError(
                f"there are {num_items} training items, fewer than the {per_step} of one step",
                fix="Lower `pairs_per_step` or give more data",
            )
        total = of_epoch * schedule.epochs if max_steps is None else max_steps
        found = cls(
            total, math.ceil(schedule.warmup_ratio * total), num_items, num_items - of_epoch * per_step, per_step
        )
        if total == 1 and found.warmup:
            raise UserError(
                f"the training would change nothing: {num_items} items make one step of {per_step}, and the learning rate "
                "of that step is 0, since it belongs to the warm-up",
                fix="Lower `pairs_per_step`, give more data, or set `warmup_ratio: 0`",
            )
        return found

    @property
    def note(self) -> str | None:
        """A sentence for the user where the training is short or leaves many items out; else None."""
        left = f"{self.left_out:,} of {self.items:,} pairs do not fill a step of {self.per_step:,}"
        left += " and are left out of each epoch"
        if self.total < FEW_STEPS:
            rest = f"; {left}" if self.left_out else ""
            return (
                f"only {self.total} optimizer step{'s' if self.total > 1 else ''}, which can hardly train a model{rest}"
            )
        return left if self.left_out > MANY_LEFT_OUT * self.items else None


class FsdpSpec(Config):
    """Weights, gradients and optimizer states sharded over the processes (PyTorch's FSDP2)."""

    wrap: tuple[Text, ...] = ()
    """Layer classes that are gathered one at a time; empty for the model's own `_no_split_modules`."""
    offload: bool = False
    """Keep the shards in the memory of the CPU."""


def pairs_of_process(per_step: int, *, num_processes: int, micro_batch: int | None) -> int:
    """The pairs of an optimizer step that each process has.

    Args:
        per_step: pairs of a step, over all processes.
        num_processes: processes of a launch.
        micro_batch: pairs of one forward pass, for an objective whose loss depends on which pairs go together.

    Raises:
        UserError: a step cannot be divided evenly over the processes, or a process's pairs not in such micro-batches.
    """
    if per_step % num_processes:
        raise UserError(
            f"{per_step} pairs of a step cannot be divided evenly over {num_processes} processes",
            fix="Make `pairs_per_step` a multiple of the number of processes",
        )
    share = per_step // num_processes
    if micro_batch is not None and share % micro_batch:
        of_process = "" if num_processes == 1 else f", those of each of {num_processes} processes,"
        raise UserError(
            f"{share} pairs of a step{of_process} cannot be cut into micro-batches of {micro_batch}",
            fix="Make `pairs_per_step` a multiple of the method's `micro_batch`"
            + ("" if num_processes == 1 else " times the processes")
            + ", or change that",
        )
    return share
