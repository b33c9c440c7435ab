"""A model made ready for pairs whose prompt is computed once (`ctpd.ops.shared_rows`), or refused by a probe."""

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctpd.models import Score, same_results, score
from ctpd.ops.shared_rows import SharedRows, attend_apart, share_rows

SHARING = "ctpd_shared_rows"  # the name of our attention function among the library's


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    shared_rows: SharedRows | None = None, position_ids: Tensor | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The library's attention, and the same for rows that are packed."""
    if shared_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attend_apart(sdpa_attention_forward, module, query, key, value, shared=shared_rows, **options)


AttentionInterface.register(SHARING, _attention)
AttentionMaskInterface.register(SHARING, sdpa_mask)


def can_share_rows(model: nn.Module) -> bool:
    """Prepare a model for rows that begin alike and share a sequence; False, and nothing changed, where it cannot.

    A probe compares shared with separate rows, values and gradients. Recurrent layers, attention of a kind of its
    own and positions that are counted and not told do not pass.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.get_text_config()._attn_implementation != "sdpa":
        return False
    vocabulary = base.config.get_text_config().vocab_size
    rows = np.arange(4 * 16).reshape(4, 16) * 7919 % vocabulary
    rows[2:, :9] = rows[:2, :9]  # two pairs, whose rows begin alike and have different lengths
    lengths = np.array([16, 12, 13, 16])
    packed = share_rows(rows, lengths)
    assert packed is not None
    device = next(model.parameters()).device
    shared = SharedRows(*(part.to(device) for part in packed[1]))
    predictors = torch.tensor([8, 14, 16 + 10, 32 + 8, 32 + 11, 48 + 12], device=device)
    ids = torch.from_numpy(rows).to(device)
    targets = ids.flatten()[predictors + 1]

    def apart() -> Tensor:
        return score(model, ids, Score(predictors, targets))

    def together() -> Tensor:
        request = Score(shared.unpack.flatten()[predictors], targets)
        return score(model, torch.from_numpy(packed[0]).to(device), request, shared=shared)

    base.set_attn_implementation(SHARING)
    try:
        same = same_results(model, apart, together)
    except (TypeError, ValueError, RuntimeError):  # it takes no further arguments, or attention of another shape
        same = False
    if not same:
        base.set_attn_implementation("sdpa")
    return same
