"""One training, from a loaded model and its rows to the history of its metrics."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ctpd.core.errors import UserError
from ctpd.core.processes import processes
from ctpd.core.recipe import FsdpSpec, Schedule
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
    fsdp: FsdpSpec | None = None


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
    shares_prompts: bool


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
        UserError: fewer items than one step, or the weights cannot be shared out as `settings.fsdp` asks.
    """
    if settings.fsdp is not None:
        _refuse_unshared(model, objective)
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
    if settings.fsdp is not None:
        _refuse_copies(trainer)
    reset_peak(settings.device)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=_last_state(folder))
    return _outcome(trainer, model, objective, seconds=time.monotonic() - start)


def _last_state(folder: Path) -> str | None:
    """The resume state that the first process finds: others may see a shared folder late."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    step = processes().broadcast(
        -1 if found is None else int(Path(found).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
    )
    return None if step < 0 else str(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}")


def _refuse_unshared(model: nn.Module, objective: Objective) -> None:
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise UserError(
            "FSDP is not tried with weights of 4 bits", fix="Give `lora.base: bfloat16`, or take `fsdp` out"
        )
    if processes().world_size == 1:
        raise UserError(
            "FSDP shares a model out over processes, and there is one process", fix="Give `--num-processes`"
        )
    if any(True for _ in objective.parameters()):
        raise UserError(
            "the method has parameters of its own, and these cannot be shared out over the processes with the model's",
            fix="Take `fsdp` out of the recipe's `launch` block: each process then holds the whole model",
        )


def _refuse_copies(trainer: PreferenceTrainer) -> None:
    """Refuse to go on where accelerate has put FSDP aside, which it does without a word."""
    found = trainer.accelerator.distributed_type
    if found != DistributedType.FSDP:
        raise UserError(
            f"the recipe's `launch` block asks for FSDP, and accelerate would train with {found.value} here",
            fix="FSDP needs a GPU for each process; without one take `fsdp` out of the `launch` block",
        )


def _outcome(trainer: PreferenceTrainer, model: nn.Module, objective: Objective, *, seconds: float) -> Fit:
    objective_parameters, _ = parameter_counts(objective)
    if objective_parameters:
        delattr(model, OBJECTIVE)  # it has served; what is saved and exported is the student alone
    trainable, everything = parameter_counts(model)
    return Fit(
        history=[dict(entry) for entry in trainer.state.log_history if "train_runtime" not in entry],
        steps=trainer.state.global_step,
        seconds=round(seconds, 3),
        peak_memory_mib=peak_mebibytes(trainer.args.device.type),
        weights_mib=weight_mebibytes(model),
        trainable_parameters=trainable,
        parameters=everything,
        objective_parameters=objective_parameters,
        micro_batch=trainer.args.per_device_train_batch_size,
        shares_prompts=trainer.rows.shares_prompts,
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
        "ddp_find_unused_parameters": False,  # every parameter that is trained has a gradient in every pass
    }
    if settings.fsdp is not None:
        execution |= _shares(settings.fsdp, checkpointing=shape.pop("activation_checkpointing"))
    arguments = TrainingArguments(**shape, **execution)
    _refuse_other_device(arguments.device, settings.device)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never the library's DataParallel: a process trains on one device
    if settings.fsdp is not None:
        # Weights are gathered and gradients added as float32; autocast rounds what a single process would round.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    micro_batch = micro_batch_size(
        rows.item_lengths,
        rows=rows.items.shape[1],
        per_step=schedule.pairs_per_step,
        world_size=arguments.world_size,
        max_tokens=settings.micro_batch_tokens,
        fixed=objective.micro_batch,
    )
    arguments.per_device_train_batch_size = micro_batch
    arguments.per_device_eval_batch_size = micro_batch
    arguments.gradient_accumulation_steps = schedule.pairs_per_step // (micro_batch * arguments.world_size)
    return arguments


def _refuse_other_device(chosen: torch.device, wanted: str) -> None:
    """The library trains on the first GPU that the process sees, whatever device is asked for."""
    asked = torch.device(wanted)
    if (asked.type, asked.index or 0) != (chosen.type, chosen.index or 0):
        raise UserError(
            f"the training would run on {chosen}, not on {wanted}: the trainer takes the first GPU that it sees",
            fix=f"Start the program with CUDA_VISIBLE_DEVICES={asked.index or 0} and leave the device's number out",
        )


def _shares(spec: FsdpSpec, *, checkpointing: bool) -> dict[str, Any]:
    """The library's arguments for FSDP2."""
    config: dict[str, Any] = {
        "version": 2,
        "reshard_after_forward": True,
        "cpu_offload": spec.offload,
        "state_dict_type": "SHARDED_STATE_DICT",  # of resume states: no process ever holds all of one
        "activation_checkpointing": checkpointing,
    }
    if spec.wrap:
        config["transformer_layer_cls_to_wrap"] = list(spec.wrap)
    # Gradients are shared out after each micro-batch: whole ones, as large as the model, would wait in each process.
    accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return {"fsdp": True, "fsdp_config": config, "accelerator_config": accumulation}
