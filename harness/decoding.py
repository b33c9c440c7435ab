"""Greedy generation of a batch: keys and values in one piece of memory, and rows that leave as they finish.

Shape legend: B rows of a batch, T tokens of the longest prompt, H heads, W width of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from harness.branching import BranchingModel

HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "do_sample",
    "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate",
}  # fmt: skip
"""Settings of a model's generation that do not move the greedy choice of a token."""


def plainly_greedy(config: GenerationConfig | None) -> bool:
    """Whether a model's own settings leave greedy generation what it is: no penalties, beams or forced tokens."""
    return config is None or set(config.to_diff_dict()) <= HARMLESS


def end_tokens(config: GenerationConfig | None) -> set[int]:
    """The tokens after which a model's generation ends."""
    given = None if config is None else config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)


def generate(
    model: BranchingModel, prompts: Sequence[Sequence[int]], *, room: int, finished: Callable[[list[int]], bool]
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, up to ``room``, until ``finished`` says so of a row's tokens."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    cache = _RoomyCache(room)
    rows = list(range(len(prompts)))  # the rows of the cache; some are finished until the cache is thinned out
    written: list[list[int]] = [[] for _ in prompts]
    live = set(rows)
    logits_BV = model.prefill(ids_BT.to(model.device), padding, cache)
    while True:
        chosen_B = logits_BV.argmax(-1)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            if row in live:
                written[row].append(token)
                if len(written[row]) == room or finished(written[row]):
                    live.remove(row)
        if not live:
            return written
        if 2 * len(live) <= len(rows):
            kept = [place for place, row in enumerate(rows) if row in live]
            rows, padding = [rows[place] for place in kept], [padding[place] for place in kept]
            places = torch.tensor(kept, device=chosen_B.device)
            chosen_B = chosen_B[places]
            cache.select(places)
        logits_BV = model.step(chosen_B, padding, cache)


class _RoomyLayer(DynamicLayer):
    """Keys and values [B, H, T, W] with room behind them: a new token is written in place, not by a copy of all."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._used = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new ones; returns views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = [_with_room(state, self._room) for state in (key_states, value_states)]
        end = self._used + key_states.shape[2]
        for held, state in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, self._used : end] = state
        self._used = end
        self.keys, self.values = (held[:, :, :end] for held in self._held)
        return self.keys, self.values

    def select(self, places: Tensor) -> None:
        """Keep these rows."""
        self._held = [held[places] for held in self._held]
        self.keys, self.values = (held[:, :, : self._used] for held in self._held)


class _RoomyCache(DynamicCache):
    """Layers with room for so many further tokens, made as the model asks for them."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.layer_class_to_replicate = lambda: _RoomyLayer(room)

    def select(self, places: Tensor) -> None:
        """Keep these rows of every layer."""
        for layer in self.layers:
            layer.select(places)


def _with_room(state: Tensor, room: int) -> Tensor:
    batch, heads, length, width = state.shape
    return state.new_empty(batch, heads, length + room, width)
