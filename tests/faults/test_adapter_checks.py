"""What small files say of adapters, ready-made or wanted, is said before the first stage in one paragraph."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from ctpd.core.errors import UserError
from ctpd.models import add_lora, load_model, save_model
from tests.fixtures.ready_made import ROWS, STUDENT, edit, lora, notes, rewrite, save
from tests.fixtures.ready_made import folder as folder
from tests.fixtures.tiny import CONFIGS


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_refused_with_the_way_out(folder: Path, name: str) -> None:
    """PEFT issue 2018: merged, it would act in both; and by default no adapter is on either."""
    config = CONFIGS["llama_tied"]()
    config.vocab_size = ROWS
    save(folder / STUDENT, LlamaForCausalLM(config))
    with pytest.raises(UserError, match=rf"has 'model.*{name}'|has '{name}'.*all-linear"):
        notes(folder, lora(targets=["q_proj", name]))
    assert notes(folder, lora(targets="all-linear")) == []
    model = load_model(folder / STUDENT, precision="float32", device="cpu")
    adapted = add_lora(model, r=2, alpha=4, targets="all-linear", seed=0)
    assert not any(
        "lora" in key and ("lm_head" in key or "embed_tokens" in key) for key, _ in adapted.named_parameters()
    )


def test_targets_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"`lora.targets.*Target modules.*query_key_value"):
        notes(folder, lora(targets=["query_key_value"]))


@pytest.fixture
def adapter(folder: Path) -> Path:
    """A LoRA adapter on the student, which the recipe takes for its SFT model."""
    model = load_model(folder / STUDENT, precision="float32", device="cpu")
    save_model(add_lora(model, r=2, alpha=4, targets="all-linear", seed=0), folder / "adapter")
    return folder / "adapter"


def with_adapter(folder: Path) -> list[str]:
    return notes(folder, lambda shared: shared["student"].update(sft=str(folder / "adapter")))


def test_a_sound_adapter_passes_in_silence(folder: Path, adapter: Path) -> None:
    assert with_adapter(folder) == []


def test_an_adapter_with_a_missing_weight_is_refused(folder: Path, adapter: Path) -> None:
    """PEFT warns, and draws the weight at random."""
    file = adapter / "adapter_model.safetensors"
    lost = next(name for name in load_file(file) if "v_proj.lora_A" in name)
    rewrite(file, lambda weights: weights.pop(lost))
    both = (
        lambda: with_adapter(folder),
        lambda: load_model(folder / STUDENT, adapters=[adapter], precision="float32", device="cpu"),
    )
    for read in both:
        with pytest.raises(UserError, match=rf"adapter: the adapter lacks 1 of the model's weights.*{lost}"):
            read()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": 4}, "size mismatch|another shape"),
        ({"peft_type": "UNHEARD_OF"}, "UNHEARD_OF"),
        ({"target_modules": ["unheard_of"]}, "unheard_of"),
    ],
)
def test_what_a_library_says_of_an_adapter_is_one_paragraph(
    folder: Path, adapter: Path, changed: dict[str, Any], said: str
) -> None:
    edit(adapter / "adapter_config.json", **changed)
    both = (
        lambda: with_adapter(folder),
        lambda: load_model(folder / STUDENT, adapters=[adapter], precision="float32", device="cpu"),
    )
    for read in both:
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert str(caught.value).startswith(str(adapter))
