"""The official tasks, offline from a mirror of the hub: the official documents, prompts and targets."""

from pathlib import Path

import pytest
import torch
from lm_eval.models.dummy import DummyLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctpd.core.errors import UserError
from harness.evaluate import Documents, Scores, check_column, evaluate_column, score
from harness.loading import datasets_of
from harness.suites import Column, load_suite
from tests.fixtures.byte_level import byte_tokenizer

COLUMNS = {column.name: column for column in load_suite("paper").columns}

# Of the first two documents of each task, with lm-eval 0.4.13: documents, prompts with their shots, and targets.
TASK_HASHES = {
    "ARC": "b7e84be5350a5685",
    "MMLU": "51681bf5a3b4e124",
    "TruthfulQA": "f8b7dbd2d35bd5d2",
    "Winogrande": "18068950d9373020",
    "GSM8K": "9669d27b593e1d07",
}
TOTALS = {"ARC": 1172, "MMLU": 14042, "TruthfulQA": 817, "Winogrande": 1267, "GSM8K": 1319}


@pytest.fixture(scope="module")
def results() -> dict[str, Scores]:
    """Cached results by column, shared by the tests."""
    return {}


@pytest.fixture
def hub(shared_dir: Path) -> Path:
    """A mirror of the hub."""
    return shared_dir / "data" / "hub"


def dummy(name: str, hub: Path, results: dict[str, Scores]) -> Scores:
    if name not in results:
        results[name] = score(DummyLM(), COLUMNS[name], Documents(hub, limit=2))
    return results[name]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_suite_names_the_data_sets_that_its_tasks_read(name: str) -> None:
    """They are part of the key of a result if the data come from a mirror."""
    assert sorted(COLUMNS[name].datasets) == datasets_of(COLUMNS[name])


@pytest.mark.parametrize("name", TASK_HASHES)
def test_documents_and_prompts_are_those_recorded(name: str, hub: Path, results: dict[str, Scores]) -> None:
    """The hash of documents, prompts and targets is stable, so that scores of two machines may be compared."""
    result = dummy(name, hub, results)
    assert result.task_hash.startswith(TASK_HASHES[name])
    assert result.num_total == TOTALS[name]
    assert result.shots == COLUMNS[name].shots
    assert result.num_docs == len(result.scored) == (2 * 57 if name == "MMLU" else 2)


def test_the_first_gsm8k_document_is_the_one_of_public_logs(hub: Path, results: dict[str, Scores]) -> None:
    """Public lm-eval logs of GSM8K begin with this hash (docs/method.md#scores-per-document)."""
    assert dummy("GSM8K", hub, results).scored[0][0].startswith("986c19252f3c7f6e")


def test_a_groups_score_is_the_mean_over_all_its_documents(hub: Path, results: dict[str, Scores]) -> None:
    """MMLU weights its subjects by size, so the mean of the recorded per-document scores is its value."""
    result = dummy("MMLU", hub, results)
    assert sum(value for _, value in result.scored) / result.num_docs == pytest.approx(result.value)


def test_hellaswag_which_the_mirror_lacks_is_reported_with_the_way_to_get_it(hub: Path) -> None:
    with pytest.raises(UserError, match=r"Rowan/hellaswag.*hf download Rowan/hellaswag") as error:
        check_column(COLUMNS["HellaSwag"], data_root=hub)
    assert "\n" not in str(error.value)


def byte_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model over bytes, long enough for five shots."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


@pytest.mark.parametrize("column", load_suite("card").columns, ids=lambda column: column.name)
def test_a_transformers_model_runs_the_card_suite(column: Column, hub: Path) -> None:
    """Two documents of each task by a tiny model: the same documents as the dummy's, nothing truncated."""
    model, tokenizer = byte_model()
    result = evaluate_column(model, tokenizer, column, Documents(hub, limit=2), batch_size=4)
    assert result.protocol.task_hash.startswith(TASK_HASHES[column.name])
    assert (result.protocol.num_docs, result.protocol.num_total) == (2, TOTALS[column.name])
    assert 0 <= result.value <= 1
    assert result.truncated == 0
