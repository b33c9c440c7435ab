"""One training, from a loaded model and its rows to the history of its metrics."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ctpd.core.errors import UserError
from ctpd.core.recipe import Schedule
from ctpd.models import parameter_counts, weight_mebibytes
from ctpd.objectives.base import Objective
from ctpd.train.callbacks import EvaluateOften, ReportProgress, SaveByTime
from ctpd.train.collator import micro_batch_size
from ctpd.train.memory import peak_mebibytes, reset_peak
from ctpd.train.trainer import OBJECTIVE, ForwardPass, PreferenceTrainer, Rows

LOGGED_STEPS = 200  # a history has at most about this many entries


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Execution: what moves no number beyond rounding (see `ctpd.pipeline.runtime.Runtime`)."""

    device: str
    micro_batch_tokens: int
    checkpoint_seconds: float
    report_to: tuple[str, ...]
    progress: Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a training leaves beside its model."""

    history: list[dict[str, float]]
    steps: int
    seconds: float
    peak_memory_mib: float | None
    weights_mib: float
    trainable_parameters: int
    parameters: int
    objective_parameters: int
    micro_batch: int


def fit(
    model: nn.Module,
    objective: Objective,
    rows: Rows,
    *,
    schedule: Schedule,
    learning_rate: float,
    seed: int,
    precision: str,
    folder: Path,
    settings: FitSettings,
    eval_rows: Rows | None = None,
    constants: Mapping[str, float] | None = None,
    forward_pass: ForwardPass | None = None,
    max_steps: int | None = None,
) -> Fit:
    """Train ``model`` in place; resume from ``folder`` if an interrupted training left its state there.

    Args:
        schedule: epochs, items per step and the learning rate's shape; `max_steps` overrides the epochs.
        folder: where resume states are written; removed by the caller with the rest of the partial artifact.

    Raises:
        UserError: fewer items than one step.
    """
    steps_per_epoch = len(rows) // schedule.pairs_per_step
    if steps_per_epoch == 0:
        raise UserError(
            f"there are {len(rows)} training items, fewer than the {schedule.pairs_per_step} of one step",
            fix="Lower `pairs_per_step` or give more data",
        )
    total = max_steps if max_steps is not None else steps_per_epoch * schedule.epochs
    args = _arguments(
        objective,
        rows,
        total,
        schedule,
        settings,
        learning_rate=learning_rate,
        seed=seed,
        precision=precision,
        folder=folder,
    )
    evaluations = (
        max(1, round(schedule.evaluations_per_epoch * total / steps_per_epoch)) if eval_rows is not None else 0
    )
    trainer = PreferenceTrainer(
        model,
        objective,
        rows,
        args=args,
        eval_rows=eval_rows,
        constants=constants,
        forward_pass=forward_pass,
        callbacks=[
            ReportProgress(settings.progress),
            *([EvaluateOften(evaluations)] if evaluations else []),
            SaveByTime(settings.checkpoint_seconds),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    reset_peak()
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return _outcome(trainer, model, objective, seconds=time.monotonic() - start)


def _outcome(trainer: PreferenceTrainer, model: nn.Module, objective: Objective, *, seconds: float) -> Fit:
    objective_parameters, _ = parameter_counts(objective)
    if objective_parameters:
        delattr(model, OBJECTIVE)  # it has served; what is saved and exported is the student alone
    trainable, everything = parameter_counts(model)
    return Fit(
        history=[dict(entry) for entry in trainer.state.log_history if "train_runtime" not in entry],
        steps=trainer.state.global_step,
        seconds=round(seconds, 3),
        peak_memory_mib=peak_mebibytes(),
        weights_mib=weight_mebibytes(model),
        trainable_parameters=trainable,
        parameters=everything,
        objective_parameters=objective_parameters,
        micro_batch=trainer.args.per_device_train_batch_size,
    )


def _arguments(
    objective: Objective,
    rows: Rows,
    total: int,
    schedule: Schedule,
    settings: FitSettings,
    *,
    learning_rate: float,
    seed: int,
    precision: str,
    folder: Path,
) -> TrainingArguments:
    shape: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": total,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if schedule.schedule == "constant" else schedule.schedule,
        "warmup_steps": math.ceil(schedule.warmup_ratio * total),
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        "activation_checkpointing": schedule.activation_checkpointing,
        "seed": seed,
        "bf16": precision == "bfloat16",
    }
    execution: dict[str, Any] = {
        "use_cpu": settings.device == "cpu",
        "report_to": list(settings.report_to) or "none",
        "logging_steps": max(1, total // LOGGED_STEPS),
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # SaveByTime asks for states
        "save_total_limit": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": settings.device.startswith("cuda"),
        "remove_unused_columns": False,
        "log_level": "error",
    }
    arguments = TrainingArguments(**shape, **execution)
    micro_batch = micro_batch_size(
        rows.item_lengths,
        rows=rows.items.shape[1],
        per_step=schedule.pairs_per_step,
        world=arguments.world_size,
        max_tokens=settings.micro_batch_tokens,
        fixed=objective.micro_batch,
    )
    arguments.per_device_train_batch_size = micro_batch
    arguments.per_device_eval_batch_size = micro_batch
    arguments.gradient_accumulation_steps = schedule.pairs_per_step // (micro_batch * arguments.world_size)
    return arguments
