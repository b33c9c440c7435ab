"""How long the requests of a column are, from the few documents that a rehearsal evaluates."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ctpd.app import Experiment
from ctpd.core.roles import Role
from ctpd.core.store import Store
from ctpd.pipeline.stages.evaluate import SAMPLES, EvaluateStage, read_result
from ctpd.rehearsal.operations import Work
from harness.answers import Unmeasured

_CUT = re.compile(r" \[([\d,]+) characters cut\]$")


class Measured(NamedTuple):
    """The requests of the documents that were evaluated, for the tokenizer of one role.

    Attributes:
        work: their tokens; a context counts once for each continuation, whether or not its computation is shared.
        longest: tokens of the longest.
        documents: how many they are of.
        tasks: of a group; each has ``documents`` by itself.
        all_documents: those that the column has.
    """

    work: Work
    longest: float
    documents: int
    tasks: int
    all_documents: int

    def of(self, limit: int | None) -> Work:
        """The requests of so many documents of each task; of all if ``limit`` is None."""
        wanted = self.all_documents if limit is None else min(self.all_documents, limit * self.tasks)
        return self.work.times(wanted / self.documents)


@dataclass(frozen=True)
class Requests:
    """Requests of each column and role that were rehearsed."""

    known: Mapping[tuple[str, Role], Measured]
    experiment: Experiment
    """The recipe that is rehearsed."""

    def of(self, stage: EvaluateStage) -> Measured | None:
        """The requests of one of the recipe's evaluations, as far as they were rehearsed."""
        return self.known.get((stage.task.column.name, role_of(stage, self.experiment)))


def role_of(stage: EvaluateStage, experiment: Experiment) -> Role:
    """Whose tokenizer an evaluation reads with."""
    return "teacher" if stage.model.tokenizer == experiment.stages.bases["teacher"].tokenizer else "student"


def measured_requests(rehearsed: Experiment, store: Store) -> dict[tuple[str, Role], Measured]:
    """What the evaluations of a rehearsal have read.

    Args:
        rehearsed: the recipe of the rehearsal.
        store: where its artifacts are.
    """
    found: dict[tuple[str, Role], Measured] = {}
    for columns in rehearsed.evaluations.values():
        for name, stage in columns.items():
            known = (name, role_of(stage, rehearsed))
            if known not in found and store.has(stage.kind, stage.key):
                measured = _measured(stage, store)
                if measured is not None:
                    found[known] = measured
    return found


def _measured(stage: EvaluateStage, store: Store) -> Measured | None:
    folder = store.path(stage.kind, stage.key)
    result = read_result(folder)
    if isinstance(result, Unmeasured):
        return None
    tokenizer, lengths, documents = _tokenizer(stage, store), [], 0
    files = sorted((folder / SAMPLES).glob("*.jsonl"))
    for path in files:
        for sample in _samples(path):
            documents += 1
            lengths += [_length("".join(_texts(request)), tokenizer) for request in sample["arguments"].values()]
    if not lengths:
        return None
    work = Work(sum(lengths), sum(length**2 for length in lengths))
    return Measured(work, max(lengths), documents, len(files), result.protocol.num_total)


def _tokenizer(stage: EvaluateStage, store: Store) -> Any:
    from ctpd.models import load_tokenizer
    from ctpd.pipeline.references import MODEL_FOLDER, External

    source = stage.model.tokenizer
    if isinstance(source, External):
        return load_tokenizer(source.location, revision=source.revision)
    return load_tokenizer(str(store.path(source.kind, source.key) / MODEL_FOLDER))


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _texts(request: Mapping[str, Any]) -> Iterator[str]:
    """Context and continuation; what is generated is not known."""
    yield from (value for value in request.values() if isinstance(value, str))


def _length(text: str, tokenizer: Any) -> float:
    """Tokens of a text; of one that a sample file cut, as many more as its characters are."""
    cut = _CUT.search(text)
    kept = text[: cut.start()] if cut is not None else text
    missing = int(cut.group(1).replace(",", "")) if cut is not None else 0
    return len(tokenizer.encode(kept, add_special_tokens=False)) * (1 + missing / max(1, len(kept)))
