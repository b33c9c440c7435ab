"""What small files say of a ready-made model before a weight is read: configuration, tokenizer, index and headers.

A check gets the model without its weights (`ctpd.checkpoints.Skeleton`), and does with it what a stage would do.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ctpd.adapters import check_adapter, quiet_peft
from ctpd.checkpoints import Skeleton, language_part, loading, quantization
from ctpd.core.errors import UserError
from ctpd.models import add_lora
from ctpd.train.config import LoraSpec


def check_tokenizer(skeleton: Skeleton, tokenizer: Any, *, where: str, templates: Sequence[str] = ()) -> None:
    """Refuse a tokenizer that can give a token for which the model has no row.

    A special token beyond the embedding is fine where nothing writes it: the text of pairs may not hold one.

    Args:
        skeleton: the model.
        tokenizer: the one that it is used with.
        where: the model.
        templates: what is written around texts.

    Raises:
        UserError: there is such a token.
    """
    rows = embedding_rows(skeleton.model)
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for index in sorted(beyond):
        if index not in special or index in used or any(beyond[index] in text for text in templates):
            raise UserError(
                f"the tokenizer has {len(tokenizer):,} tokens and the model {rows:,} rows of embeddings: the first token "
                f"without a row is {index}, {beyond[index]!r}",
                where=where,
                fix="Give the tokenizer that belongs to the model, or resize the model's embeddings "
                "(`resize_token_embeddings`) and save it",
            )


def check_tokens(model: Any, ids: NDArray[np.int32], *, where: str) -> None:
    """Refuse rows with a token for which a loaded model has no row; the plan has no configuration of some hub models.

    Args:
        model: a model, adapters on it or not.
        ids: of all rows.
        where: the model.

    Raises:
        UserError: there is such a token.
    """
    rows = embedding_rows(model.get_base_model() if isinstance(model, PeftModel) else model)
    if len(ids) and int(ids.max()) >= rows:
        raise UserError(
            f"the pairs hold the token {int(ids.max())}, and the model has {rows:,} rows of embeddings",
            where=where,
            fix="Give the tokenizer that belongs to the model, or resize the model's embeddings and save it",
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of tokens that a model both reads and predicts."""
    ends: Any = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = [ends[0].weight.shape[0], model.config.get_text_config().vocab_size]
    return int(min([*sizes, *([] if ends[1] is None else [ends[1].weight.shape[0]])]))


def check_length(skeleton: Skeleton, max_tokens: int, *, where: str) -> str | None:
    """Compare the longest row with the positions of a model.

    Args:
        skeleton: the model.
        max_tokens: of the longest row.
        where: the model.

    Returns:
        What a user should know of rotary positions that the model was not made for; None if there is nothing.

    Raises:
        UserError: the model has a learned embedding for each position, and too few.
    """
    model: Any = skeleton.model
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or max_tokens <= positions:
        return None
    if _learned(model, positions):
        raise UserError(
            f"`max_tokens: {max_tokens}` is more than the {positions:,} positions that the model has embeddings for",
            where=where,
            fix=f"Give `max_tokens: {positions}` or less",
        )
    return (
        f"{where}: `max_tokens: {max_tokens}` is more than the {positions:,} positions that the model was made for "
        "(`max_position_embeddings`)"
    )


def _learned(model: Any, positions: int) -> bool:
    """Whether a table of the model has a row for each position; some tables have two rows before the first."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return any(t is not model.get_input_embeddings() and 0 <= t.num_embeddings - positions <= 2 for t in tables)


def check_training(skeleton: Skeleton, lora: LoraSpec | None, *, where: str) -> str | None:
    """Whether a model can be trained as asked.

    Args:
        skeleton: the model.
        lora: the adapters; None to train all weights.
        where: the model.

    Returns:
        Which part is trained, where it is not the whole model; else None.

    Raises:
        UserError: its weights are quantized; no layer has the name of a target, or its weight is tied to another.
    """
    if quantization(skeleton.model.config):
        raise UserError(
            "the weights of this checkpoint are quantized; neither can they be trained, nor an adapter be merged into them",
            where=where,
            fix="Give the checkpoint that it was made from; `lora: {base: 4bit}` trains adapters on quantized weights",
        )
    if lora is not None:
        with torch.random.fork_rng(devices=[]):
            add_lora(copy.deepcopy(skeleton.model), r=lora.r, alpha=lora.alpha, targets=lora.targets, seed=0)
    name, parts = type(skeleton.model).__name__, language_part(skeleton.model)
    experts = lora is not None and lora.targets == "all-linear" and has_joined_experts(skeleton.model)
    without = "its experts, which are one weight in each layer and no linear layers, get no adapter"
    if parts is None:
        return f"{where}: {name}: {without}" if experts else None
    inside = {id(p) for part in parts for p in part.parameters()}
    rest = sum(p.numel() for p in skeleton.model.parameters() if id(p) not in inside)
    trained = "its language part is trained" if lora is None else "its language part gets adapters"
    said = f"{where}: {name}: {trained}; the other {rest:,} weights stay as they are"
    return f"{said}; {without}" if experts else said


def has_joined_experts(model: PreTrainedModel) -> bool:
    """Whether the experts of a layer are one weight of three dimensions, on which LoRA's `all-linear` puts nothing."""
    return any(weight.dim() == 3 and "experts" in name for name, weight in model.named_parameters())


def check_ready_adapter(skeleton: Skeleton, adapter: Path) -> None:
    """Compare a ready-made adapter with the model that it is to be merged into.

    Raises:
        UserError: it belongs to another model, lacks weights, or is on a weight that is tied to another.
    """
    with loading("adapter", str(adapter), fix="Give a LoRA adapter that was trained on this model"), quiet_peft():
        config = PeftConfig.from_pretrained(str(adapter))
        adapted = get_peft_model(copy.deepcopy(skeleton.model), config)
        check_adapter(adapted, adapter)
