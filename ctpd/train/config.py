"""What a recipe may say about a training: data only, so that a recipe can be read without torch."""

from typing import Annotated, Literal

from annotated_types import MinLen

from ctpd.core.config import Config, NonNegative, PositiveInt, Share, Text


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


class FsdpSpec(Config):
    """Weights, gradients and optimizer states sharded over the processes (PyTorch's FSDP2)."""

    wrap: tuple[Text, ...] = ()
    """Layer classes that are gathered one at a time; empty for the model's own `_no_split_modules`."""
    offload: bool = False
    """Keep the shards in the memory of the CPU."""
