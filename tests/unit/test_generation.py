"""Responses that a model writes itself: greedy, the same in any batch, unfinished ones told apart."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ctpd.core.errors import UserError
from ctpd.objectives.base import Generation
from ctpd.pipeline.distillation import _greedy, _refuse_losses
from ctpd.recipe import DataSpec, Source
from tests.fixtures.tiny import VOCABULARY, tiny_model

WORK: Any = SimpleNamespace(progress=lambda done, total: None, folder=Path())


def one_by_one(model: Any, prompt: np.ndarray, *, end_token: int, max_new: int) -> list[int] | None:
    """The loop that greedy decoding is, without a cache."""
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(max_new):
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == end_token:
                return ids[len(prompt) :]
            ids.append(best)
    return None


def test_a_response_is_the_greedy_one_whatever_its_batch() -> None:
    model: Any = tiny_model("llama", seed=3)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCABULARY, n).astype(np.int32) for n in (3, 9, 5, 7, 4, 6)]
    ends: dict[str, int] = {"finished": 0, "unfinished": 0}
    for end_token in range(1, VOCABULARY, 7):
        expected = [one_by_one(model, p, end_token=end_token, max_new=20 - len(p)) for p in prompts]
        assert _greedy(model, prompts, end_token=end_token, max_tokens=20, work=WORK) == expected
        ends["unfinished"] += sum(response is None for response in expected)
        ends["finished"] += sum(response is not None for response in expected)
    assert min(ends.values()) > 0, "the test saw both"


def test_a_models_own_generation_settings_have_no_say() -> None:
    model, plain = (tiny_model("llama", seed=3) for _ in range(2))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [1, 2, 3]
    prompts = [np.array([5, 6, 7], dtype=np.int32)]
    assert _greedy(model, prompts, end_token=11, max_tokens=20, work=WORK) == _greedy(
        plain, prompts, end_token=11, max_tokens=20, work=WORK
    )


def test_too_many_responses_that_cannot_be_used_are_refused_with_their_reasons() -> None:
    data = DataSpec(train=Source(testbed="train"), max_tokens=64, max_prompt_tokens=32, max_dropped=0.1)
    generation = Generation(writer="student", side="rejected")
    _refuse_losses(Counter(kept=90, equal=10), generation, data)
    with pytest.raises(UserError, match=r"of 100 responses that the student wrote, 11 .*\(4 equal, 7 unfinished\)"):
        _refuse_losses(Counter(kept=89, equal=4, unfinished=7), generation, data)
