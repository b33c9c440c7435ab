"""Memory of a training or a scoring pass, computed from a model's shape (docs/scale.md#memory).

docs/scale.md lists what the formulas leave out. Weights in training are float32, under autocast to bfloat16. All sizes
are bytes for one GPU; 1 GiB is 2**30 bytes.
"""

from dataclasses import dataclass

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
TILE = 2**28  # the scorer's tile on a GPU (`ctpd.ops.tiles`)
RESERVED = 1.5 * GIB  # CUDA's context and the libraries' workspaces; a guess


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder of the Llama or Qwen2 family."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    qkv_bias: bool = False

    @property
    def kv_width(self) -> int:
        """Columns of the keys, and of the values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def head(self) -> int:
        """Weights of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width
        bias = self.hidden + 2 * self.kv_width if self.qkv_bias else 0
        return attention + bias + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def weights(self) -> int:
        """All weights, tied ones once."""
        return self.layers * self.layer + self.hidden + self.head * (1 if self.tied else 2)

    def adapters(self, r: int) -> int:
        """Weights of LoRA adapters of rank ``r`` on all linear layers."""
        square, keys = self.hidden + self.hidden, self.hidden + self.kv_width
        return self.layers * r * (2 * square + 2 * keys + 3 * (self.hidden + self.intermediate))

    @property
    def saved_by_layer(self) -> int:
        """Bytes per token that one layer saves for the backward pass, under autocast; measured in test_memory.py."""
        return 30 * self.hidden + 8 * self.intermediate + 4 * self.kv_width + 4 * self.heads + 8


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a student is trained.

    Attributes:
        tokens: padded tokens of one forward and backward pass (`micro_batch_tokens`, or one long pair).
        lora: the adapters' rank; None for full fine-tuning.
        base: bytes of a frozen weight (`lora.base`).
        checkpointing: whether layers are recomputed in the backward pass (activation checkpointing).
        num_shards: number of processes over which FSDP shards the weights; 1 without FSDP.
        ddp: whether several processes hold the whole model each, and exchange gradients through buffers.
    """

    tokens: int = 16384
    lora: int | None = None
    base: float = FLOAT32
    checkpointing: bool = True
    num_shards: int = 1
    ddp: bool = False


def training_bytes(shape: Shape, training: Training) -> dict[str, float]:
    """The parts of a training's peak on one GPU; the scorer's tile is not included (`TILE`)."""
    trained = shape.weights if training.lora is None else shape.adapters(training.lora)
    frozen = 0 if training.lora is None else shape.weights
    whole_layer, whole_head = FLOAT32 * shape.layer, FLOAT32 * shape.head * (1 if shape.tied else 2)
    # FSDP: the embeddings, this layer and the next one gathered, with one layer's and the embeddings' whole gradients.
    gathered = 3 * whole_layer + 2 * whole_head if training.num_shards > 1 else 0
    saved = shape.saved_by_layer * (1 if training.checkpointing else shape.layers)
    inputs = FLOAT32 * shape.hidden * (shape.layers if training.checkpointing else 0)
    # Bfloat16 copies of weights. Autocast caches those of trained, unsharded weights of all layers; the backward pass
    # needs those of all layers that are not recomputed.
    copied_all = not training.checkpointing or (training.lora is None and training.num_shards == 1)
    copies = 0 if frozen and training.base < FLOAT32 else BFLOAT16 * shape.layer * (shape.layers if copied_all else 1)
    return {
        "weights": (FLOAT32 * trained + training.base * frozen) / training.num_shards,
        "gradients": FLOAT32 * trained * (2 if training.ddp else 1) / training.num_shards,
        "AdamW": 2 * FLOAT32 * trained / training.num_shards,
        "gathered": gathered,
        "copies": copies,
        "activations": training.tokens * (saved + inputs),
        "head": shape.head * (BFLOAT16 + (FLOAT32 if training.lora is None else 0))
        + training.tokens * shape.hidden * (FLOAT32 + BFLOAT16),
    }


def scoring_bytes(shape: Shape, *, tokens: int = 32768) -> dict[str, float]:
    """The parts of a scoring pass's peak: a frozen model in bfloat16, and the activations of one layer."""
    layer = tokens * BFLOAT16 * (4 * shape.hidden + 3 * shape.intermediate + 2 * shape.kv_width)
    return {"weights": BFLOAT16 * shape.weights, "activations": layer, "head": 0}
