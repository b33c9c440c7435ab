"""What each stage of a recipe needs with its real models: memory of one device, and floating-point operations.

Computed, not measured: lengths of rows are those of the whole pairs stage, requests are as long as the rehearsed ones.
`ctpd.pipeline.estimates` is the other estimate: seconds and memory that similar stages of a store were measured to take.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ctpd.core.roles import Role
from ctpd.pipeline.rows import token_rows
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.distributions import DistributionsStage
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.pipeline.stages.generate import GenerateStage
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.signals import SignalsStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.recipe import LaunchSpec
from ctpd.rehearsal import operations
from ctpd.rehearsal.memory import BFLOAT16, FLOAT32, GIB, TILE, Training, scoring_bytes, training_bytes
from ctpd.rehearsal.operations import Work
from ctpd.rehearsal.requests import Requests
from ctpd.rehearsal.sizes import CountedShape, RealModels
from ctpd.text.prepare import PreparedPairs
from ctpd.train.collator import micro_batch_size
from ctpd.train.config import Steps

_BASE_BYTES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "4bit": 0.5}
_SIDES = {"chosen": 0, "rejected": 1}


class Need(NamedTuple):
    """What a stage needs; None where it is not known, or next to nothing.

    Attributes:
        memory: bytes of one device, without what the device's libraries take (`ctpd.rehearsal.memory.RESERVED`).
        operations: floating-point operations, over all devices.
    """

    memory: float | None = None
    operations: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of the rows of all pairs; int64 [P, 2] of chosen and rejected responses with their prompts."""

    rows: Mapping[Role, np.ndarray[Any, Any]]
    is_trained: np.ndarray[Any, Any]

    @classmethod
    def of(cls, prepared: PreparedPairs) -> "Lengths":
        """Those of prepared pairs."""
        roles: tuple[Role, ...] = ("teacher", "student")
        rows = {role: np.diff(token_rows(prepared, role).row_starts).reshape(-1, 2) for role in roles}
        return cls(rows, np.array([split == "train" for split in prepared.split]))

    def of_split(self, role: Role, sides: tuple[str, ...], *, trained: bool) -> np.ndarray[Any, Any]:
        """The rows of some sides, of the pairs that are trained on or of the others."""
        rows: np.ndarray[Any, Any] = self.rows[role][self.is_trained == trained]
        return rows[:, [_SIDES[side] for side in sides]]


def work_of(rows: np.ndarray[Any, Any]) -> Work:
    """The tokens of rows."""
    return Work(float(rows.sum()), float((rows.astype(float) ** 2).sum()))


class Needs:
    """What the stages of a recipe need.

    Args:
        models: the real models.
        lengths: of the rows of the whole pairs stage; None where it failed.
        launch: how the recipe is meant to be run.
        requests: lengths of the requests of each column.
    """

    def __init__(self, models: RealModels, lengths: Lengths | None, launch: LaunchSpec, requests: Requests) -> None:
        self._models, self._lengths, self._requests = models, lengths, requests
        self._processes, self._fsdp = launch.num_processes, launch.fsdp is not None and launch.num_processes > 1
        self._runtime = Runtime()

    def of(self, stage: Stage) -> Need:
        """What a stage needs; nothing where it uses no model.

        Raises:
            UserError: its pairs, with the processes of the recipe's launch, make no training.
        """
        computed: dict[type, Callable[[Any], Need]] = {
            TrainStage: self._training,
            PretrainStage: self._pretraining,
            SignalsStage: self._scoring,
            DistributionsStage: self._scoring,
            GenerateStage: self._generation,
            EvaluateStage: self._evaluation,
        }
        compute = computed.get(type(stage))
        return Need() if compute is None else compute(stage)

    def _training(self, stage: TrainStage) -> Need:
        model, config, lengths = self._models.of(stage.start), stage.config, self._lengths
        if model is None or lengths is None:
            return Need()
        schedule, sides = config.schedule, stage.method.requires.sides
        rows = lengths.of_split(config.role, sides, trained=True)
        steps = Steps.of(len(rows), schedule)
        share = steps.total * steps.per_step / len(rows)
        multiplied = model.multiplied(schedule.lora)
        done = operations.training(
            multiplied, work_of(rows).times(share), checkpointing=schedule.activation_checkpointing
        )
        held_out = lengths.of_split(config.role, sides, trained=False)
        evaluations = schedule.epochs * schedule.evaluations_per_epoch
        done += operations.forward(multiplied, work_of(held_out).times(evaluations))
        memory = self._training_memory(stage, rows)
        if not stage.stored:
            of_teacher = work_of(lengths.of_split("teacher", sides, trained=True)).times(share)
            for teacher in stage.teachers:
                held = self._models.of(teacher)
                if held is None:
                    return Need()
                done += operations.forward(held.multiplied(), of_teacher)
                memory += _bytes(config.precision) * (held.shape().counted + held.shape().rest)
        return Need(memory, done)

    def _training_memory(self, stage: TrainStage, rows: np.ndarray[Any, Any]) -> float:
        config, model = stage.config, self._models.of(stage.start)
        assert model is not None
        schedule = config.schedule
        longest = rows.max(axis=1)
        fixed = stage.method.requires.micro_batch
        pairs = micro_batch_size(
            longest,
            rows=rows.shape[1],
            per_step=schedule.pairs_per_step,
            world_size=self._processes,
            max_tokens=self._runtime.micro_batch_tokens,
            fixed=fixed,
        )
        lora, shards = schedule.lora, self._processes if self._fsdp else 1
        shape = model.shape(lora)
        base = FLOAT32 if lora is None else _BASE_BYTES[lora.base]
        training = Training(
            tokens=int(pairs * rows.shape[1] * longest.max()),
            lora=None if lora is None else lora.r,
            base=base,
            checkpointing=schedule.activation_checkpointing,
            num_shards=shards,
            ddp=self._processes > 1 and not self._fsdp,
        )
        parts = training_bytes(shape, training)
        return math.fsum(parts.values()) + base * shape.rest / shards + _tile(shape, training.tokens)

    def _pretraining(self, stage: PretrainStage) -> Need:
        model, config = self._models.pretrained(stage), stage.config
        tokens, rows = config.texts_per_step * config.max_position, config.texts_per_step
        work = Work(tokens, rows * config.max_position**2).times(config.steps)
        shape = model.shape()
        training = Training(tokens=min(tokens, self._runtime.micro_batch_tokens), checkpointing=False)
        memory = math.fsum(training_bytes(shape, training).values()) + _tile(shape, training.tokens)
        return Need(memory, operations.training(model.multiplied(), work, checkpointing=False))

    def _scoring(self, stage: SignalsStage | DistributionsStage) -> Need:
        if self._lengths is None:
            return Need()
        rows = self._lengths.rows[stage.config.role]
        batch = min(float(rows.sum()), self._runtime.signal_batch_tokens)
        return self._frozen(stage.model, stage.config.precision, work_of(rows), batch)

    def _generation(self, stage: GenerateStage) -> Need:
        """As long as the data's own responses."""
        if self._lengths is None:
            return Need()
        rows = self._lengths.rows[stage.config.role][:, _SIDES[stage.config.side]]
        return self._frozen(stage.model, stage.config.precision, work_of(rows), float(rows.max()))

    def _evaluation(self, stage: EvaluateStage) -> Need:
        found = self._requests.of(stage)
        if found is None:
            return Need()
        batch, work = stage.protocol.batch_size * found.longest, found.of(stage.protocol.limit)
        return self._frozen(stage.model, stage.protocol.precision, work, batch)

    def _frozen(self, model: Any, precision: str, work: Work, batch: float) -> Need:
        """A pass without gradient, in the weights' own precision."""
        real = self._models.of(model)
        if real is None:
            return Need()
        shape = real.shape()
        parts = scoring_bytes(shape, tokens=math.ceil(batch))
        memory = (math.fsum(parts.values()) + BFLOAT16 * shape.rest) * _bytes(precision) / BFLOAT16
        return Need(memory + _tile(shape, batch), operations.forward(real.multiplied(), work))


def _tile(shape: CountedShape, tokens: float) -> float:
    """The scorer's tile of logits, which is no larger than the logits of the batch."""
    return min(TILE, tokens * shape.vocabulary * FLOAT32)


def _bytes(precision: str) -> float:
    return _BASE_BYTES[precision]


def gib(size: float) -> str:
    """Bytes in GiB, or MiB if there is less than one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def operations_text(value: float) -> str:
    """Operations with the prefix that leaves one to three digits before the point."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}FLOP"
    return f"{value / 1e6:.3g} MFLOP"
