"""Estimate the memory of a training or a scoring pass from a model's shape (the table of docs/scale.md).

Run with `python scripts/memory.py`. The arithmetic is `ctpd.rehearsal.memory`, and `ctpd rehearse` shows it for the models of
a recipe.
"""

import math
from collections.abc import Iterator

from ctpd.rehearsal.memory import (
    BFLOAT16,
    GIB,
    RESERVED,
    TILE,
    Shape,
    Training,
    scoring_bytes,
    training_bytes,
)

SHAPES = {
    "Llama-3.2-1B": Shape(
        vocabulary=128256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, tied=True
    ),
    "Llama-3.1-8B": Shape(
        vocabulary=128256, hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, tied=False
    ),
    "Qwen2.5-7B": Shape(
        vocabulary=152064, hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, tied=False, qkv_bias=True
    ),
    "Qwen2.5-14B": Shape(
        vocabulary=152064, hidden=5120, intermediate=13824, layers=48, heads=40, kv_heads=8, tied=False, qkv_bias=True
    ),
}


CASES: dict[str, tuple[tuple[str, str, Training | None], ...]] = {
    "1 x 24 GB": (
        ("teacher's signals", "Qwen2.5-7B", None),
        ("teacher's signals", "Qwen2.5-14B", None),
        ("full", "Llama-3.2-1B", Training(tokens=4096)),
        ("LoRA, rank 16", "Llama-3.2-1B", Training(lora=16, tokens=4096)),
        ("LoRA, rank 16", "Llama-3.1-8B", Training(lora=16, tokens=4096)),
        ("LoRA, rank 16, bfloat16 base", "Llama-3.1-8B", Training(lora=16, base=BFLOAT16, tokens=4096)),
    ),
    "1 x 80 GB": (
        ("teacher's signals", "Qwen2.5-7B", None),
        ("teacher's signals", "Qwen2.5-14B", None),
        ("full", "Llama-3.2-1B", Training()),
        ("full, not checkpointed", "Llama-3.2-1B", Training(checkpointing=False)),
        ("LoRA, rank 16", "Llama-3.1-8B", Training(lora=16)),
        ("full", "Llama-3.1-8B", Training()),
        ("teacher's SFT, LoRA, rank 16", "Qwen2.5-7B", Training(lora=16)),
        ("teacher's SFT, LoRA, rank 16", "Qwen2.5-14B", Training(lora=16, tokens=4096)),
        ("the same, bfloat16 base", "Qwen2.5-14B", Training(lora=16, base=BFLOAT16)),
    ),
    "8 x 80 GB": (
        ("full, DDP", "Llama-3.2-1B", Training(ddp=True)),
        ("full, FSDP", "Llama-3.1-8B", Training(num_shards=8)),
        ("full, FSDP, not checkpointed", "Llama-3.1-8B", Training(num_shards=8, checkpointing=False, tokens=4096)),
        ("teacher's SFT, full, FSDP", "Qwen2.5-7B", Training(num_shards=8)),
        ("teacher's SFT, full, FSDP", "Qwen2.5-14B", Training(num_shards=8)),
    ),
}  # fmt: skip
PARTS = ("weights", "gradients", "AdamW", "gathered", "copies", "activations", "head")


def table() -> Iterator[str]:
    """The rows of the table in docs/scale.md, in GiB for one GPU."""
    yield "| GPUs | what | model | tokens a pass | " + " | ".join([*PARTS, "sum", "fits"]) + " |"
    yield "|---" * 4 + "|---:" * (len(PARTS) + 1) + "|---|"
    for gpus, cases in CASES.items():
        available = float(gpus.split()[2]) * 1e9
        for what, name, training in cases:
            tokens = 32768 if training is None else training.tokens
            parts = scoring_bytes(SHAPES[name]) if training is None else training_bytes(SHAPES[name], training)
            parts["head"] += TILE
            total = math.fsum(parts.values())
            cells = [_gib(parts.get(part, 0)) for part in PARTS]
            fits = "yes" if total + RESERVED <= available else "**no**"
            yield f"| {gpus} | {what} | {name} | {tokens} | " + " | ".join([*cells, _gib(total), fits]) + " |"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size else ""


if __name__ == "__main__":
    print("\n".join(table()))
