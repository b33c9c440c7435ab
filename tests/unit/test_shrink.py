"""A shrunk configuration makes a tiny model of the same class: same vocabulary and token ids, every kind of layer."""

from typing import Any

import pytest
import torch
import transformers

from ctpd.checkpoints import model_class
from ctpd.rehearsal.shrink import MOST_LAYERS, SMALL, WIDTH, shrunk

CLASSES = (
    "LlamaConfig", "Llama4TextConfig", "Qwen2Config", "Qwen3Config", "Gemma2Config", "Gemma3TextConfig", "Gemma3Config",
    "Gemma3nTextConfig", "Gemma4TextConfig", "MistralConfig", "Mistral3Config", "Phi3Config", "Olmo2Config", "Glm4Config",
    "GraniteConfig", "Cohere2Config", "GPT2Config", "MixtralConfig", "Qwen2MoeConfig", "Qwen3MoeConfig", "DeepseekV3Config",
    "GptOssConfig", "Qwen3_5Config", "Qwen3NextConfig", "FalconH1Config", "MambaConfig", "JambaConfig", "OPTConfig",
)  # fmt: skip
VOCABULARY = 300


def with_vocabulary(config: Any) -> Any:
    """A published configuration's sizes with few tokens: embeddings of all would be most of the model."""
    text = config.get_text_config()
    text.vocab_size = VOCABULARY
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = VOCABULARY
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 11, 12, 13
    return config


def kinds(config: Any) -> set[str]:
    return set(map(str, getattr(config.get_text_config(), "layer_types", None) or ()))


@pytest.mark.parametrize("name", CLASSES)
def test_a_published_size_becomes_a_tiny_model_of_the_same_class_that_reads_tokens(name: str) -> None:
    config = with_vocabulary(getattr(transformers, name)())
    small = shrunk(config)
    text, given = small.get_text_config(), config.get_text_config()
    assert type(small) is type(config)
    kept = (
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    assert {n: getattr(text, n, None) for n in kept} == {n: getattr(given, n, None) for n in kept}
    assert text.hidden_size == WIDTH
    assert text.num_hidden_layers <= MOST_LAYERS
    assert kinds(small) == kinds(config)
    torch.manual_seed(0)
    model = model_class(small).from_config(small).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.randint(14, VOCABULARY, (2, 9))).logits
    assert logits.shape == (2, 9, VOCABULARY)
    assert logits.isfinite().all()
    vision = [p for n, p in model.named_parameters() if "vision" in n]
    own = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in vision)
    assert own < 10**6


def test_rotary_factors_and_sections_fit_the_smaller_heads() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 4096}  # fmt: skip
    found = shrunk(transformers.Phi3Config(rope_scaling=rope)).rope_parameters
    assert (len(found["short_factor"]), len(found["long_factor"])) == (8, 8)  # half of 16 channels
    sections = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    text = shrunk(transformers.Qwen2_5_VLConfig(text_config={"rope_scaling": sections})).get_text_config()
    assert sum(text.rope_parameters["mrope_section"]) == 8


def test_experts_and_ratios_of_heads_stay_what_they_are_in_kind() -> None:
    moe = shrunk(transformers.Qwen3MoeConfig())
    assert (moe.num_experts, moe.num_experts_per_tok) == (4, 2)
    grouped, single = transformers.LlamaConfig(num_key_value_heads=8), transformers.LlamaConfig(num_key_value_heads=32)
    assert [shrunk(config).num_key_value_heads for config in (grouped, single)] == [1, 2]


def test_a_configuration_that_is_small_is_kept() -> None:
    config = transformers.LlamaConfig(hidden_size=SMALL, num_hidden_layers=5, num_attention_heads=4)
    assert shrunk(config).to_dict() == config.to_dict()
