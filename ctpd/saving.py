"""Write tokenizers and processors into artifacts and exports: the same files on every machine."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctpd.checkpoints import find_file

_TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_A_MACHINE = ("local_files_only", "is_local", "cache_dir", "name_or_path", "tokenizer_file", "_commit_hash")

_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def copy_processor(folder: str, *, revision: str | None, to: Path) -> None:
    """Copy what a multimodal model needs beside its tokenizer to read images and sounds; text needs none of it.

    Args:
        folder: a directory or a hub id.
        revision: the pinned revision of a hub id.
        to: an existing directory.
    """
    for name in _PROCESSOR:
        found = find_file(folder, name, revision=revision, local=False)
        if found is not None:
            shutil.copyfile(found, to / name)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as a transformers directory, without what the library notes of this machine and environment."""
    tokenizer.save_pretrained(str(folder))
    path = folder / _TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _OF_A_MACHINE}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
