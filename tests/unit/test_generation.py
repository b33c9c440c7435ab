"""Responses that a model writes itself: greedy, the same in any batch, unfinished ones told apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ctpd.pipeline.distillation import _greedy
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
