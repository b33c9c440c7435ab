"""The record of one run and seed: what was asked, what the training did, every document's score, and how it was made.

Tables, reports and figures are made from records alone. A record is one JSON file, of schema 2. JSON has no NaN and no
infinity: where a number of a run can be non-finite (the loss of a training that diverged, a score computed from it), its
type is ``Number`` and the record holds null.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from ctpd.core.config import Config
from ctpd.core.errors import UserError, shortened
from ctpd.core.roles import Phase, Role
from harness.answers import Answer, Health
from harness.numbers import Number as Number
from harness.tuning import Tuning
from harness.weights_summary import WeightsSummary

SCHEMA = 2
_AGAIN = "Run its recipe again with this version, which rebuilds the record and keeps the trained models"

RowKind = Literal["trained", "untrained teacher", "untrained student"]


class Method(Config):
    """What trained a row: the method's name, its parameters with all defaults, and what was tuned on development data."""

    name: str
    params: Mapping[str, JsonValue]
    tuned: Mapping[str, float]


class SharedSettings(Config):
    """What all rows of a comparison have in common: see ``harness.shared.shared_settings``, which makes it.

    Attributes:
        settings: the recipe's `shared` block without `seeds` and `evaluation`. It holds no path of a machine:
            each path is replaced by a digest of what was found there.
        digest: sha256 of ``settings``. Records with another one may not be compared.
    """

    settings: Mapping[str, JsonValue]
    digest: str


class FrozenModel(Config):
    """A model that is read and not trained: the SFT model of a role, or one of its contrastive pair."""

    role: Role
    model: Phase


class StoredSignal(FrozenModel):
    """What one pass of a frozen model over all pairs has left on disk."""

    kept: Literal["log probabilities", "distributions", "responses"]


class Design(Config):
    """What the objective of a row compares, as it declares it.

    Attributes:
        sides: the responses of a pair that the row learns from.
        granularity: what its units are.
        reference: whose SFT model log-probabilities are measured from; None for an objective without a reference.
        weights: the strategy of its importance weights; None where every unit weighs 1.
    """

    sides: tuple[Literal["chosen", "rejected"], ...]
    granularity: Literal["spans", "tokens"]
    reference: Role | None
    weights: str | None


class LogEntry(Config):
    """Metrics that were logged after one step; those of the evaluation pairs begin with ``eval_``."""

    step: int
    epoch: Number = None
    metrics: Mapping[str, Number]


class TrainingSummary(Config):
    """One training.

    Attributes:
        history: entries in the order logged.
        items: training pairs of one epoch; None in older records.
        left_out: pairs of each epoch that did not fill a step; None in older records.
        note: what a reader should know of the steps: few, or many pairs left out.
        seconds: of the training alone, without loading and evaluation.
        peak_memory_mib: of the GPU; on a CPU of the whole process.
        weights_mib: memory of the model's weights.
        objective_parameters: trained parameters of the objective itself, not of the model.
        micro_batch: pairs of one forward and backward pass.
        shares_prompts: whether the two responses of a pair shared the computation of their prompt.
    """

    history: tuple[LogEntry, ...]
    steps: int
    seconds: float
    peak_memory_mib: float | None
    weights_mib: float
    trainable_parameters: int
    parameters: int
    objective_parameters: int
    micro_batch: int
    shares_prompts: bool
    items: int | None = None
    left_out: int | None = None
    note: str | None = None


class DataSummary(Config):
    """The pairs that a row was trained on.

    Attributes:
        pairs: of all splits, after dropping.
        dropped: number of pairs by reason.
        counts: of tokens, spans, span types, cut responses and cut prompts, by name; of pairs and cuts of each split; of
            rows that a model's chat template itself renders otherwise, by kind (`ctpd.text.templates.MEANINGS`).
        end_tokens: by model, what ends its responses, and what says so.
        generated: outcomes of the responses that a model generated for the row, by name; None if it needed none.
    """

    pairs: int
    dropped: Mapping[str, int]
    counts: Mapping[str, int | float]
    end_tokens: Mapping[str, str] = Field(default_factory=dict)
    generated: Mapping[str, int] | None = None


class Protocol(Config):
    """What must be equal in all results of one column, or they may not be compared.

    Attributes:
        version: of the task's definition.
        shots: few-shot examples.
        metric: key in lm-eval's results, ``metric,filter``.
        num_docs: evaluated documents, ``num_total`` those that the task has.
        dtype: of the model's weights, as torch names it.
        batch_size: rows of a forward pass; None for vLLM, which batches by itself.
        seeds: of lm-eval's random generators.
        task_hash: of documents, prompts and targets. Chat templates, which belong to a model, change it.
    """

    task: str
    version: float
    shots: int | None
    metric: str
    chat_template: bool
    num_docs: int
    num_total: int
    backend: Literal["hf", "vllm"]
    dtype: str
    batch_size: int | None
    seeds: Mapping[str, int]
    lm_eval_version: str
    task_hash: str


class DocumentScore(NamedTuple):
    """The score of one document, a fraction; None where the model's output was not finite."""

    doc_hash: str
    score: Number


class TemplateUse(Config):
    """The chat template that requests were rendered with: a digest of its text, and its variables."""

    digest: str
    variables: Mapping[str, JsonValue]


class ColumnResult(Config):
    """One model on one column of a suite. Scores are fractions, not percentages.

    Attributes:
        value: the metric over all documents; ``stderr`` its standard error as lm-eval gives it.
        also: further metrics, by lm-eval's key.
        limit: how many documents were asked for; None for all.
        documents: scores of all evaluated documents, in the task's order.
        max_length: of the model, in tokens.
        truncated: requests that were longer and lost their beginning; None where the backend does not say.
        unshared: why requests with a common context did not share its computation; None where they did.
        seconds: of the evaluation, loading of the model not included.
        health: of the generated answers; None for a column that generates none, and in older records.
        answers: to the same few documents for every model; None in older records, which kept none.
        alone: continuations that are in one token with the end of their context, and were tokenized by themselves;
            lm-eval has no score for them.
        template: None without a chat template.
        think_end_token: what the model generated up to this text was not scored; None if all was.
        unfinished: generated texts without that text, which are scored as they are; None where that is not known.
    """

    protocol: Protocol
    value: Number
    stderr: Number
    also: Mapping[str, Number]
    limit: int | None
    documents: tuple[DocumentScore, ...]
    max_length: int
    truncated: int | None
    unshared: str | None
    seconds: float
    health: Health | None = None
    answers: tuple[Answer, ...] | None = None
    alone: int = 0
    template: TemplateUse | None = None
    think_end_token: str | None = None
    unfinished: int | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the score, and that of every document, is a number."""
        return self.value is not None and all(document.score is not None for document in self.documents)


class Sharding(Config):
    """How FSDP sharded the weights in training: the classes of the layers that it wrapped, and whether to the CPU."""

    wrap: tuple[str, ...]
    offload: bool


class Execution(Config):
    """How a run was executed, as opposed to what it computes: see ``ctpd.pipeline.runtime.Runtime``."""

    device: str
    micro_batch_tokens: int
    signal_batch_tokens: int
    checkpoint_seconds: float
    report_to: tuple[str, ...]
    fsdp: Sharding | None


class Provenance(Config):
    """What made a record: versions of packages, machine, source commit (None for an installed package), command, UTC."""

    versions: Mapping[str, str]
    python: str
    platform: str
    commit: str | None
    command: str
    runtime: Execution
    processes: int
    time: str


class RecordHead(Config):
    """What is known of a record before anything is run.

    Attributes:
        kind: a row is trained, or it shows a model before the comparison's trainings.
        seed: None for a row that is not trained per seed.
        suite: its name.
        partial: whether the recipe asked for a part of the documents only.
        signals: the stored passes of frozen models over the pairs that the row needed.
        in_memory: frozen models that were in memory together with the student while it trained.
        own_recipe: the recipe of this row and seed alone (``harness.reproduction.own_recipe``); None in older records.
        design: what the objective compares; None for an untrained row, and in older records.
    """

    recipe: str
    run: str
    seed: int | None
    kind: RowKind
    method: Method | None
    shared: SharedSettings
    suite: str
    partial: bool
    signals: tuple[StoredSignal, ...]
    in_memory: tuple[FrozenModel, ...]
    own_recipe: Mapping[str, JsonValue] | None = None
    design: Design | None = None


class Record(RecordHead):
    """One row of a table for one seed.

    Attributes:
        training: of the row's model; of an untrained row its SFT, None where that was ready-made.
        weights: None for a method without importance weights.
        evaluation: by the column's name, in the suite's order.
        tuning: the trials that chose the row's values; None for a row that the recipe does not tune, and in older records.
        unmeasured: why the other columns of the suite cannot be measured on the row's model.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    schema_version: Literal[2] = Field(default=2, alias="schema")
    training: TrainingSummary | None
    weights: WeightsSummary | None
    data: DataSummary
    evaluation: Mapping[str, ColumnResult]
    tuning: Tuning | None = None
    unmeasured: Mapping[str, str] = {}
    provenance: Provenance

    @property
    def title(self) -> str:
        """How a record is named in messages."""
        return f"run '{self.run}'" + ("" if self.seed is None else f", seed {self.seed}")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a record's file.

        Raises:
            UserError: there is no such file, it is of another schema, or no record.
        """
        try:
            content = path.read_bytes()
            found = cls.model_validate_json(content)
            json.loads(content, parse_constant=_finite, parse_float=_finite, parse_int=_finite)
            return found
        except OSError as error:
            raise UserError(f"the record cannot be read ({error.strerror})", where=str(path)) from error
        except ValidationError as error:
            raise _unreadable(path, error) from error
        except _NotFinite as error:
            what = f"the record is damaged: it holds {error}, which is no number of JSON"
            raise UserError(what, where=str(path), fix=_AGAIN) from error

    def write(self, path: Path) -> None:
        """Write the record as one line of JSON."""
        path.write_text(self.model_dump_json() + "\n", encoding="utf-8", newline="\n")


def training_summary(fit: Mapping[str, Any]) -> TrainingSummary:
    """The summary of a training, from the fields of ``ctpd.train.fit.Fit`` by name."""
    return TrainingSummary(**{**fit, "history": log_entries(fit["history"])})


def log_entries(history: Iterable[Mapping[str, Any]]) -> tuple[LogEntry, ...]:
    """The entries of a trainer's ``log_history``."""
    return tuple(
        LogEntry(
            step=int(entry["step"]),
            epoch=entry.get("epoch"),
            metrics={name: float(value) for name, value in entry.items() if name not in ("step", "epoch")},
        )
        for entry in history
    )


class _NotFinite(Exception):
    """The text of a number in a record that is NaN or infinite."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotFinite(shortened(text))
    return value


def _unreadable(path: Path, error: ValidationError) -> UserError:
    """The error for a file that is no record of this schema: its schema if it has another one, else what is wrong."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return UserError("the record is damaged: its file is no JSON", where=str(path), fix=_AGAIN)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        problem = f"the record has schema {schema}, and this version reads schema {SCHEMA}"
        return UserError(problem if schema is not None else "the file is no record", where=str(path), fix=_AGAIN)
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "its top level"
    return UserError(f"the record is damaged: `{field}`: {first['msg']}", where=str(path), fix=_AGAIN)
