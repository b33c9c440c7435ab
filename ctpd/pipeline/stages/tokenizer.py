"""A tokenizer trained on one of the testbed's corpora."""

from dataclasses import dataclass

from ctpd.core.config import Config
from ctpd.pipeline.references import MODEL_FOLDER
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.world import Corpus, WorldStage
from ctpd.testbed.config import TokenizerKind


class TokenizerConfig(Config):
    """Which texts a tokenizer is trained on, and its kind and size."""

    corpus: Corpus
    """The corpus."""
    tokenizer: TokenizerKind
    """Kind of tokenizer."""
    vocab_size: int
    """Upper bound of the number of tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenizerStage(Stage):
    """A fast tokenizer."""

    kind = "tokenizer"

    config: TokenizerConfig
    world: WorldStage

    def build(self, work: Work) -> None:
        """Train and save it."""
        from ctpd.saving import save_tokenizer
        from ctpd.testbed.models import train_tokenizer

        config = self.config
        texts = self.world.texts(work, config.corpus)
        tokenizer = train_tokenizer(texts, kind=config.tokenizer, vocab_size=config.vocab_size)
        save_tokenizer(tokenizer, work.folder / MODEL_FOLDER)
