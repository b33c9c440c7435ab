"""A tiny configuration of the same class as a model's: what a rehearsal draws weights for.

A configuration of transformers is a dataclass whose fields have the same names in most classes. The rules below go by these
names. Sizes become small; the kinds of layers stay, and so does everything that a tokenizer, a text or a window of
attention depends on: vocabulary, ids of special tokens, positions, tied embeddings.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH, HEADS, HEAD_DIM = 32, 2, 16
"""Hidden size, attention heads and channels of a head: 2 x 16 = 32."""
MOST_LAYERS = 16  # of a model in which every layer is of another kind
SMALL = 64
"""A configuration of no larger hidden size is kept."""
_EXPANDED = 2 * WIDTH  # channels of a state-space layer whose `expand` is 2, as in all of them
_EXPERTS, _CHOSEN = 4, 2  # experts of a layer, and how many of them a token is sent to

_RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    (
        r"((attention_)?hidden|embedding)_size|d_model|n_embd|(word_)?embed(_proj)?_dim|out_hidden_size|lru_width",
        lambda _: WIDTH,
    ),
    (r"hidden_size_per_layer_input", lambda old: min(old, 8)),
    (r"(moe|.*expert.*)_intermediate_size", lambda _: WIDTH),
    (r"(.*_)?intermediate_size(_mlp)?|ffn_(hidden_size|dim)|d_ff|n_inner|mamba_d_ssm", lambda _: 2 * WIDTH),
    (r"mamba_(n|num)_heads", lambda _: _EXPANDED // HEAD_DIM),
    (r"(.*_)?num_(attention_|linear_key_)?heads|.*num_attention_heads|n_heads?|linear_num_key_heads", lambda _: HEADS),
    (r"linear_num_value_heads", lambda _: 2 * HEADS),
    (r"qk_head_dim", lambda _: 2 * HEAD_DIM),
    (r"(.*_)?head_dim|mamba_d_head|kv_channels", lambda _: HEAD_DIM),
    (r"state_size|ssm_state_size|mamba_d_state|mamba_state_dim", lambda old: min(old, 8)),
    (r"mamba_n_groups|n_groups?|mamba_ngroups|topk_group", lambda _: 1),
    (r"(mamba_)?chunk_size", lambda old: min(old, 16)),
    (r"rotary_dim", lambda old: min(old, HEAD_DIM)),
    (r"time_step_rank|mamba_dt_rank", lambda _: 2),
    (r"(.*_)?lora_rank|laurel_rank", lambda old: min(old, 8)),
    (r"(n_routed|num_local|num_routed|moe_num|num)_experts", lambda old: min(old, _EXPERTS)),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k", lambda old: min(old, _CHOSEN)),
)
_KV_HEADS = re.compile(r"num(_global)?_(key_value|kv)_heads")
_LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|depth|.*_num_hidden_layers")
_INDEXES = re.compile(r".*(_indices|_indexes|_idxs|_layers|_layer_ids)")
_SHARED = "num_kv_shared_layers"  # the last layers, which use the keys and values of earlier ones
_ANY_LAYER = "allow_global_per_layer_attribute_access"
_DENSE = "first_k_dense_replace"  # the first layers, which have no experts


def shrunk(config: Any) -> Any:
    """A configuration of the same class with small sizes, and as many layers as there are kinds of them, at least two.

    Args:
        config: of transformers; its parts (`text_config` and the like) are shrunk as well.
    """
    config = readable(config)
    names = [field.name for field in dataclasses.fields(config) if field.name != "transformers_version"]
    given = {name: copy.deepcopy(getattr(config, name)) for name in names if hasattr(config, name)}
    parts = {name: getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None}
    heads, kv_heads = _first(config, "num_attention_heads"), _first(config, "num_key_value_heads")
    width = _first(config, "hidden_size")
    if width is not None and width > SMALL:
        given = _layers_cut(given, config)
        old_head = _first(config, "head_dim") or (width // heads if heads else HEAD_DIM)
        given = {name: _smaller(name, value, old_head) for name, value in given.items() if name not in parts}
        few = HEADS if heads is None or kv_heads is None or kv_heads >= heads else 1
        given |= {name: few for name, value in given.items() if _KV_HEADS.fullmatch(name) and value is not None}
        given |= _state_space_heads(given)
    given |= {name: shrunk(part) for name, part in parts.items()}
    if "out_hidden_size" in given:  # of a vision tower: the width of the language model
        given["out_hidden_size"] = WIDTH
    return type(config)(**given)


def readable(config: Any) -> Any:
    """A copy of which fields can be read that differ between layers (Gemma 4): the value of most of them."""
    found = copy.deepcopy(config)
    if hasattr(found, _ANY_LAYER):
        setattr(found, _ANY_LAYER, True)
    return found


def _first(config: Any, name: str) -> int | None:
    """A size under its general name; the largest where each layer has its own."""
    found = getattr(config, name, None)
    if isinstance(found, Sequence) and found:
        found = max(found)
    return found if isinstance(found, int) else None


def _smaller(name: str, value: Any, old_head: int) -> Any:
    """The value that a field has in the small configuration."""
    if name in ("rope_parameters", "rope_scaling"):
        return _rope(value, old_head)
    if isinstance(value, list | tuple):
        return [_smaller(name, item, old_head) for item in value]
    if not isinstance(value, int) or isinstance(value, bool) or value == 0:
        return value
    return next((rule(value) for pattern, rule in _RULES if re.fullmatch(pattern, name)), value)


def _rope(value: Any, old_head: int) -> Any:
    """Rotary settings with as many factors, or channels of a section, as the smaller heads have pairs of channels."""
    if isinstance(value, Mapping):
        return {name: _rope(item, old_head) for name, item in value.items()}
    if not isinstance(value, list | tuple) or not value:
        return value
    if all(isinstance(item, int) for item in value) and len(value) < HEAD_DIM // 2:  # channels of each section
        return _sections(value, max(1, sum(value) * HEAD_DIM // old_head))
    return list(value[: max(1, len(value) * HEAD_DIM // old_head)])


def _sections(sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers in about the same proportion that add up to ``total``."""
    ends = [round(sum(sizes[: number + 1]) * total / sum(sizes)) for number in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _state_space_heads(given: Mapping[str, Any]) -> dict[str, int]:
    """The heads of Mamba 2, whose channels are a multiple of the hidden size."""
    if {"state_size", "expand", "num_heads"} <= set(given):
        return {"num_heads": _EXPANDED // HEAD_DIM}
    return {}


def _layers_cut(given: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The fields with the first layers alone, among which is one of each kind."""
    counts = {name: value for name, value in given.items() if _LAYERS.fullmatch(name) and isinstance(value, int)}
    if not counts:
        return dict(given)
    old = max(counts.values())
    found = {**given, _DENSE: 1} if given.get(_DENSE) else dict(given)
    lists = {name: value for name, value in found.items() if isinstance(value, list | tuple) and value}
    indexes = {name: value for name, value in lists.items() if _INDEXES.fullmatch(name) and _are_indexes(value, old)}
    of_layers = {name: value for name, value in lists.items() if len(value) == old > 1 and name not in indexes}
    kinds = [*of_layers.values(), *_computed_kinds(config, old)]
    kinds += [[layer in one for layer in range(old)] for one in indexes.values()]
    kinds.append([layer < (found.get(_DENSE) or 0) for layer in range(old)])
    count = min(max(_first_of_each(list(zip(*kinds, strict=True))), 2), MOST_LAYERS, old)
    if found.get(_SHARED):
        count, found[_SHARED] = min(count + 1, old), 1
    found |= {name: list(value[:count]) for name, value in of_layers.items()}
    found |= {name: [layer for layer in value if layer < count] for name, value in indexes.items()}
    return found | {name: min(count, value) for name, value in counts.items()}


def _first_of_each(kinds: Sequence[Any]) -> int:
    """The number of first layers among which is one of each kind."""
    return max(kinds.index(kind) for kind in kinds) + 1


def _computed_kinds(config: Any, layers: int) -> list[Sequence[Any]]:
    """Kinds of layers that a class computes from other fields."""
    found = [getattr(config, name, None) for name in ("layer_types", "layers_block_type")]
    return [value for value in found if isinstance(value, Sequence) and len(value) == layers]


def _are_indexes(value: Sequence[Any], layers: int) -> bool:
    """Whether the numbers of layers are meant, and no number for each layer."""
    numbers = [item for item in value if isinstance(item, int) and 0 <= item < layers]
    return len(numbers) == len(value) and numbers == sorted(set(numbers))
