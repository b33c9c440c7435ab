"""For each class of models the scorer has the values and gradients of full logits, or is refused with the reason."""

import sys
from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from ctpd.text.config import PairsConfig
from ctpd.text.prepare import prepare_pairs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import families

REFUSED = {"Mamba": "out_proj", "Falcon H1 (hybrid)": "out_proj", "Llama 4, text": "Llama4ForCausalLM"}
"""Families whose linear layers PEFT puts no adapters on, or does so in vain, and a word of the reason."""

FULL_LOGITS = {"Llama 4, text"}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_scorer_has_the_values_and_gradients_of_full_logits_full_and_with_adapters(name: str) -> None:
    model = families.FAMILIES[name].model()
    found = families.compare(model)
    assert found.logps < 1e-5
    assert found.gradients < 1e-5
    assert found.full is (name in FULL_LOGITS)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            families.compare(families.with_adapters(model))
        return
    adapted = families.compare(families.with_adapters(model))
    assert adapted.logps < 1e-5
    assert adapted.gradients < 1e-5
    assert not adapted.full


def test_published_tokenizers_lose_no_token_and_their_templates_are_reported(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of each kind: a system message moves or is refused, reasoning is kept, and the difference is counted."""
    monkeypatch.setattr(families, "_DATA", shared_dir / "data" / families._DATA.relative_to(families.SHARED))
    monkeypatch.setattr(families, "SHARED", shared_dir / "data")
    monkeypatch.setattr(families, "_PAIRS", 4)
    monkeypatch.setattr(families, "_CHANGED", 1)
    config = PairsConfig(max_tokens=256, max_prompt_tokens=128, long_prompt="cut", max_dropped=0.9)
    expected = {
        ("qwen3", "gemma2"): ({"template": 2}, {"inserted"}, set()),
        ("mistral_nemo", "llama3_1"): ({"template": 1}, {"prompt"}, set()),
    }
    for (teacher, student), (dropped, of_teacher, of_student) in expected.items():
        sides = families.templated(teacher, "teacher"), families.templated(student, "student")
        found = prepare_pairs({"train": families.sample()}, config, teacher=sides[0], student=sides[1])
        assert {reason: number for reason, number in found.dropped.items() if number} == dropped
        kinds = [
            {name.removeprefix(f"{role}_template_") for name in found.report if name.startswith(f"{role}_template_")}
            for role in ("teacher", "student")
        ]
        assert kinds == [of_teacher, of_student]
        assert families.lost_tokens(found) == 0
        assert any(text.startswith("<think>") for text in found.chosen)
