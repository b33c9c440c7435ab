"""Operations are those that torch counts; sizes of real models are counted on their configuration."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from ctpd.models import add_lora
from ctpd.rehearsal import operations
from ctpd.rehearsal.costs import gib, operations_text
from ctpd.rehearsal.memory import Training, training_bytes
from ctpd.rehearsal.operations import Work
from ctpd.rehearsal.sizes import RealModel
from ctpd.train.config import LoraSpec
from tests.fixtures.published import PUBLISHED

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from memory import SHAPES

ROWS, LENGTH = 3, 10
READ = Work(ROWS * LENGTH, ROWS * LENGTH**2)


def llama(*, tied: bool) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def counted(model: Any, *, backward: bool) -> int:
    """Operations of matrix products, as torch counts them."""
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 64
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(input_ids=ids).logits
        if backward:
            logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("tied", [True, False])
def test_a_forward_pass_takes_what_torch_counts(tied: bool) -> None:
    model = llama(tied=tied)
    found = operations.forward(RealModel(model).multiplied(), READ)
    assert found == pytest.approx(counted(model, backward=False), rel=0.01)  # norms are no products


def test_a_training_step_takes_what_torch_counts_and_a_second_forward_pass_with_checkpointing() -> None:
    model = llama(tied=False)
    multiplied = RealModel(model).multiplied()
    found = operations.training(multiplied, READ, checkpointing=False)
    assert found == pytest.approx(counted(model, backward=True), rel=0.01)
    again = operations.training(multiplied, READ, checkpointing=True)
    assert again - found == operations.forward(multiplied, READ)


def test_frozen_weights_need_no_gradients_of_their_own() -> None:
    model, lora = llama(tied=False), LoraSpec(r=4)
    found = operations.training(RealModel(model).multiplied(lora), READ, checkpointing=False)
    adapted = add_lora(model, r=4, alpha=8, targets="all-linear", seed=0)
    # torch skips the gradient of the first layer's input, which nothing trained reads.
    assert found == pytest.approx(counted(adapted, backward=True), rel=0.1)


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    config = MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, vocab_size=64)  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in model.parameters()) - experts - 64 * 32  # and without the input embeddings
    assert RealModel(model).multiplied().weights == rest + experts / 4


@pytest.mark.parametrize("name", SHAPES)
def test_counted_sizes_of_published_models_are_those_of_the_table_in_the_docs(name: str) -> None:
    _, given = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    shape, lora = RealModel(model).shape(LoraSpec(r=16)), Training(lora=16)
    assert shape.weights == SHAPES[name].weights
    for training in (Training(num_shards=8), lora):
        assert training_bytes(shape, training) == training_bytes(SHAPES[name], training)


def test_figures_have_a_unit() -> None:
    assert [gib(3 * 2**30), gib(5 * 2**20)] == ["3.0 GiB", "5 MiB"]
    assert [operations_text(n) for n in (1.5e21, 2e18, 3e12, 4e5)] == [
        "1.5e+03 EFLOP",
        "2 EFLOP",
        "3 TFLOP",
        "0.4 MFLOP",
    ]
