"""Greedy decoding in batches of prompts of different lengths, for generated responses and for evaluation alike.

Prompts are padded on the left. Keys and values have room for the whole generation, so that a new token is written in
place; rows that are finished leave the batch. A model that takes no masks of ours is run without a cache instead.

Shape legend: B rows of a batch, T tokens of the longest prompt, V vocabulary, H heads, W width of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from ctpd.core.errors import NotFinite
from ctpd.models import Outputs
from ctpd.probes import other_mixing, same_logits, short_windows

HARMLESS = frozenset(
    [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "return_dict_in_generate",
    ]
)
"""Settings of a model's `generation_config` that do not change which token is the greedy choice."""

Finished = Callable[[list[int]], bool]
"""Whether a row ends, given the tokens that were generated for it."""


class Unsupported(Exception):
    """The model cannot be called with masks and positions of ours; the message says why."""


class MaskedModel:
    """A causal language model that is called with attention masks and positions of ours.

    Layers with a sliding window get a mask of their own; windows count positions, as in transformers.

    Raises:
        Unsupported: the model's configuration says that its attention or positions are of another kind.
    """

    def __init__(self, model: nn.Module) -> None:
        if reason := refused_masks(model):
            raise Unsupported(reason)
        self.model: Any = model
        config: Any = model.config
        text = config.get_text_config()
        self._kinds = set(getattr(text, "layer_types", None) or ())
        self._window: int | None = getattr(text, "sliding_window", None)
        if self._kinds == {"full_attention"} or not getattr(text, "use_sliding_window", True):
            self._window = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, padding: Sequence[int], cache: Any) -> Tensor:
        """Logits [B, V] after prompts that are padded on the left; fills an empty cache.

        Args:
            ids_BT: the prompts.
            padding: the number of padding tokens of each.
        """
        width = ids_BT.shape[1]
        positions = torch.arange(width) - torch.tensor(padding)[:, None]
        masks = None
        if any(padding):
            allowed = torch.ones(width, width, dtype=torch.bool).tril() & (positions >= 0)[:, None]
            masks = self.masks(allowed, positions, positions)
        return self._last_logits(ids_BT, positions.clamp(min=0), masks, cache)

    @torch.no_grad()
    def step(self, ids_B: Tensor, padding: Sequence[int], cache: Any) -> Tensor:
        """Logits [B, V] after one more token of each row; ``padding`` as for the prompts."""
        of_keys = torch.arange(cache.get_seq_length() + 1) - torch.tensor(padding)[:, None]
        positions = of_keys[:, -1:]
        masks = self.masks((of_keys >= 0)[:, None], positions, of_keys) if any(padding) else None
        return self._last_logits(ids_B[:, None], positions, masks, cache)

    def _last_logits(self, ids: Tensor, positions: Tensor, masks: Any, cache: Any) -> Tensor:
        outputs = self.model(
            input_ids=ids,
            position_ids=positions.to(self.device),
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = outputs.logits[:, -1]
        return logits_BV

    def masks(self, allowed: Tensor, of_queries: Tensor, of_keys: Tensor) -> Any:
        """The `attention_mask` for transformers: [B, 1, queries, keys], added to the scores; or one a kind of layer.

        Args:
            allowed: [B, queries, keys], whether a query may attend to a key, windows aside.
            of_queries: [B, queries] positions.
            of_keys: [B, keys] positions.
        """
        if self._window is None:
            return self._added(allowed)
        near = self._added(allowed & (of_queries[:, :, None] - of_keys[:, None] < self._window))
        if self._kinds <= {"sliding_attention"}:
            return near
        return {"full_attention": self._added(allowed), "sliding_attention": near}

    def _added(self, allowed: Tensor) -> Tensor:
        dtype = self.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
        # The least number, not -inf: the row of a padding query is masked everywhere, and its softmax must not be NaN.
        return mask.masked_fill_(~allowed.to(self.device), torch.finfo(dtype).min)[:, None]


def refused_masks(model: nn.Module) -> str | None:
    """Why the configuration of a model rules out masks and positions of ours; None if it does not."""
    config: Any = model.config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "encoder and decoder"
    # Ours is the library's `sdpa` for rows that are not packed (`ctpd.train.sharing`).
    if getattr(text, "_attn_implementation", "eager") not in ("eager", "sdpa", "ctpd_shared_rows"):
        return f"attention implementation {text._attn_implementation} takes no mask of ours"
    if reason := other_mixing(model):
        return reason
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds_of_rope = {rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))}
    if kinds_of_rope & {"dynamic", "longrope"}:
        return "positions that depend on the length of the whole batch"
    return None


def takes_padded_prompts(model: nn.Module) -> bool:
    """Whether `MaskedModel` can call the model: a trial with padded prompts gives the logits of each prompt alone.

    Sliding windows are shorter than the prompts in the trial. Leaves the model as it is.
    """
    try:
        with short_windows(model, 5):
            return _padding_changes_no_logits(MaskedModel(model))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that takes other arguments or another cache raises whatever it likes
        return False


def _padding_changes_no_logits(model: MaskedModel) -> bool:
    vocabulary = model.model.get_input_embeddings().num_embeddings
    tokens = [i * 7919 % vocabulary for i in range(1, 13)]
    prompts, following = [tokens[:7], tokens[7:11]], tokens[10:12]
    padding = [0, 3]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    cache = _RoomyCache(1)
    found = [model.prefill(ids.to(model.device), padding, cache)]
    found.append(model.step(torch.tensor(following, device=model.device), padding, cache))
    plain = [_plain_logits(model.model, [*prompt, token]) for prompt, token in zip(prompts, following, strict=True)]
    return all(same_logits(plain[row], torch.stack([logits_BV[row] for logits_BV in found])) for row in range(2))


@torch.no_grad()
def _plain_logits(model: Any, tokens: list[int]) -> Tensor:
    """The logits at the last two tokens, by the simplest call."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    logits: Tensor = model(ids).logits[0, -2:]
    return logits


def greedy_responses(
    model: nn.Module,
    prompts: Sequence[NDArray[np.int32]],
    *,
    end_token: int,
    max_tokens: int,
    progress: Callable[[int, int], None],
    batch_size: int = 32,
) -> list[list[int] | None]:
    """The greedy continuation of each prompt, without its end token; None where it does not end.

    A model's own `generation_config` (penalties, suppressed tokens) is not used.

    Args:
        model: frozen, in evaluation mode, with the scorer installed.
        max_tokens: tokens of a prompt and its response, the end token included.
        progress: called with the prompts done and the number of all prompts.

    Raises:
        NotFinite: the model gives logits that are NaN or infinite.
    """
    masked = MaskedModel(model) if takes_padded_prompts(model) else None

    def finished(tokens: list[int]) -> bool:
        return tokens[-1] == end_token

    result: list[list[int] | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        given, room = [prompts[i].tolist() for i in batch], [max_tokens - len(prompts[i]) for i in batch]
        if masked is not None:
            generated = greedy_tokens(masked, given, room=room, finished=finished)
        else:
            generated = _without_cache(model, given, room=room, finished=finished)
        for i, tokens in zip(batch, generated, strict=True):
            result[i] = tokens[:-1] if tokens and finished(tokens) else None
        progress(start + len(batch), len(order))
    return result


def greedy_tokens(
    model: MaskedModel, prompts: Sequence[Sequence[int]], *, room: Sequence[int], finished: Finished
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, until ``finished`` is true of a row's tokens.

    Args:
        room: the largest number of new tokens of each row.

    Raises:
        NotFinite: the model gives logits that are NaN or infinite.
    """
    generated: list[list[int]] = [[] for _ in prompts]
    live = {row for row in range(len(prompts)) if room[row] > 0}
    if not live:
        return generated
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    cache = _RoomyCache(max(room))
    rows = list(range(len(prompts)))  # the rows of the cache: finished ones stay until at most half are left
    logits_BV = model.prefill(ids_BT.to(model.device), padding, cache)
    while True:
        likeliest_B2 = _likeliest(logits_BV)
        chosen_B = likeliest_B2[:, 0]
        for row, token in zip(rows, _tokens(likeliest_B2), strict=True):
            if row in live:
                generated[row].append(token)
                if len(generated[row]) == room[row] or finished(generated[row]):
                    live.remove(row)
        if not live:
            return generated
        if 2 * len(live) <= len(rows):
            kept = [index for index, row in enumerate(rows) if row in live]
            rows, padding = [rows[index] for index in kept], [padding[index] for index in kept]
            kept_K = torch.tensor(kept, device=chosen_B.device)
            chosen_B = chosen_B[kept_K]
            cache.select(kept_K)
        logits_BV = model.step(chosen_B, padding, cache)


@torch.no_grad()
def _without_cache(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, room: Sequence[int], finished: Finished
) -> list[list[int]]:
    """The same for any causal model: all tokens again for each new one, padded on the right, which needs no mask."""
    device = next(model.parameters()).device
    generated: list[list[int]] = [[] for _ in prompts]
    live = [row for row in range(len(prompts)) if room[row] > 0]
    while live:
        texts = [[*prompts[row], *generated[row]] for row in live]
        width = max(map(len, texts))
        ids_BT = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        last_B = torch.tensor([index * width + len(text) - 1 for index, text in enumerate(texts)], device=device)

        def likeliest(outputs: Outputs, last_B: Tensor = last_B) -> Tensor:
            return outputs.every.select(last_B).map(_likeliest)

        for row, token in zip(live, _tokens(model(input_ids=ids_BT, score=likeliest)), strict=True):
            generated[row].append(token)
        live = [row for row in live if len(generated[row]) < room[row] and not finished(generated[row])]
    return generated


def _likeliest(logits_BV: Tensor) -> Tensor:
    """[B, 2]: the likeliest token, and whether the logits are finite: the largest is NaN if one of them is."""
    return torch.stack([logits_BV.argmax(-1), logits_BV.amax(-1).isfinite().long()], dim=1)


def _tokens(likeliest_B2: Tensor) -> list[int]:
    """The tokens of `_likeliest`. Waits for the device."""
    found = likeliest_B2.tolist()
    if not all(finite for _, finite in found):
        raise NotFinite(
            "the logits of the model are not finite, so that no token is the likeliest",
            fix="Give a model whose numbers are finite; `precision: float32` helps where one overflows in bfloat16",
        )
    return [token for token, _ in found]


def is_plainly_greedy(config: GenerationConfig | None) -> bool:
    """Whether a model's own settings leave the greedy choice as it is: no penalties, beams or forced tokens."""
    return config is None or set(config.to_diff_dict()) <= HARMLESS


def end_tokens(config: GenerationConfig | None) -> set[int]:
    """The tokens after which a model's generation ends."""
    given = None if config is None else config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)


class _RoomyLayer(DynamicLayer):
    """Keys and values [B, H, T, W] with room for more tokens, which are written in place instead of copying all."""

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

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        self._held = [held[rows] for held in self._held]
        self.keys, self.values = (held[:, :, : self._used] for held in self._held)


class _RoomyCache(DynamicCache):
    """Layers with room for so many further tokens, made when the model first uses them."""

    def __init__(self, room: int) -> None:
        super().__init__()
        cache: Any = self  # the library calls what it takes for a class without arguments
        cache.layer_class_to_replicate = lambda: _RoomyLayer(room)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of every layer."""
        for layer in self.layers:
            assert isinstance(layer, _RoomyLayer)
            layer.select(rows)


def _with_room(state: Tensor, room: int) -> Tensor:
    batch, heads, length, width = state.shape
    return state.new_empty(batch, heads, length + room, width)
