"""Write tokenizers into artifacts and exports: the same files on every machine."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

_TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_A_MACHINE = ("local_files_only", "is_local", "cache_dir", "name_or_path", "tokenizer_file", "_commit_hash")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as a transformers directory, without what the library notes of this machine and environment."""
    tokenizer.save_pretrained(str(folder))
    path = folder / _TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _OF_A_MACHINE}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
