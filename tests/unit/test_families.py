"""For each class of models the scorer has the values and gradients of full logits, or is refused with the reason."""

import sys
from pathlib import Path

import pytest

from ctpd.core.errors import UserError

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
