"""A model made ready for pairs whose prompt is computed once (`ctpd.ops.shared_rows`), or refused by a probe."""

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctpd.models import Score, score
from ctpd.ops.shared_rows import SharedRows, attend_apart, share_rows
from ctpd.probes import other_mixing, same_results, short_windows

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

    Layers that mix positions otherwise than by full or sliding attention are refused. Of the others a probe compares
    shared with separate rows, values and gradients, windows shorter than the rows: attention of a kind of its own,
    windows that it is not told of and positions that are counted and not told do not pass.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.get_text_config()._attn_implementation != "sdpa" or other_mixing(base) is not None:
        return False
    vocabulary = base.config.get_text_config().vocab_size
    rows = np.arange(4 * 16).reshape(4, 16) * 7919 % vocabulary
    rows[2:, :9] = rows[:2, :9]  # two pairs, whose rows begin alike and have different lengths
    lengths = np.array([16, 12, 13, 16])
    packed = share_rows(rows, lengths)
    assert packed is not None
    device = next(model.parameters()).device
    shared = SharedRows(*(part.to(device) for part in packed[1]))
    # Of the second rows also the first tokens of their own, which stand right behind the first rows' last ones.
    predictors = torch.tensor([8, 14, 16 + 10, 32 + 8, 32 + 9, 32 + 11, 48 + 9, 48 + 12], device=device)
    ids = torch.from_numpy(rows).to(device)
    targets = ids.flatten()[predictors + 1]

    def apart() -> Tensor:
        return score(model, ids, Score(predictors, targets))

    def together() -> Tensor:
        request = Score(shared.unpack.flatten()[predictors], targets)
        return score(model, torch.from_numpy(packed[0]).to(device), request, shared=shared)

    base.set_attn_implementation(SHARING)
    same = False
    try:
        with short_windows(base, 5):
            same = same_results(model, apart, together)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises that takes no further arguments, or has attention of another shape
        same = False
    finally:
        if not same:
            base.set_attn_implementation("sdpa")
    return same
