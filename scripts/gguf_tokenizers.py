"""Rebuild the published tokenizers of Gemma 3 and SmolLM2 from the vocabulary in a GGUF (used by real_models.py).

A GGUF holds the vocabulary but not the pipeline around it, and what transformers guesses on a load with `gguf_file=`
differs from the published tokenizers. Each function here returns the content of tokenizer.json and of
tokenizer_config.json; `tokenizer_digest` is compared with that of the published tokenizer.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CONTROL, USER_DEFINED = 3, 4  # GGUF token types
PREAMBLE = {"version": "1.0", "truncation": None, "padding": None}


class Vocabulary(NamedTuple):
    """What a GGUF says about a tokenizer: one entry per token id, and the merges if it lists them."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    chat_template: str | None


def read_vocabulary(gguf_file: Path) -> Vocabulary:
    """The tokenizer's metadata in a GGUF; a list that the file does not have is empty."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields

    def listed(key: str) -> list[Any]:
        return list(fields[key].contents()) if key in fields else []

    template = fields.get("tokenizer.chat_template")
    return Vocabulary(
        tokens=listed("tokenizer.ggml.tokens"),
        types=listed("tokenizer.ggml.token_type"),
        scores=listed("tokenizer.ggml.scores"),
        merges=listed("tokenizer.ggml.merges"),
        chat_template=template.contents() if template else None,
    )


def added_tokens(
    vocabulary: Vocabulary, *, tokens: Sequence[str], special: Callable[[str], bool]
) -> list[dict[str, Any]]:
    """tokenizer.json's list of the tokens that are matched whole in a text: GGUF's control and user-defined ones."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, **flags, "special": special(token)}
        for index, (token, kind) in enumerate(zip(tokens, vocabulary.types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def sentencepiece_merges(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """The merges that a SentencePiece BPE vocabulary implies: every split of a token into two tokens, best first.

    Best is the higher score, then the longer left part, the longer right part, the order of the vocabulary.
    """
    known = set(tokens)
    merges = [
        (-scores[index], -cut, cut - len(token), index, token[:cut], token[cut:])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    return [[left, right] for *_, left, right in sorted(merges)]


def gemma_tokenizer(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of Gemma 3: SentencePiece BPE with byte fallback, BOS added.

    What a load through transformers' `gguf_file=` gets wrong, and what is done here instead:
    - runs of spaces are spelled with spaces in a GGUF; they are `▁` in the vocabulary, and matched whole;
    - the merges are not in the file. Their order follows the scores, but llama.cpp overwrites the score of a
      user-defined token (runs of spaces, tabs, newlines); it was 0, the best. With transformers' order (token ids) a
      run of more than 31 spaces, or a literal `▁`, gets other tokens;
    - `<mask>` and 6,240 `<unused...>` tokens are not special.
    `<image_soft_token>` (id 262144) has no row in this text model's embedding and is left out.
    """
    tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in vocabulary.tokens]
    scores = [
        0.0 if kind == USER_DEFINED else score for score, kind in zip(vocabulary.scores, vocabulary.types, strict=True)
    ]
    special = {"<pad>", "<eos>", "<bos>", "<unk>"}
    special |= {"<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}
    unspace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    split = {"type": "Split", "pattern": {"String": " "}}
    single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokenizer = {
        **PREAMBLE,
        "added_tokens": added_tokens(vocabulary, tokens=tokens, special=special.__contains__),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {**split, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": bpe_model(
            tokens, sentencepiece_merges(tokens, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        ),
    }
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return tokenizer, {**names, "add_bos_token": True, "padding_side": "left"}


def smollm_tokenizer(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of SmolLM2: byte-level BPE, single digits, no BOS.

    A load through transformers' `gguf_file=` loses the digit splitter that comes before the byte-level one (the file
    only says `smollm`): digits are single tokens either way, but white space before one is then cut differently
    ("\\n\\n1." is common in answers). 21 of the 256 bytes are not in the vocabulary (0xf1, 0xf2, some control
    characters and the bytes that UTF-8 never uses), in the published tokenizer too: they vanish from a text.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [merge.split(" ") for merge in vocabulary.merges]
    tokenizer = {
        **PREAMBLE,
        "added_tokens": added_tokens(vocabulary, tokens=vocabulary.tokens, special=lambda token: True),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": bpe_model(vocabulary.tokens, merges, unk_token=None, fuse_unk=False, byte_fallback=False),
    }
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return tokenizer, {**names, "unk_token": "<|endoftext|>", "add_bos_token": False, "model_max_length": 8192}


def bpe_model(tokens: Sequence[str], merges: list[list[str]], **settings: object) -> dict[str, Any]:
    """The `model` entry of a tokenizer.json."""
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    vocab = {token: index for index, token in enumerate(tokens)}
    return {"type": "BPE", **plain, **settings, "vocab": vocab, "merges": merges}


def tokenizer_digest(tokenizer: Mapping[str, Any]) -> str:
    """sha256 of a tokenizer.json's content in canonical form: key order, white space and escapes do not count."""
    canonical = json.dumps(tokenizer, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
