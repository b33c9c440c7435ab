"""The record of one run and seed: all that tables and reports are made from."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpd.pipeline.runtime import provenance
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.pipeline.stages.generate import GenerateStage
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.pipeline.stages.weights import WeightsStage

RECORD = "record.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordStage(Stage):
    """What is known of a run before it is executed, and what its stages have measured."""

    kind = "record"

    head: Mapping[str, Any]
    pairs: PairsStage
    evaluations: Mapping[str, EvaluateStage]
    generated: GenerateStage | None = None
    training: TrainStage | PretrainStage | None = None
    weights: WeightsStage | None = None

    def build(self, work: Work) -> None:
        """Gather and write."""
        meta = self.pairs.read_meta(work)
        record = {
            **self.head,
            "training": self._training(work),
            "weights": None if self.weights is None else self.weights.summary(work),
            "data": {
                "pairs": len(meta["pair_ids"]),
                "dropped": meta["dropped"],
                "report": meta["report"],
                "written": None if self.generated is None else self.generated.counts(work),
            },
            "evaluation": {
                column: {**stage.result(work), "name": column} for column, stage in self.evaluations.items()
            },
            "provenance": {**provenance(work.runtime), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        }
        (work.folder / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    def _training(self, work: Work) -> Any:
        from ctpd.pipeline.training import TRAINING

        if self.training is None:
            return None
        return json.loads((work.path(self.training) / TRAINING).read_text(encoding="utf-8"))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an artifact."""
    found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return found
