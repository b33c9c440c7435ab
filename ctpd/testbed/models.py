"""Tokenizers and untrained models for the testbed. Models are trained by `ctpd.train`."""

import string
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as pieces
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from ctpd.testbed.config import PretrainConfig
from ctpd.testbed.unigram import train_unigram

ALWAYS = string.ascii_letters + string.digits
"""Characters that every vocabulary holds, whether or not its corpus does."""
BOS, EOS, PAD, UNK = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")


def train_tokenizer(texts: Iterable[str], *, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer trained on `texts`, which puts BOS before a text and nothing after it.

    `byte_bpe` is GPT-2's scheme: the space belongs to the word, a number is a word like any other. `unigram` is SentencePiece's
    with line breaks kept. `wordpiece` is BERT's greedy longest match, over words that keep their space and their case. `characters` has a token for
    each character. All keep a line break apart from the words around it, so that no token crosses
    from a prompt into its response. The vocabulary holds at most `vocab_size` pieces, special tokens included.

    Raises:
        UserError: an unknown kind, or a vocabulary too small for the kind.
    """
    kinds = {"byte_bpe": _byte_bpe, "unigram": _unigram, "wordpiece": _wordpiece, "characters": _characters}
    if kind not in kinds:
        raise UserError(
            f"There is no tokenizer kind `{kind}`.{nearest(kind, kinds)}",
            where="pretrain.tokenizer",
            fix=f"Use one of: {', '.join(kinds)}",
        )
    tokenizer = kinds[kind](texts, vocab_size)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"A byte-level vocabulary has at least {smallest} pieces, not {vocab_size}", where="pretrain.vocab_size"
        )
    tokenizer = Tokenizer(pieces.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _words_with_spaces() -> Any:
    """Pre-tokens are words with the space before them, and line breaks."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )


def _check_size(vocab_size: int, smallest: int) -> None:
    if vocab_size < smallest:
        raise UserError(
            f"A vocabulary for this corpus has at least {smallest} pieces, not {vocab_size}",
            where="pretrain.vocab_size",
        )


def _unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    splitter = _words_with_spaces()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    _check_size(vocab_size, len(SPECIAL_TOKENS) + len({*ALWAYS, *"".join(words)}))
    vocabulary = train_unigram(words, num_pieces=vocab_size - len(SPECIAL_TOKENS), always=ALWAYS)
    tokenizer = Tokenizer(
        pieces.Unigram([*((token, 0.0) for token in SPECIAL_TOKENS), *vocabulary], unk_id=SPECIAL_TOKENS.index(UNK))
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def _wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The vocabulary is that of BPE merges, as in BERT; the trainer of the `tokenizers` library breaks ties at random.

    Each character is a piece both at the beginning of a word and inside it, so that no word is unknown.
    """
    splitter = _words_with_spaces()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    singles = sorted({*ALWAYS, *"".join(words)})
    needed = [*SPECIAL_TOKENS, *singles, *(f"##{char}" for char in singles)]
    _check_size(vocab_size, len(needed))
    learned = Tokenizer(pieces.BPE())
    learned.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=singles, show_progress=False)
    learned.train_from_iterator((word for word, count in sorted(words.items()) for _ in range(count)), trainer)
    begin = {word[:end] for word in words for end in range(1, len(word) + 1)}
    merged = sorted(learned.get_vocab().items(), key=lambda entry: entry[1])
    learned_pieces = [piece if piece in begin else f"##{piece}" for piece, _ in merged]
    vocabulary = list(dict.fromkeys([*needed, *learned_pieces]))[:vocab_size]
    tokenizer = Tokenizer(
        pieces.WordPiece(
            {piece: index for index, piece in enumerate(vocabulary)}, unk_token=UNK, max_input_chars_per_word=1000
        )
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("##", ""), decoders.Fuse(), decoders.Metaspace(prepend_scheme="never")]
    )
    return tokenizer


def _characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    singles = sorted({*ALWAYS, *"".join(texts)})
    _check_size(vocab_size, len(SPECIAL_TOKENS) + len(singles))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *singles))}
    tokenizer = Tokenizer(pieces.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig) -> LlamaForCausalLM:
    """An untrained Llama model in float32 with tied embeddings; the same seed gives the same weights.

    The global random state is not changed.
    """
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_position,
        tie_word_embeddings=True,
        initializer_range=config.hidden**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(llama)
