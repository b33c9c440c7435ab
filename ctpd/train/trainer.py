"""The one Trainer: a thin subclass of `transformers.Trainer`.

The library brings the loop, resume, distribution, PEFT, mixed precision and loggers. What is ours: the order of the
items, the forward pass through the scorer, the objective, and *sums, then one division*: the loss of an optimizer step
is the objective's sum over all micro-batches and ranks, divided once by the step's count of pairs, tokens or units.

Shape legend: R rows of a batch, T tokens, U units, N scored tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ctpd.core.errors import NotFinite, listed
from ctpd.models import Score, score
from ctpd.objectives.base import Objective, Sums, Units
from ctpd.ops.spans import unit_logps
from ctpd.train.batches import Batch, UnitBatch, count_units, to_device
from ctpd.train.collator import Items, StepLoader, StepSampler, TrainingRows
from ctpd.train.finite import FirstBadStep
from ctpd.train.states import ResumeStates

OBJECTIVE = "ctpd_objective"  # the name under which an objective with parameters is a part of the model
OBJECTIVE_FILE = "objective.safetensors"

B = TypeVar("B", bound=Batch)
ForwardPass = Callable[[nn.Module, B], Sums]
"""From the model and a batch to the objective's sums: `UnitPass`, `DistillPass`."""


class UnitPass:
    """The forward pass of an objective of the log-probabilities of units."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, model: nn.Module, batch: UnitBatch) -> Sums:
        """One micro-batch."""
        tokens, unit_RT = batch.tokens, batch.tokens.unit
        request = Score(tokens.predictors, tokens.targets)
        logps_N = score(model, tokens.input_ids, request, layout=tokens.layout)
        logps_RT = logps_N.new_zeros(unit_RT.shape).masked_scatter(unit_RT >= 0, logps_N)
        aggregate = self._objective.layout.aggregate
        policy_RU = unit_logps(logps_RT, unit_RT, num_units=batch.mask.shape[1], aggregate=aggregate)
        units = Units(policy=policy_RU, mask=batch.mask, reference=batch.reference, weights=batch.weights)
        sums: Sums = self._objective(units)
        return sums


@dataclass(frozen=True, kw_only=True)
class Training(Generic[B]):
    """What is trained, for what, and on what.

    Attributes:
        model: with the scorer installed (`ctpd.models.load_model`), or a PEFT model around one.
        objective: its own parameters, if any, are a part of the model while it is trained.
        rows: the training items.
        forward_pass: from the model and a batch of these items to the objective's sums.
        eval_rows: items for evaluation during the training; None for no evaluation.
        constants: metrics that do not change (rates of clamped weights), logged with the others.
    """

    model: nn.Module
    objective: Objective
    rows: TrainingRows[B]
    forward_pass: ForwardPass[B]
    eval_rows: TrainingRows[B] | None = None
    constants: Mapping[str, float] = field(default_factory=dict)


def save_objective(objective: nn.Module, folder: Path) -> None:
    """Write an objective's parameters, if it has any."""
    state = {name: parameter.detach().cpu().contiguous() for name, parameter in objective.named_parameters()}
    if state:
        save_file(state, folder / OBJECTIVE_FILE)


def load_objective(objective: nn.Module, folder: Path) -> None:
    """Read what `save_objective` wrote."""
    if any(True for _ in objective.parameters()):
        objective.load_state_dict(load_file(folder / OBJECTIVE_FILE), strict=False)


class PreferenceTrainer(Trainer):
    """Trains a model on rows with an objective.

    Args:
        training: model, objective, data and forward pass.
        args: `per_device_train_batch_size` is the micro-batch, in items; micro-batches times ranks times accumulation
            is the optimizer step.
        callbacks: as in the library.
    """

    training: Training[Any]
    objective: Objective
    loss_is_scaled_for_ga = True
    _has_own_group = False

    def __init__(
        self, training: Training[Any], *, args: TrainingArguments, callbacks: list[TrainerCallback] | None = None
    ) -> None:
        for rows in (training.rows, training.eval_rows):
            if rows is not None:
                rows.check()
        model, objective = training.model, training.objective
        self.training, self.objective = training, objective
        self._running: dict[str, tuple[Tensor, float]] = {}  # name -> (sum, on the device; count)
        self._bad = FirstBadStep()
        if any(True for _ in objective.parameters()):
            model.add_module(OBJECTIVE, objective)
        super().__init__(model=model, args=args, train_dataset=Items(len(training.rows)), callbacks=callbacks)
        objective.to(self.args.device)
        self.states = ResumeStates(Path(str(args.output_dir)), sharded=self.is_fsdp_enabled)
        if self.is_fsdp_enabled and self.args.bf16:
            # accelerate wraps every other model's forward in autocast. Without autocast's cache, which would keep a
            # rounded copy of all gathered weights.
            autocast = torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False)
            model.forward = autocast(model.forward)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's; the objective's parameters are a group of their own if they have a learning rate of their own."""
        optimizer = super().create_optimizer(model)
        own = {id(p): p for p in self.objective.parameters()}
        if own and self.objective.objective_learning_rate is not None and not self._has_own_group:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group(
                {
                    "params": list(own.values()),
                    "lr": self.objective.objective_learning_rate,
                    "weight_decay": self.args.weight_decay,
                }
            )
            self._has_own_group = True
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        """Where the library writes a state: aside, until `ResumeStates.finish` makes it one."""
        return str(self.states.unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Also the objective's parameters, which an adapter's checkpoint would leave out."""
        if self.args.should_save:
            folder = self.states.unfinished / self.states.path(self.state.global_step).name
            folder.mkdir(parents=True, exist_ok=True)
            save_objective(self.objective, folder)
        super()._save_checkpoint(model, trial)
        self.states.finish(self.state.global_step)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The library's; nothing where a training is resumed that was stopped after its last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_objective(self.objective, Path(resume_from_checkpoint))

    def get_train_dataloader(self) -> StepLoader:
        """This rank's micro-batches, in an order that depends on (seed, epoch) alone."""
        rows = self.training.rows
        return StepLoader(Items(len(rows)), batch_sampler=self._sampler(), collate_fn=rows.collate)

    def _sampler(self) -> StepSampler:
        args = self.args
        return StepSampler(
            self.training.rows.item_lengths,
            per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            micro_batch=args.per_device_train_batch_size,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of a step, and the number that the step's loss is divided by, over all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        total: int = sum(count_units(batch, self.objective.counts) for batch in batches)
        own = torch.tensor(total)
        count = (own.pin_memory() if self.args.dataloader_pin_memory else own).to(device, non_blocking=True)
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _prepare_input(self, data: Any) -> Any:
        """The batch on the device, without waiting for the copy: with a GPU, batches are in pinned memory."""
        return to_device(data, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss, times the world size: gradients are averaged over the ranks."""
        assert num_items_in_batch is not None
        assert not return_outputs
        sums = self.training.forward_pass(model, inputs)
        self._accumulate("", sums, inputs.num_pairs)
        loss: Tensor = sums.loss * (self.args.world_size / num_items_in_batch)
        self._bad.watch("loss", loss, step=self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The library's, watched."""
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._bad.watch("gradient norm", found, step=self.state.global_step + 1)
        return found

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The objective's loss and metrics over `eval_rows`, divided among the ranks, logged with the prefix `eval_`."""
        rows = self.training.eval_rows
        if rows is None:
            return {}
        prefix = f"{metric_key_prefix}_"
        model = self.model
        assert model is not None
        model.eval()
        size, world_size, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        losses: list[tuple[list[int], Tensor]] = []
        order = torch.from_numpy(rows.item_lengths).argsort(descending=True, stable=True).tolist()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in range(0, len(order), size * world_size):
                own = order[first + rank * size : first + (rank + 1) * size]
                # Idle ranks still run the forward pass, because FSDP's collectives need them; they add nothing.
                batch = rows.collate(own or order[:size])
                count = count_units(batch, self.objective.counts)
                sums = self.training.forward_pass(model, self._prepare_inputs(batch))
                losses.append((own, sums.loss.detach()))
                self._accumulate(prefix, sums, batch.num_pairs, counts=bool(own))
                self._add(f"{prefix}loss", sums.loss, count, counts=bool(own))
        model.train()
        metrics = self._drain(prefix)
        self._check_evaluation(metrics, losses)
        self.log(metrics)
        # This resets `control.should_evaluate`; otherwise the library evaluates again at the end of the epoch.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_evaluation(self, metrics: Mapping[str, float], losses: Sequence[tuple[list[int], Tensor]]) -> None:
        """Refuse metrics that are not finite; ``losses`` are those of this rank's batches, with their items."""
        wrong = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if wrong is not None:
            assert self.training.eval_rows is not None
            items = [item for own, loss in losses if not loss.isfinite() for item in own]
            names = self.training.eval_rows.names_of(items)
            of_pairs = f", among the evaluation pairs {listed(names)}," if names else ""
            raise self._not_finite(f"the metric {wrong}{of_pairs} is not finite", self.state.global_step, [])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics accumulated since the last call; the only place that waits for the device."""
        if "loss" in logs:
            logs |= self._drain("") | dict(self.training.constants)
            self.check_finite(logs)
        super().log(logs, start_time)

    def check_finite(self, logs: Mapping[str, float]) -> None:
        """Refuse to go on with numbers that are not finite; every rank does, or none.

        A resume state is written after a call of this at the same step: it is never one of a training that went wrong.

        Raises:
            NotFinite: a loss or a gradient norm since the start, or one of these metrics.
        """
        if found := self._bad.found(self._of_all_ranks):
            name, step = found
            raise self._not_finite(f"the {name} is not finite", step, self._sampler().items_of(step - 1).tolist())
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise self._not_finite(f"the metric {name} is not finite", self.state.global_step, [])

    def _not_finite(self, what: str, step: int, items: Sequence[int]) -> NotFinite:
        names = self.training.rows.names_of(items)
        last = self.states.last
        state = "No resume state was written" if last is None else f"The last good resume state is that of step {last}"
        of_step = f", whose pairs are {listed(names)}" if names else ""
        return NotFinite(
            f"{what} at step {step} of {self.state.max_steps}{of_step}. {state}",
            fix=f"Lower the learning rate, which is {self.args.learning_rate:g}, or correct the model or these pairs",
        )

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """[1, ...] of this rank -> [ranks, ...]."""
        gathered: Tensor = self.accelerator.gather(values) if self.args.world_size > 1 else values
        return gathered

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the library's estimate assumes a head over every position."""
        return 0

    def _accumulate(self, prefix: str, sums: Sums, num_pairs: int, *, counts: bool = True) -> None:
        for name, value in sums.metrics.items():
            self._add(f"{prefix}{name}", value, num_pairs, counts=counts)

    def _add(self, name: str, value: Tensor, count: float, *, counts: bool) -> None:
        """Add without waiting for the device; with ``counts`` off add nothing, so that all ranks know the same names."""
        total, number = self._running.get(name, (0.0, 0.0))
        own = value.detach().double() if counts else torch.zeros_like(value, dtype=torch.float64)
        self._running[name] = (own + total, number + count * counts)

    def _drain(self, prefix: str) -> dict[str, float]:
        names = sorted(
            name for name in self._running if name.startswith(prefix) and (prefix or not name.startswith("eval_"))
        )
        if not names:
            return {}
        found = [self._running.pop(name) for name in names]
        sums = torch.stack([total for total, _ in found])
        totals = torch.stack([sums, sums.new_tensor([count for _, count in found])], dim=1)
        totals = self._of_all_ranks(totals[None]).sum(dim=0)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        return dict(zip(names, means, strict=True))
