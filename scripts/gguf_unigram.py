"""Write tokenizer.json of XLM-RoBERTa from a GGUF that holds its vocabulary (used for results/mismatch).

A GGUF of the kind `t5` holds a Unigram vocabulary, its scores and SentencePiece's character map, but not the pipeline
around them; here it is that of the published XLM-RoBERTa: the map, a split at white space, a space mark before each word.

    python scripts/gguf_unigram.py ggml-vocab-nomic-bert-moe.gguf --to xlm-roberta/tokenizer.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

CONTROL, UNKNOWN = 3, 2  # GGUF token types
PROBE = ("Hello world", [35378, 8999])  # token ids of the published tokenizer


def write(gguf_file: Path, to: Path) -> None:
    """Build the tokenizer and write it."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    fields = {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items() if "ggml" in name}
    if fields.get("tokenizer.ggml.model") != "t5":
        raise ValueError(f"{gguf_file} holds no Unigram vocabulary, but {fields.get('tokenizer.ggml.model')}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = [float(score) for score in fields["tokenizer.ggml.scores"]]
    unknown = int(fields["tokenizer.ggml.unknown_token_id"])
    core = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True)), unk_id=unknown, byte_fallback=False))
    core.normalizer = normalizers.Precompiled(bytes(fields["tokenizer.ggml.precompiled_charsmap"]))
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    text, expected = PROBE
    found = core.encode(text, add_special_tokens=False).ids
    if found != expected:
        raise ValueError(f"{gguf_file} gives {found} for {text!r} instead of {expected}: it is not XLM-RoBERTa's")
    to.parent.mkdir(parents=True, exist_ok=True)
    core.save(str(to))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write XLM-RoBERTa's tokenizer.json from a GGUF with its vocabulary.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument(
        "--to", type=Path, default=Path("tokenizer.json"), help="the new file (default: tokenizer.json)"
    )
    given = parser.parse_args(arguments)
    try:
        write(given.gguf, given.to)
    except (OSError, ValueError) as error:
        print(f"gguf_unigram: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
