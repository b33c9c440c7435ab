"""Greedy decoding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from ctpd.pipeline.stage import Work


@torch.no_grad()
def _greedy(
    model: Any, prompts: Sequence[NDArray[np.int32]], *, end_token: int, max_tokens: int, work: Work, batch: int = 32
) -> list[list[int] | None]:
    """The likeliest continuation of each prompt without its end token; None if it did not end.

    A model's own `generation_config` (penalties, suppressed tokens) has no say.
    """
    device = next(model.parameters()).device
    model.generation_config = GenerationConfig()  # the library fills what is unset from the model's own
    result: list[list[int] | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), end_token, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(chosen):
            ids[place, width - len(prompts[i]) :] = torch.from_numpy(prompts[i].astype(np.int64))
            mask[place, width - len(prompts[i]) :] = 1
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens - min(len(prompts[i]) for i in chosen), eos_token_id=end_token,
            pad_token_id=end_token,
        )  # fmt: skip
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )[:, width:].tolist()  # fmt: skip
        for i, tokens in zip(chosen, out, strict=True):
            own = tokens[: max_tokens - len(prompts[i])]
            result[i] = own[: own.index(end_token)] if end_token in own else None
        work.progress(start + len(chosen), len(order))
    return result
