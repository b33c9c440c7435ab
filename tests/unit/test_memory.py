"""`ctpd.rehearsal.memory`: shapes are the published ones, activations are measured, the table in the docs is scripts/memory.py's."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ctpd.models import add_lora
from ctpd.rehearsal.memory import BFLOAT16, FLOAT32, Shape, Training, training_bytes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import memory
from memory import SHAPES

PUBLISHED = {
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248, "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
}  # fmt: skip
TINY = [
    Shape(vocabulary=64, hidden=hidden, intermediate=96, layers=3, heads=4, kv_heads=kv_heads, tied=False)
    for hidden in (64, 128)
    for kv_heads in (1, 4)
]


def built(shape: Shape, *, layers: int | None = None, device: str = "meta") -> Any:
    kind, make = (Qwen2Config, Qwen2ForCausalLM) if shape.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    config = kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device):
        return make(config)


@pytest.mark.parametrize("name", SHAPES)
def test_the_weights_of_a_shape_are_those_of_the_model(name: str) -> None:
    shape = SHAPES[name]
    assert shape.weights == PUBLISHED[name]
    model = built(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.weights
    assert sum(parameter.numel() for parameter in model.model.layers[0].parameters()) == shape.layer


@pytest.mark.parametrize("shape", TINY)
def test_adapters_are_counted_as_peft_makes_them(shape: Shape) -> None:
    model = add_lora(built(shape, device="cpu"), r=3, alpha=6, targets="all-linear", seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == shape.adapters(3)


def saved_bytes(shape: Shape, *, layers: int, checkpointing: bool) -> int:
    """Bytes that the forward pass of 256 tokens keeps for the backward pass, without the weights."""
    model = built(shape, layers=layers, device="cpu").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(256).reshape(2, 128) % shape.vocabulary
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("shape", TINY)
def test_a_layer_saves_what_the_formula_says(shape: Shape) -> None:
    """Two layers more, under autocast: their activations, and a rounded copy of each of their matrices."""
    more, less = (saved_bytes(shape, layers=layers, checkpointing=False) for layers in (3, 1))
    matrices = shape.layer - 2 * shape.hidden
    assert (more - less) / 2 == 256 * shape.saved_by_layer + BFLOAT16 * matrices
    more, less = (saved_bytes(shape, layers=layers, checkpointing=True) for layers in (3, 1))
    assert (more - less) / 2 == 256 * FLOAT32 * shape.hidden


def test_states_of_full_fine_tuning_are_sixteen_bytes_a_weight_sharded_over_the_processes() -> None:
    shape = SHAPES["Llama-3.1-8B"]
    states = ("weights", "gradients", "AdamW")
    alone, shared = training_bytes(shape, Training()), training_bytes(shape, Training(num_shards=8))
    assert sum(alone[part] for part in states) == 16 * shape.weights
    assert sum(shared[part] for part in states) == 2 * shape.weights
    assert alone["gathered"] == 0 < shared["gathered"]


def test_the_table_of_the_docs_is_the_scripts() -> None:
    assert "\n".join(memory.table()) in (ROOT / "docs/scale.md").read_text(encoding="utf-8")
