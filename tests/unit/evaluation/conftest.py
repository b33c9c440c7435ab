"""A random model over bytes, and the columns that it is evaluated on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.suites import Column
from tests.fixtures.byte_level import byte_tokenizer
from tests.fixtures.colours import choice as choice
from tests.fixtures.colours import data_root as data_root


@pytest.fixture(autouse=True)
def _own_dataset_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lm-eval's own entry point, which some tests compare with, caches data sets by the text of their card only."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=160,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def words(choice: Column) -> Column:
    changes = {"metric": "exact_match,whole", "also": ("exact_match,letter",), "shots": 0}
    return choice.model_copy(update={"name": "Words", "task": "colour_words", **changes})


@pytest.fixture
def evaluation_mode(model: LlamaForCausalLM) -> Iterator[None]:
    yield
    model.eval()
