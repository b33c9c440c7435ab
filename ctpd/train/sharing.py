"""Prompt sharing: the prompt of a pair is computed once and both responses continue it (`ctpd.ops.shared_rows`)."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctpd.models import Score, score
from ctpd.ops.shared_rows import PackedLayout, pack_pairs, packed_attention
from ctpd.probes import other_mixing, same_results, short_windows, trial_tokens
from ctpd.train.batches import to_device

PLAIN, SHARING = "sdpa", "ctpd_shared_rows"  # names of attention implementations of transformers: its own, and ours


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The library's attention, and the same within each row of packed sequences; the signature is transformers'."""
    layout: PackedLayout | None = options.pop("packed_layout", None)
    if layout is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    options.pop("position_ids", None)
    plain = functools.partial(sdpa_attention_forward, module)
    return packed_attention(plain, query, key, value, layout=layout, **options)


AttentionInterface.register(SHARING, _attention)
AttentionMaskInterface.register(SHARING, sdpa_mask)


def enable_prompt_sharing(model: nn.Module) -> bool:
    """Switch a model to the attention that reads packed pairs, if `can_share_prompts`; a second call changes nothing.

    Returns:
        Whether packed pairs may be given to the model. If not, the model is as it was.
    """
    base = _base(model)
    if _implementation(base) == SHARING:
        return True
    if not can_share_prompts(model):
        return False
    base.set_attn_implementation(SHARING)
    return True


def share_prompts_where_quicker(model: nn.Module) -> bool:
    """`enable_prompt_sharing` unless the model is on a GPU, where separate rows are quicker (`results/benchmarks/sharing-cuda`).

    Returns:
        Whether packed pairs are to be given to the model.
    """
    return next(model.parameters()).device.type != "cuda" and enable_prompt_sharing(model)


def can_share_prompts(model: nn.Module) -> bool:
    """Whether packed pairs give the log-probabilities and gradients of separate rows. Leaves the model as it is.

    Models in which positions interact otherwise than by full or sliding attention are refused without a trial. Others
    are tried on two made-up pairs, with sliding windows shorter than the rows: so a model with an attention function of
    its own, windows that its attention function does not get, or positions that are counted instead of read from
    `position_ids` does not pass.
    """
    base = _base(model)
    if _implementation(base) not in (PLAIN, SHARING) or other_mixing(base) is not None:
        return False
    separate, packed = _both_ways(model)
    try:
        with _attention_implementation(base, SHARING), short_windows(base, 5):
            return same_results(model, separate, packed)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model whose attention takes no further arguments raises whatever it likes
        return False


def _both_ways(model: nn.Module) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The log-probabilities of two pairs that have prompts in common, from separate rows and from packed ones."""
    ids = trial_tokens(model, (4, 16))
    ids[2:, :9] = ids[:2, :9]
    device = ids.device
    packed = pack_pairs(ids.cpu().numpy(), np.array([16, 12, 13, 16]))
    assert packed is not None
    packed_ids, layout = torch.from_numpy(packed[0]).to(device), to_device(packed[1], device)
    # Of the rejected rows also the first tokens after the prompt, which follow the chosen row's last ones when packed.
    predictors = torch.tensor([8, 14, 16 + 10, 32 + 8, 32 + 9, 32 + 11, 48 + 9, 48 + 12], device=device)
    targets = ids.flatten()[predictors + 1]

    def from_separate_rows() -> Tensor:
        return score(model, ids, Score(predictors, targets))

    def from_packed_rows() -> Tensor:
        return score(model, packed_ids, Score(layout.unpack.flatten()[predictors], targets), layout=layout)

    return from_separate_rows, from_packed_rows


@contextmanager
def _attention_implementation(base: Any, name: str) -> Iterator[None]:
    before = _implementation(base)
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _implementation(base: Any) -> str:
    name: str = base.config.get_text_config()._attn_implementation
    return name


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
