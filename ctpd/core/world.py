"""What a recipe may say about the testbed: the synthetic world, and the models pretrained on it.

Data only, so that a recipe can be read without torch. `ctpd.testbed` gives the fields their meaning and checks their values.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """The world, the preference pairs over it, the two pretraining corpora and the evaluation documents."""

    seed: int = 0
    """Of everything drawn: names, facts, pairs, corpora, documents. Two worlds with one seed are the same files, byte for byte."""
    num_topics: int = 28
    """Made-up places. Each has four attributes, so this sets how many facts there are to know."""
    num_pairs: int = 1500
    """Preference pairs to train on."""
    num_eval_pairs: int = 200
    """Preference pairs for the evaluation loss; their prompts differ from all training prompts."""
    num_documents: int = 200
    """Test documents of each lm-eval task; at most eight for each topic."""
    teacher_texts: int = 12000
    """Texts in the teacher's corpus, which always tells the truth."""
    student_texts: int = 4000
    """Texts in the student's corpus."""
    student_error: float = 0.6
    """Mean rate at which the student's corpus states the popular error; every fact, sum and relation has its own rate around it."""
    chosen_right: float = 0.85
    """Probability that an answer of a chosen response is right, before pairs whose chosen response is not the better one are redrawn."""
    rejected_right: float = 0.35
    """The same for a rejected response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """One model pretrained from scratch on one of the world's corpora, with a tokenizer trained on one of them."""

    corpus: Literal["teacher", "student"]
    """Which corpus the model sees."""
    tokenizer: Literal["byte_bpe", "unigram"]
    """Kind of tokenizer."""
    vocab_size: int
    """Upper bound; a small corpus may have fewer pieces to offer."""
    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    texts_per_step: int
    learning_rate: float
    tokenizer_corpus: Literal["teacher", "student"] | None = None
    """Which corpus the tokenizer is trained on; None for the model's own. Two models with the same kind, size and corpus share it."""
    max_position: int = 256
    """Longest sequence in tokens."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    seed: int = 0
    """Of the initial weights and of the order of the texts."""
