"""The inputs of both sides of the step benchmark: a seeded model, and preference rows with exact token counts.

Each word is one token. A row is prompt, completion and end token; the prompt is not scored. The seed gives the model and
rows of the original comparison with TRL (bench/trl_dpo.py), and so the same losses.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
MODEL, TOKENIZER, DATA = "model", "tokenizer", "data.jsonl"
LEARNING_RATE, BETA, SEED = 1e-4, 0.1, 0
LORA = {"r": 16, "alpha": 32}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its batches.

    Attributes:
        batch: preference pairs of a step; twice as many sequences.
        seq_len: tokens of the longest sequence, prompt and end token included.
        prompt_len: tokens of every prompt.
        ragged: completion lengths uniform in [1/8, 1] of the longest.
        words: words in use; the model's vocabulary may be larger.
        hidden, layers, heads, vocab: of a Llama with separate embeddings and an inner size of 4 * hidden.
    """

    batch: int = 4
    seq_len: int = 512
    prompt_len: int = 128
    ragged: bool = False
    words: int = 2000
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocab: int = 128256
    seed: int = 0


LARGE = Shape(hidden=2048, layers=16, heads=32, seq_len=1024, prompt_len=256)
"""1.6 billion parameters, for GPUs."""


class TokenPair(NamedTuple):
    """A preference row in tokens; the completions end with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def word_rows(shape: Shape, num_pairs: int) -> list[dict[str, list[int]]]:
    """Word ids of prompts and completions; the first rows do not depend on ``num_pairs``."""
    rng = random.Random(shape.seed)
    longest = shape.seq_len - shape.prompt_len - 1  # one end token follows each completion

    def words(number: int) -> list[int]:
        return [rng.randrange(shape.words) for _ in range(number)]

    def length() -> int:
        return rng.randint(max(1, longest // 8), longest) if shape.ragged else longest

    return [
        {"prompt": words(shape.prompt_len), "chosen": words(length()), "rejected": words(length())}
        for _ in range(num_pairs)
    ]


def token_pairs(shape: Shape, num_pairs: int) -> list[TokenPair]:
    """The rows as token ids, equal to those of the word tokenizer on the texts."""
    first = len(SPECIAL)
    pairs = []
    for row in word_rows(shape, num_pairs):
        ids = {side: [word + first for word in numbers] for side, numbers in row.items()}
        pairs.append(TokenPair(ids["prompt"], [*ids["chosen"], EOS], [*ids["rejected"], EOS]))
    return pairs


def text_rows(shape: Shape, num_pairs: int) -> list[dict[str, str]]:
    """The rows as text; completions begin with a space."""
    rows = []
    for row in word_rows(shape, num_pairs):
        texts = {side: " ".join(f"w{word}" for word in numbers) for side, numbers in row.items()}
        rows.append({"prompt": texts["prompt"], "chosen": f" {texts['chosen']}", "rejected": f" {texts['rejected']}"})
    return rows


def make_inputs(shape: Shape, num_pairs: int, folder: Path) -> None:
    """Write the model, the tokenizer and the rows as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = SPECIAL | {f"w{i}": i + len(SPECIAL) for i in range(shape.words)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(str(folder / TOKENIZER))
    make_model(shape).save_pretrained(str(folder / MODEL))
    rows = text_rows(shape, num_pairs)
    (folder / DATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_model(shape: Shape) -> Any:
    """The seeded model, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(shape.seed)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(2048, shape.seq_len),
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def units(pairs: list[TokenPair], *, longest: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    """The unit of each completion token, and the number of units, of each row (alternately chosen and rejected).

    Args:
        longest: units have 1 to ``longest`` tokens, drawn with ``seed``; 1 makes every token a unit.
    """
    rng = np.random.default_rng(seed)
    unit, counts = [], []
    for pair in pairs:
        for completion in (pair.chosen, pair.rejected):
            sizes = rng.integers(1, longest + 1, size=len(completion))
            unit.append(np.repeat(np.arange(len(sizes)), sizes)[: len(completion)])
            counts.append(int(unit[-1][-1]) + 1)
    return unit, counts


def as_json(shape: Shape) -> dict[str, Any]:
    """The shape as JSON, for a child process; ``Shape(**as_json(shape)) == shape``."""
    return asdict(shape)
