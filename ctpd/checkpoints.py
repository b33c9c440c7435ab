"""Checkpoints as transformers loads them: only weights from safetensors files, all of them, and no code of their own."""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ctpd.core.errors import UserError
from ctpd.core.printing import printable


def load_checkpoint(folder: str, *, revision: str | None, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint, with all of its weights and without dropout.

    Args:
        folder: a directory or a hub id.
        revision: the pinned revision of a hub id.
        options: of `from_pretrained`: dtype, or a quantization.

    Raises:
        UserError: there is no causal language model of transformers' own, or one of its weights is missing.
    """
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
        _no_dropout(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        if asks_for_code(error):
            raise custom_code("model", folder) from error
        raise UserError(
            f"no causal language model could be loaded ({first_line(error)})",
            where=folder,
            fix="Give a directory with config.json and safetensors weights, or a hub id with its revision",
        ) from error
    model: PreTrainedModel
    model, found = loaded  # with `output_loading_info` the library returns both
    _check_weights(found, where=folder)
    return model


def asks_for_code(error: BaseException) -> bool:
    """Whether a library refused to load something because it comes with Python code of its own."""
    return "custom code" in str(error) or "remote_code" in str(error)


def custom_code(what: str, where: str) -> UserError:
    """The error for a model or tokenizer with code of its own."""
    return UserError(
        f"the {what} comes with Python code of its own (`auto_map` in its configuration), and ctpd runs no such code",
        where=where,
        fix="Use a model whose class is part of transformers",
    )


def _check_weights(found: Mapping[str, Any], *, where: str) -> None:
    """Refuse a checkpoint that leaves weights of its model unset: the library would draw them at random.

    Args:
        found: what `from_pretrained` says of its loading.
        where: the checkpoint.
    """
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's weights, or has them in another shape: {_some(missing)}",
            where=where,
            fix="Bring the whole checkpoint; with a missing weight every load would give another model",
        )
    if unexpected := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{where}: the checkpoint holds weights that the model does not use: {_some(unexpected)}", stacklevel=3
        )


def _some(names: Sequence[str], *, most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(map(printable, names[:most])) + (f" and {more} more" if more > 0 else "")


def four_bits(device: str) -> dict[str, Any]:
    """How the library loads weights as QLoRA has them (Dettmers et al. 2023)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "`lora.base: 4bit` needs bitsandbytes, which is not installed",
            fix="Install it, `pip install 'ctpd[quantization]'`, or take `base: bfloat16`",
        )
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"dtype": torch.bfloat16, "quantization_config": quantized, "device_map": {"": device}}


def _no_dropout(config: Any) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if name.endswith(("dropout", "pdrop")) and isinstance(value, float) and value > 0:
                setattr(part, name, 0.0)


def first_line(error: BaseException) -> str:
    """What a library said, for a message of one paragraph."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
