"""Responses that a model generates: greedy, independent of the batch, unfinished ones marked."""

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM

from baselines.adpa import ADPA
from ctpd.core.errors import UserError
from ctpd.decoding import greedy_responses, takes_padded_prompts
from ctpd.models import install_scorer
from ctpd.pipeline.stages.generate import GenerateConfig, _replaced, refuse_losses
from ctpd.text.messages import Message
from ctpd.text.pairs import Pair
from tests.fixtures.tiny import COMMON, CONFIGS, VOCABULARY, tiny_model

HYBRID = Lfm2Config(**COMMON, layer_types=["conv", "full_attention"], bos_token_id=1, eos_token_id=2)
PROMPTS = [np.random.default_rng(n).integers(1, VOCABULARY, n).astype(np.int32) for n in (3, 9, 5, 7, 4, 6)]


def decoded(model: Any, prompts: list[np.ndarray], *, end_token: int) -> list[list[int] | None]:
    return greedy_responses(
        model, prompts, end_token=end_token, max_tokens=20, progress=lambda done, total: None, batch_size=4
    )


def one_by_one(model: Any, prompt: np.ndarray, *, end_token: int, max_new: int) -> list[int] | None:
    """Greedy decoding as a plain loop without a cache."""
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(max_new):
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == end_token:
                return ids[len(prompt) :]
            ids.append(best)
    return None


def hybrid() -> Any:
    torch.manual_seed(3)
    return install_scorer(Lfm2ForCausalLM(HYBRID).eval())


@pytest.mark.parametrize("name", [*CONFIGS, "hybrid"])
def test_a_response_is_the_greedy_one_whatever_its_batch(name: str) -> None:
    """With windows shorter than a prompt, and for a model that does not support 4D attention masks."""
    model: Any = hybrid() if name == "hybrid" else tiny_model(name, seed=3)
    before = copy.deepcopy(model.config)
    assert takes_padded_prompts(model) == takes_padded_prompts(model) == (name != "hybrid")
    assert model.config.to_dict() == before.to_dict()
    ends: dict[str, int] = {"finished": 0, "unfinished": 0}
    for end_token in range(1, VOCABULARY, 7):
        expected = [one_by_one(model, p, end_token=end_token, max_new=20 - len(p)) for p in PROMPTS]
        assert decoded(model, PROMPTS, end_token=end_token) == expected
        ends["unfinished"] += sum(response is None for response in expected)
        ends["finished"] += sum(response is not None for response in expected)
    assert min(ends.values()) > 0, "the test saw both"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_response_is_that_of_transformers(name: str) -> None:
    model: Any = tiny_model(name, seed=3)
    for prompt, found in zip(PROMPTS, decoded(model, PROMPTS, end_token=11), strict=True):
        room = 20 - len(prompt)
        settings = GenerationConfig(do_sample=False, max_new_tokens=room, pad_token_id=0, eos_token_id=11)
        (tokens,) = model.generate(torch.from_numpy(prompt.astype(np.int64))[None], generation_config=settings)
        theirs = tokens[len(prompt) :].tolist()
        assert found == (theirs[: theirs.index(11)] if 11 in theirs else None)


def test_a_prompt_that_leaves_no_room_has_no_response() -> None:
    prompts = [np.arange(1, 25, dtype=np.int32), np.arange(1, 4, dtype=np.int32)]
    model = tiny_model("llama", seed=3)
    assert decoded(model, prompts, end_token=1)[0] is None
    assert decoded(model, prompts[:1], end_token=1) == [None]


def test_a_models_own_generation_settings_are_not_used() -> None:
    model, plain = (tiny_model("llama", seed=3) for _ in range(2))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [1, 2, 3]
    prompts = [np.array([5, 6, 7], dtype=np.int32)]
    assert decoded(model, prompts, end_token=11) == decoded(plain, prompts, end_token=11)


@pytest.mark.parametrize(
    ("text", "reason", "reason_if_kept"),
    [("Yes.", "equal", "kept"), ("", "empty", "empty"), (None, "unfinished", "unfinished"), ("No.", "kept", "kept")],
)
def test_a_response_that_equals_the_other_one_is_dropped_unless_the_objective_keeps_it(
    text: str | None, reason: str, reason_if_kept: str
) -> None:
    """ADPA does not compare the two; its public code drops none."""
    pair = Pair("0", (Message("user", "Why?"),), "Yes.", "Maybe.")
    for keeps, expected in ((False, reason), (True, reason_if_kept)):
        config = GenerateConfig(role="student", side="rejected", precision="float32", keep_equal=keeps)
        assert _replaced(pair, config, text)[0] == expected
    assert ADPA.generation is not None
    assert ADPA.generation.keep_equal


def test_too_many_responses_that_cannot_be_used_are_refused_with_their_reasons() -> None:
    refuse_losses(Counter(kept=90, equal=10), role="student", max_dropped=0.1)
    with pytest.raises(UserError, match=r"of 100 responses that the student generated, 11 .*\(4 equal, 7 unfinished\)"):
        refuse_losses(Counter(kept=89, equal=4, unfinished=7), role="student", max_dropped=0.1)
