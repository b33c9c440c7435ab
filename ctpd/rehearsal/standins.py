"""Tiny random models in the place of a recipe's ready-made ones: the same class, vocabulary and tokenizer on disk."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers.utils import GENERATION_CONFIG_NAME

from ctpd.adapters import quiet_peft
from ctpd.checkpoints import find_file, load_checkpoint, load_config, loading, model_class
from ctpd.core.errors import UserError
from ctpd.models import load_tokenizer
from ctpd.pipeline.references import External
from ctpd.rehearsal.shrink import shrunk
from ctpd.saving import copy_processor, save_tokenizer


def write_model(source: External, to: Path, *, seed: int, local: bool) -> None:
    """Write a tiny model of a checkpoint's class with random weights, and the checkpoint's own tokenizer.

    Args:
        source: a directory, whose weights need not be there, or a hub model.
        to: a new directory.
        seed: of the weights.
        local: read of the hub only what its cache holds.

    Raises:
        UserError: configuration or tokenizer cannot be had, or no small model of the class can be made.
    """
    folder, revision = source.location, source.revision
    if find_file(folder, "config.json", revision=revision, local=local) is None:
        raise UserError(
            "the model's configuration is neither here nor in the cache of the hub, and the hub cannot be asked",
            where=folder,
            fix="Bring `config.json` and the tokenizer's files, and name their directory with `--set shared.teacher.model=DIR` "
            "(or `student`) and `--set shared.teacher.revision=null`",
        )
    fix = "Leave the rehearsal out: `ctpd run` with `--limit`, and a `limit` of the pairs, tries the model itself"
    with loading("tiny model of this class", folder, fix=fix):
        small = shrunk(load_config(folder, revision=revision))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = model_class(small).from_config(small)
        model.save_pretrained(str(to))
    save_tokenizer(load_tokenizer(folder, revision=revision), to)
    copy_processor(folder, revision=revision, to=to)
    settings = find_file(folder, GENERATION_CONFIG_NAME, revision=revision, local=local)
    if settings is not None:
        shutil.copyfile(settings, to / GENERATION_CONFIG_NAME)


def write_adapter(source: External, base: Path, to: Path) -> None:
    """Write an adapter with the settings of a ready-made one, for the tiny model in ``base``.

    Raises:
        UserError: PEFT cannot put it there.
    """
    with loading("adapter", source.location, fix="Give a LoRA adapter that was trained on this model"), quiet_peft():
        config = PeftConfig.from_pretrained(source.location)
        config.inference_mode = False
        if isinstance(config, LoraConfig):
            config.layers_to_transform = config.layers_pattern = None  # the tiny model has fewer layers
        adapted = get_peft_model(load_checkpoint(str(base), revision=None, options={}), config)
        adapted.save_pretrained(str(to))
