"""Multimodal checkpoints: the language part is trained, all the rest is kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from ctpd.models import add_lora, load_model, save_model, score
from ctpd.probes import configure_scorer
from tests.fixtures.tiny import IDS, REQUEST, tiny_multimodal
from tests.fixtures.tokenizers import tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_multimodal("gemma3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path) -> Any:
    return load_model(folder, precision="float32", device="cpu")


def inside(names: Any) -> set[bool]:
    """Whether the names are of the language part."""
    return {"language_model" in name or "lm_head" in name for name in names}


def test_only_the_language_part_is_trained(folder: Path) -> None:
    """In training mode too; and every weight that is trained has a gradient, as several processes need it."""
    model = loaded(folder).train()
    configure_scorer(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert inside(trained) == {True}
    assert inside(name for name, p in model.named_parameters() if not p.requires_grad) == {False}
    gradients = torch.autograd.grad(score(model, IDS, REQUEST).sum(), list(trained.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "fc1")])
def test_adapters_are_on_the_language_part_alone(folder: Path, targets: Any) -> None:
    """The vision tower has layers of the same names."""
    model = loaded(folder)
    assert any("vision" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    adapted = add_lora(model, r=2, alpha=4, targets=targets, seed=0)
    assert inside(name for name, p in adapted.named_parameters() if p.requires_grad) == {True}


@pytest.mark.parametrize("lora", [False, True])
def test_a_trained_model_is_saved_whole_and_read_by_transformers_and_lm_eval(folder: Path, lora: bool) -> None:
    model, to = loaded(folder), folder.parent / "saved"
    if lora:
        model = add_lora(model, r=2, alpha=4, targets="all-linear", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "embed" not in name:
                parameter.add_(0.1)
    expected = score(model, IDS, REQUEST).detach()
    if lora:
        save_model(model, folder.parent / "adapter")
        model = load_model(folder, adapters=[folder.parent / "adapter"], precision="float32", device="cpu")
    save_model(model, to)
    before, after = load_file(folder / WEIGHTS), load_file(to / WEIGHTS)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "vision" in name or "projector" in name} <= same
    assert same < before.keys()
    assert type(AutoModelForMultimodalLM.from_pretrained(to)).__name__ == "Gemma3ForConditionalGeneration"
    torch.testing.assert_close(score(loaded(to), IDS, REQUEST), expected, rtol=1e-4, atol=1e-4)
    read = HFLM(pretrained=str(to), tokenizer=copy.deepcopy(tokenizer("byte_bpe")), device="cpu", batch_size=1)
    logps = read.model(IDS).logits.flatten(0, 1)[REQUEST.predictors].log_softmax(-1)
    torch.testing.assert_close(logps.gather(-1, REQUEST.targets[:, None])[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_would_load_as_text_alone_is_loaded_whole(tmp_path: Path) -> None:
    """transformers has a class for the text of Qwen 3.5 alone, which leaves the vision tower out."""
    tiny_multimodal("qwen3_5").save_pretrained(tmp_path / "model")
    model = loaded(tmp_path / "model")
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    assert any("visual" in name for name, _ in model.named_parameters())
