"""The record of one run and seed: the only input of tables and reports."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpd.core.config import to_plain
from ctpd.pipeline.methods import Method
from ctpd.pipeline.runtime import provenance
from ctpd.pipeline.stage import Part, Stage, Work
from ctpd.pipeline.stages.choice import ChoiceStage
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.pipeline.stages.generate import GenerateStage
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.pipeline.stages.weights import WeightsStage
from harness.answers import Unmeasured
from harness.record import ColumnResult, DataSummary, Provenance, Record, RecordHead, TrainingSummary

RECORD = "record.json"


@dataclass(frozen=True)
class Head(Part):
    """What is known of a run before it is executed.

    Attributes:
        record: as the record shows it, with all parameters and shared settings.
        method: the method with its parameters; None for an untrained row.
    """

    record: RecordHead
    method: Method | None

    @property
    def identity(self) -> Any:
        """The row, and method and shared settings without what is at its default."""
        head = self.record
        return {
            "row": [head.recipe, head.run, head.seed, head.kind, head.suite, head.partial],
            "method": None if self.method is None else self.method.identity,
            "tuned": {} if head.method is None else dict(head.method.tuned),
            "shared": head.shared.digest,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordStage(Stage):
    """The head of the record and the measurements of the run's stages."""

    kind = "record"
    version = 2

    head: Head
    pairs: PairsStage
    evaluations: Mapping[str, EvaluateStage]
    generated: GenerateStage | None = None
    training: TrainStage | PretrainStage | None = None
    weights: WeightsStage | None = None
    choice: ChoiceStage | None = None

    def build(self, work: Work) -> None:
        """Collect the results and write the record."""
        results = {column: stage.result(work) for column, stage in self.evaluations.items()}
        origin = {**provenance(work.runtime), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        measured = {name: one for name, one in results.items() if isinstance(one, ColumnResult)}
        Record(
            **dict(self.head.record),
            training=self._training(work),
            weights=None if self.weights is None else self.weights.summary(work),
            data=self._data(work),
            evaluation=measured,
            unmeasured={name: one.reason for name, one in results.items() if isinstance(one, Unmeasured)},
            tuning=None if self.choice is None else self.choice.tuning(work, measured=measured.values()),
            provenance=Provenance.model_validate_json(json.dumps(to_plain(origin))),
        ).write(work.folder / RECORD)

    def is_whole(self, folder: Path) -> bool:
        """Whether it has answers of every column."""
        return all(result.answers is not None for result in Record.read(folder / RECORD).evaluation.values())

    def _data(self, work: Work) -> DataSummary:
        meta = self.pairs.read_meta(work)
        return DataSummary(
            pairs=len(meta["pair_ids"]),
            dropped=meta["dropped"],
            counts=meta["report"],
            end_tokens=meta.get("end_tokens", {}),
            generated=None if self.generated is None else self.generated.counts(work),
        )

    def _training(self, work: Work) -> TrainingSummary | None:
        from ctpd.pipeline.training import read_training

        return None if self.training is None else read_training(work.path(self.training))
