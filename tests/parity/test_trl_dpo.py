"""DPO's loss, metrics and parameter gradients against TRL's trainer, on the same tiny model and the same token ids."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from baselines.dpo import DPO, DPOParams
from ctpd.objectives.base import Sums, Units
from ctpd.ops.logps import token_logps
from ctpd.ops.spans import unit_logps

# TRL 1.16 uses names that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BETA = 0.2
LOGGED = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
LOGGED += ["logps/chosen", "logps/rejected"]
ROWS = [
    {"prompt": "what is the capital of france ", "chosen": "paris it is", "rejected": "madrid"},
    {"prompt": "two plus two ", "chosen": "is four", "rejected": "is five plus six it has no answer"},
    {"prompt": "what is the answer ", "chosen": "it has no answer", "rejected": "the answer is six"},
]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """By default TRL reports every trainer to the hub; the environment variables are read when hub code is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        constants = importlib.import_module("huggingface_hub.constants")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield


def tokenizer() -> PreTrainedTokenizerFast:
    words_in_use = sorted({word for row in ROWS for text in row.values() for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words_in_use])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(tokenizer: PreTrainedTokenizerFast, *, seed: int, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def trl_trainer(policy: LlamaForCausalLM, reference: LlamaForCausalLM, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        per_device_train_batch_size=len(ROWS),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
    )
    return DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )


def units_of(language_model: LlamaForCausalLM, batch: dict[str, Tensor], unit_RT: Tensor) -> Tensor:
    """Our log-probabilities of the completion's tokens: decoder, scored rows, tiled head, one unit for each token."""
    hidden = language_model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    scored = unit_RT >= 0
    targets = batch["input_ids"][:, 1:][scored]
    weight = language_model.lm_head.weight
    logps = token_logps(hidden[:, :-1][scored], weight, targets, tile_bytes=5 * 4 * len(weight))
    logps_RT = logps.new_zeros(scored.shape).masked_scatter(scored, logps)
    return unit_logps(logps_RT, unit_RT, num_units=int(unit_RT.max()) + 1)


def our_sums(policy: LlamaForCausalLM, reference: LlamaForCausalLM, batch: dict[str, Tensor]) -> Sums:
    scored = batch["completion_mask"][:, 1:].bool()
    unit_RT = (scored.cumsum(1) - 1).masked_fill(~scored, -1)
    policy_RU = units_of(policy, batch, unit_RT)
    with torch.no_grad():
        reference_RU = units_of(reference, batch, unit_RT)
    mask_RU = torch.arange(policy_RU.shape[1]) < scored.sum(1, keepdim=True)
    sums: Sums = DPO(DPOParams(beta=BETA))(Units(policy=policy_RU, mask=mask_RU, reference=reference_RU))
    return sums


@pytest.mark.parametrize(
    ("tied", "frozen_head"), [(False, False), (True, False), (False, True)], ids=["untied", "tied", "frozen head"]
)
def test_loss_metrics_and_gradients_equal_trls(tmp_path: Path, tied: bool, frozen_head: bool) -> None:
    """One batch: the mean loss, the logged metrics and the gradient of every parameter are TRL's."""
    policy = model(tokenizer(), seed=0, tied=tied)
    reference = model(tokenizer(), seed=1, tied=tied).eval().requires_grad_(False)
    policy.lm_head.weight.requires_grad_(not frozen_head)
    trainer = trl_trainer(policy, reference, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["completion_mask"].sum(1) > 1).all()

    policy.zero_grad()
    theirs = trainer.compute_loss(policy, dict(batch))
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    policy.zero_grad()
    sums = our_sums(policy, reference, batch)
    loss = sums.loss / sums.count
    loss.backward()

    torch.testing.assert_close(loss.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
    assert abs(loss.item() - 0.6931) > 0.01, "the batch must not be a trivial one"
    for name in LOGGED:
        assert float(sums.metrics[name]) / sums.count == pytest.approx(logged[name], rel=1e-5, abs=1e-5), name
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
