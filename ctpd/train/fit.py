"""One training, from a loaded model and its rows to the history of its metrics."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ctpd.core.errors import NotFinite, UserError
from ctpd.core.processes import processes
from ctpd.models import parameter_counts, weight_mebibytes
from ctpd.objectives.base import Objective
from ctpd.ops.finite import non_finite_weight
from ctpd.train.callbacks import EvaluateOften, ReportProgress, SaveStates
from ctpd.train.collator import micro_batch_size
from ctpd.train.config import FsdpSpec, Schedule, Steps
from ctpd.train.loggers import LogTarget, logging_to
from ctpd.train.memory import peak_mebibytes, reset_peak
from ctpd.train.stopping import StopRequest
from ctpd.train.trainer import OBJECTIVE, PreferenceTrainer, Training

LOGGED_STEPS = 200  # a history has at most about this many entries


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """What determines the numbers of a training beside model, objective and data.

    Attributes:
        schedule: epochs, items per optimizer step, and the shape of the learning rate over the steps.
        learning_rate: its largest value.
        seed: of the order of the items.
        precision: `float32`, or `bfloat16` for autocast.
        max_steps: optimizer steps; None for the number that the schedule's epochs give.
    """

    schedule: Schedule
    learning_rate: float
    seed: int
    precision: str
    max_steps: int | None = None


def _silent(_text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a training is executed; no number depends on it beyond rounding (see `ctpd.pipeline.runtime.Runtime`).

    Attributes:
        device: the torch device.
        micro_batch_tokens: tokens of one forward and backward pass, padding included.
        checkpoint_seconds: a resume state is written this often.
        report_to: loggers of `transformers`.
        progress: called with the steps done and the number of all steps.
        note: called with a sentence for the user.
        detail: called with what is shown beside the progress: the loss.
        fsdp: how FSDP shards the model over the ranks; None: each rank holds all of it.
        log_target: where the loggers write; None: where they write by themselves.
    """

    device: str
    micro_batch_tokens: int
    checkpoint_seconds: float
    report_to: tuple[str, ...]
    progress: Callable[[int, int], None]
    note: Callable[[str], None] = _silent
    detail: Callable[[str], None] = _silent
    fsdp: FsdpSpec | None = None
    log_target: LogTarget | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The result of a training, without the model, which is trained in place.

    Attributes:
        history: the logged metrics, one entry a logged step or evaluation.
        steps: optimizer steps.
        items: training items of one epoch.
        left_out: items of each epoch that do not fill a step.
        note: what the user should know of the steps (`ctpd.train.config.Steps.note`); None for nothing.
        seconds: wall-clock time.
        peak_memory_mib: the largest of all ranks; None where the platform does not report it.
        weights_mib: memory of the model's weights in this rank.
        trainable_parameters, parameters: of the model.
        objective_parameters: trainable parameters of the objective.
        micro_batch: items of one forward pass.
        shares_prompts: whether pairs may have been packed.
    """

    history: list[dict[str, float]]
    steps: int
    items: int
    left_out: int
    note: str | None
    seconds: float
    peak_memory_mib: float | None
    weights_mib: float
    trainable_parameters: int
    parameters: int
    objective_parameters: int
    micro_batch: int
    shares_prompts: bool


def fit(training: Training[Any], optimization: Optimization, *, folder: Path, settings: FitSettings) -> Fit:
    """Train the model in place; resume from ``folder`` if an interrupted training left a whole state there.

    SIGINT, SIGTERM and SIGHUP write a state before they do what they did when this was called.

    Args:
        folder: where resume states are written; the caller removes it.

    Raises:
        UserError: fewer items than one step, a learning rate of 0 in every step, or the weights cannot be sharded as `settings.fsdp` asks.
        NotFinite: a loss, gradient norm, metric or trained weight is NaN or infinite.
    """
    if settings.fsdp is not None:
        _refuse_sharding(training.model, training.objective)
    args = _arguments(training, optimization, folder=folder, settings=settings)
    stop = StopRequest(settings.note)
    callbacks = _callbacks(training, optimization, settings, args)
    callbacks.append(SaveStates(settings.checkpoint_seconds, stop))
    with logging_to(settings.log_target):
        trainer = PreferenceTrainer(training, args=args, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        if settings.fsdp is not None:
            _refuse_replicas(trainer)
        reset_peak(settings.device)
        start = time.monotonic()
        state = trainer.states.newest(settings.note)
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
    trainer.check_finite({})
    _refuse_non_finite_weights(trainer)
    return _result(trainer, _steps(len(training.rows), optimization), seconds=time.monotonic() - start)


def _callbacks(
    training: Training[Any], optimization: Optimization, settings: FitSettings, args: TrainingArguments
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [ReportProgress(settings.progress, settings.detail)]
    if training.eval_rows is not None:
        schedule = optimization.schedule
        steps_per_epoch = len(training.rows) // schedule.pairs_per_step
        wanted = round(schedule.evaluations_per_epoch * args.max_steps / steps_per_epoch)
        callbacks.append(EvaluateOften(max(1, wanted)))
    return callbacks


def _refuse_sharding(model: nn.Module, objective: Objective) -> None:
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise UserError(
            "FSDP is not tried with weights of 4 bits", fix="Give `lora.base: bfloat16`, or take `fsdp` out"
        )
    if processes().world_size == 1:
        raise UserError(
            "FSDP shards a model over several processes, and there is one process", fix="Give `--num-processes`"
        )
    if any(True for _ in objective.parameters()):
        raise UserError(
            "the method has parameters of its own, and FSDP cannot shard these together with the model's",
            fix="Take `fsdp` out of the recipe's `launch` block: each process then holds the whole model",
        )


def _refuse_replicas(trainer: PreferenceTrainer) -> None:
    """Refuse to go on where accelerate does not use FSDP, which it decides without a warning."""
    found = trainer.accelerator.distributed_type
    if found != DistributedType.FSDP:
        raise UserError(
            f"the recipe's `launch` block asks for FSDP, and accelerate would train with {found.value} here",
            fix="FSDP needs a GPU for each process; without one take `fsdp` out of the `launch` block",
        )


def _refuse_non_finite_weights(trainer: PreferenceTrainer) -> None:
    """The last step can spoil weights, and no loss comes after it. Every rank raises, whichever holds the weight."""
    name = non_finite_weight(trainer.training.model, trainable_only=True)
    if processes().all_reduce(np.array([name is not None], dtype=np.int64))[0]:
        raise NotFinite(
            f"the trained weight {name or 'in another process'} is not finite after step {trainer.state.global_step}",
            fix=f"Lower the learning rate, which is {trainer.args.learning_rate:g}",
        )


def _result(trainer: PreferenceTrainer, steps: Steps, *, seconds: float) -> Fit:
    training = trainer.training
    objective_parameters, _ = parameter_counts(training.objective)
    if objective_parameters:
        delattr(training.model, OBJECTIVE)  # what is saved and exported is the student alone
    trainable, everything = parameter_counts(training.model)
    return Fit(
        history=[dict(entry) for entry in trainer.state.log_history if "train_runtime" not in entry],
        steps=trainer.state.global_step,
        items=steps.items,
        left_out=steps.left_out,
        note=steps.note,
        seconds=round(seconds, 3),
        peak_memory_mib=peak_mebibytes(trainer.args.device.type),
        weights_mib=weight_mebibytes(training.model),
        trainable_parameters=trainable,
        parameters=everything,
        objective_parameters=objective_parameters,
        micro_batch=trainer.args.per_device_train_batch_size,
        shares_prompts=training.rows.shares_prompts,
    )


def _arguments(
    training: Training[Any], optimization: Optimization, *, folder: Path, settings: FitSettings
) -> TrainingArguments:
    steps = _steps(len(training.rows), optimization)
    values = _optimization_arguments(optimization, steps) | _execution_arguments(settings, steps.total)
    if settings.fsdp is not None:
        values |= _fsdp_arguments(settings.fsdp, checkpointing=values.pop("activation_checkpointing"))
    arguments = TrainingArguments(output_dir=str(folder), **values)
    _refuse_other_device(arguments.device, settings.device)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never the library's DataParallel: a process trains on one device
    if settings.fsdp is not None:
        # Weights are gathered and gradients reduced as float32; autocast rounds what a single process would round.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    per_step, rows = optimization.schedule.pairs_per_step, training.rows
    micro_batch = micro_batch_size(
        rows.item_lengths,
        rows=rows.items.shape[1],
        per_step=per_step,
        world_size=arguments.world_size,
        max_tokens=settings.micro_batch_tokens,
        fixed=training.objective.micro_batch,
    )
    arguments.per_device_train_batch_size = micro_batch
    arguments.per_device_eval_batch_size = micro_batch
    arguments.gradient_accumulation_steps = per_step // (micro_batch * arguments.world_size)
    return arguments


def _steps(num_items: int, optimization: Optimization) -> Steps:
    return Steps.of(num_items, optimization.schedule, max_steps=optimization.max_steps)


def _optimization_arguments(optimization: Optimization, steps: Steps) -> dict[str, Any]:
    schedule = optimization.schedule
    return {
        "max_steps": steps.total,
        "learning_rate": optimization.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if schedule.schedule == "constant" else schedule.schedule,
        "warmup_steps": steps.warmup,
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        "activation_checkpointing": schedule.activation_checkpointing,
        "seed": optimization.seed,
        "bf16": optimization.precision == "bfloat16",
    }


def _execution_arguments(settings: FitSettings, total: int) -> dict[str, Any]:
    return {
        "use_cpu": settings.device == "cpu",
        "report_to": list(settings.report_to) or "none",
        **({} if settings.log_target is None else settings.log_target.arguments),
        "logging_steps": max(1, total // LOGGED_STEPS),
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # SaveStates asks for states
        "disable_tqdm": True,
        "dataloader_pin_memory": settings.device.startswith("cuda"),
        "remove_unused_columns": False,
        "log_level": "error",
        "ddp_find_unused_parameters": False,  # every trainable parameter has a gradient in every pass
    }


def _refuse_other_device(chosen: torch.device, wanted: str) -> None:
    """The library trains on the first GPU that the process sees, whatever device is asked for."""
    asked = torch.device(wanted)
    if (asked.type, asked.index or 0) != (chosen.type, chosen.index or 0):
        raise UserError(
            f"the training would run on {chosen}, not on {wanted}: the trainer takes the first GPU that it sees",
            fix=f"Start the program with CUDA_VISIBLE_DEVICES={asked.index or 0} and leave the device's number out",
        )


def _fsdp_arguments(spec: FsdpSpec, *, checkpointing: bool) -> dict[str, Any]:
    """The library's arguments for FSDP2."""
    config: dict[str, Any] = {
        "version": 2,
        "reshard_after_forward": True,
        "cpu_offload": spec.offload,
        "state_dict_type": "SHARDED_STATE_DICT",  # of resume states: no rank ever holds all of one
        "activation_checkpointing": checkpointing,
    }
    if spec.wrap:
        config["transformer_layer_cls_to_wrap"] = list(spec.wrap)
    # Gradients are reduced and sharded after each micro-batch: accumulated unsharded, they would be as large as the
    # model in every rank.
    accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return {"fsdp": True, "fsdp_config": config, "accelerator_config": accumulation}
