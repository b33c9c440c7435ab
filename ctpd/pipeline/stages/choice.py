"""Which trial of a run is chosen: the highest mean score on development documents."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctpd.core.config import Config, Number
from ctpd.pipeline.stage import Part, Stage, Work
from ctpd.pipeline.stages.evaluate import EvaluateStage
from harness.record import ColumnResult
from harness.tuning import Trial, Tuning, choose, mean

TUNING = "tuning.json"
DOCUMENTS = "documents.json"


class ChoiceConfig(Config):
    """What the trials are of."""

    run: str
    """The run's name."""
    suite: str
    """The suite of development documents."""
    seeds: tuple[int, ...]
    """The training seeds."""
    asked: int
    """Trials that the recipe asks for."""
    space: Mapping[str, tuple[Number, ...]]
    """The values that could be tried."""


@dataclass(frozen=True)
class TrialStages(Part):
    """One trial.

    Attributes:
        values: of the parameters that are varied.
        evaluations: of each seed, column -> evaluation.
    """

    values: Mapping[str, Number]
    evaluations: tuple[Mapping[str, EvaluateStage], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class ChoiceStage(Stage):
    """The scores of a run's trials, and the one that is chosen. A trial whose numbers are not finite is the worst."""

    kind = "choice"

    config: ChoiceConfig
    trials: tuple[TrialStages, ...]
    start: Mapping[str, EvaluateStage]

    def attempts(self) -> Iterator[Stage]:
        """The trainings and evaluations of the trials."""
        for trial in self.trials:
            for columns in trial.evaluations:
                for evaluation in columns.values():
                    yield evaluation
                    if isinstance(evaluation.model.newest, Stage):
                        yield evaluation.model.newest

    def build(self, work: Work) -> None:
        """Compare the trials."""
        trials = [
            Trial(values=trial.values, scores=tuple(_average(columns, work) for columns in trial.evaluations))
            for trial in self.trials
        ]
        tuning = Tuning(
            **dict(self.config),
            trials=tuple(trials),
            chosen=choose(trials, run=self.config.run),
            start=_average(self.start, work),
        )
        (work.folder / TUNING).write_text(tuning.model_dump_json() + "\n", encoding="utf-8")
        start = [_measured(stage, work) for stage in self.start.values()]
        seen = {document.doc_hash for result in start if result is not None for document in result.documents}
        (work.folder / DOCUMENTS).write_text(json.dumps(sorted(seen)) + "\n", encoding="utf-8")

    def tuning(self, work: Work, *, measured: Iterable[ColumnResult]) -> Tuning:
        """Read the choice, and count the documents of the study that are development documents, too."""
        folder = work.path(self)
        seen = set(json.loads((folder / DOCUMENTS).read_text(encoding="utf-8")))
        found = {document.doc_hash for result in measured for document in result.documents}
        return read_tuning(folder).model_copy(update={"shared_documents": len(seen & found)})


def read_tuning(folder: Path) -> Tuning:
    """Read the choice of an artifact."""
    return Tuning.model_validate_json((folder / TUNING).read_bytes())


def _average(columns: Mapping[str, EvaluateStage], work: Work) -> float | None:
    """The Average over the columns; None where one is not there, not finite, or cannot be measured on the model."""
    found = [_measured(stage, work) for stage in columns.values()]
    return mean([None if one is None or not one.is_finite else one.value for one in found])


def _measured(stage: EvaluateStage, work: Work) -> ColumnResult | None:
    result = stage.result(work) if stage.key in work.folders else None
    return result if isinstance(result, ColumnResult) else None
