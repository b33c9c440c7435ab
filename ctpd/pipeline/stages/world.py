"""The testbed's files: corpora, preference pairs and evaluation documents."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctpd.pipeline.stage import Stage, Work
from ctpd.testbed.config import WorldConfig

Corpus = Literal["teacher", "student"]


@dataclass(frozen=True, eq=False, kw_only=True)
class WorldStage(Stage):
    """A synthetic world whose responses have marks on right and wrong spans."""

    kind = "world"
    version = 2

    config: WorldConfig

    def build(self, work: Work) -> None:
        """Write the world."""
        from ctpd.testbed.corpus import write_world

        write_world(work.folder, self.config)

    def texts(self, work: Work, corpus: Corpus) -> list[str]:
        """The texts of a pretraining corpus."""
        lines = (work.path(self) / f"corpus_{corpus}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    def pairs(self, work: Work, split: str) -> Path:
        """The file of a split's preference pairs."""
        return work.path(self) / f"pairs_{split}.jsonl"

    def documents(self, work: Work) -> Path:
        """The folder of the evaluation documents, laid out like the hub."""
        return work.path(self) / "hub"
