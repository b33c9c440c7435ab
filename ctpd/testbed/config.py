"""Configuration of the testbed: the synthetic world, and the models pretrained on it.

This module imports no torch, so that a recipe is read quickly. `ctpd.testbed.world` and `corpus` use the fields.
"""

from typing import Literal, Self

from pydantic import model_validator

from ctpd.core.config import Config, Positive, PositiveInt, Seed, Share
from ctpd.core.errors import UserError
from ctpd.testbed.documents import most_documents
from ctpd.testbed.world import SKILLS, Skill

TokenizerKind = Literal["byte_bpe", "unigram", "wordpiece", "characters"]


class WorldConfig(Config):
    """The world, the preference pairs over it, the two pretraining corpora and the evaluation documents."""

    seed: Seed = 0
    """Seed of everything that is drawn: names, facts, pairs, corpora, documents. The same configuration gives the same files, byte for byte."""
    num_topics: PositiveInt = 16
    """Number of invented towns (topics). Each has four attributes, so there are four times as many facts. Of a multiple of eight topics, each value
    is true of as many towns as it is the popular error about; with other numbers, nearly."""
    num_pairs: PositiveInt = 1500
    """Preference pairs to train on."""
    num_eval_pairs: PositiveInt = 200
    """Preference pairs for the evaluation loss; their prompts differ from all training prompts."""
    num_documents: PositiveInt = 200
    """Test documents of each lm-eval task; at most 32 for each topic."""
    teacher_texts: PositiveInt = 12000
    """Texts in the teacher's corpus."""
    student_texts: PositiveInt = 4000
    """Texts in the student's corpus."""
    student_error: Share = 0.6
    """Mean rate at which the student's corpus states the popular error; each fact, sum and relation has its own rate, spread around this mean."""
    teacher_error: Share = 0.0
    """The same for the teacher's corpus; 0 states no error at all."""
    chosen_right: Share = 0.85
    """Probability that an answer of a chosen response is right, before pairs whose chosen response is not the better one are redrawn."""
    rejected_right: Share = 0.35
    """The same for a rejected response."""
    swapped: Share = 0.0
    """Share of the pairs whose responses are exchanged: label noise, and with 1 reversed preferences."""
    pair_skills: tuple[Skill, ...] = SKILLS
    """Skills that the pairs ask for; the corpora and the evaluation documents have all of them."""

    @model_validator(mode="after")
    def _pairs_can_be_drawn(self) -> Self:
        if self.chosen_right == 0.0 or self.rejected_right == 1.0:
            raise UserError(
                "a chosen response can never have more right answers than a rejected one",
                fix="Raise `chosen_right` above 0 and lower `rejected_right` below 1",
            )
        return self

    @model_validator(mode="after")
    def _documents_can_be_drawn(self) -> Self:
        most = most_documents(self.num_topics)
        if self.num_documents > most:
            raise UserError(
                f"a world with {self.num_topics} topics has at most {most} test documents, not {self.num_documents}",
                fix="Ask for fewer documents, or for more topics with `num_topics`",
            )
        return self


class PretrainConfig(Config):
    """One model pretrained from scratch on one of the world's corpora, with a tokenizer trained on one of them."""

    corpus: Literal["teacher", "student"]
    """Which corpus the model sees."""
    tokenizer: TokenizerKind
    """Kind of tokenizer: byte-level BPE as in GPT-2, unigram as in SentencePiece, WordPiece as in BERT (with its spaces kept), or characters."""
    vocab_size: PositiveInt
    """Upper bound of the vocabulary size; a small corpus may give fewer pieces. Characters need no more than the corpus has."""
    hidden: PositiveInt
    """Hidden size: an even number of channels for each head."""
    layers: PositiveInt
    """Number of transformer layers."""
    heads: PositiveInt
    """Attention heads of a layer."""
    intermediate: PositiveInt
    """Hidden size of the feed-forward layers."""
    steps: PositiveInt
    """Optimizer steps."""
    texts_per_step: PositiveInt
    """Texts in one optimizer step."""
    learning_rate: Positive
    """Peak learning rate of AdamW."""
    tokenizer_corpus: Literal["teacher", "student"] | None = None
    """Which corpus the tokenizer is trained on; left out, the model's own. Two models with the same kind, size and corpus share one tokenizer."""
    max_position: PositiveInt = 256
    """Longest sequence in tokens."""
    warmup_ratio: Share = 0.1
    """Share of the steps with linear warm-up of the learning rate; a cosine decay follows."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the texts."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(
                f"{self.heads} heads cannot share a hidden size of {self.hidden}: each needs the same, even number of channels"
            )
        if self.tokenizer == "byte_bpe" and self.vocab_size < _SMALLEST_BYTE_LEVEL:
            raise ValueError(
                f"a byte-level vocabulary has at least {_SMALLEST_BYTE_LEVEL} pieces, not {self.vocab_size}"
            )
        return self


_SMALLEST_BYTE_LEVEL = 260  # 256 bytes and the four special tokens of `ctpd.testbed.models`
