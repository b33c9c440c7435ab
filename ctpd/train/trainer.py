"""The one Trainer: a thin subclass of `transformers.Trainer`.

The library brings the loop, resume, distribution, PEFT, mixed precision and loggers. What is ours: the order of the
items, the forward pass through the scorer, the objective, and *sums, then one division*: the loss of a step is the
objective's sum over all micro-batches and processes divided by the step's count of its unit, once.

Shape legend: R rows of a batch, T tokens, U units, N scored tokens.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ctpd.models import Score, score
from ctpd.objectives.base import PairObjective, Sums, Units
from ctpd.ops.spans import unit_logps
from ctpd.train.collator import Batch, Items, ScoredRows, StepLoader, StepSampler


class PreferenceTrainer(Trainer):
    """Trains a model on scored rows with an objective.

    Args:
        model: a model with the scorer installed (`ctpd.models.load_model`), or a PEFT model around one.
        objective: turns unit log-probabilities into sums.
        rows: the training items.
        args: `per_device_train_batch_size` is the micro-batch, in items; micro-batches times processes times
            accumulation is the step.
        eval_rows: items for evaluation during the training.
        constants: metrics that do not change (shares of clamped weights), logged with the others.
        callbacks: as in the library.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        objective: PairObjective,
        rows: ScoredRows,
        *,
        args: TrainingArguments,
        eval_rows: ScoredRows | None = None,
        constants: Mapping[str, float] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        rows.check()
        self.objective, self.rows, self.eval_rows = objective, rows, eval_rows
        self._constants = dict(constants or {})
        self._running: dict[str, Tensor] = {}
        super().__init__(model=model, args=args, train_dataset=Items(len(rows)), callbacks=callbacks)
        objective.to(self.args.device)

    def get_train_dataloader(self) -> StepLoader:
        """Micro-batches in the order of (seed, epoch), dealt to this process."""
        args = self.args
        sampler = StepSampler(
            self.rows.item_lengths,
            per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            micro_batch=args.per_device_train_batch_size,
            seed=args.seed,
            rank=args.process_index,
            world=args.world_size,
        )
        return StepLoader(Items(len(self.rows)), batch_sampler=sampler, collate_fn=self.rows.collate)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of a step, and the step's count of the objective's unit over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        count = torch.tensor(sum(self._count(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss; gradients are averaged over processes, hence the factor."""
        assert num_items_in_batch is not None
        assert not return_outputs
        sums = self._sums(model, inputs)
        self._accumulate("", sums, inputs)
        return sums.loss * (self.args.world_size / num_items_in_batch)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The objective's loss and metrics over `eval_rows`, logged with the prefix `eval_`."""
        if self.eval_rows is None:
            return {}
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        order = torch.from_numpy(self.eval_rows.item_lengths).argsort(descending=True, stable=True).tolist()
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(order), size):
                batch = self._prepare_inputs(self.eval_rows.collate(order[start : start + size]))
                sums = self._sums(self.model, batch)
                self._accumulate(f"{metric_key_prefix}_", sums, batch)
                self._add(f"{metric_key_prefix}_loss", sums.loss.detach(), torch.as_tensor(sums.count))
        self.model.train()
        metrics = self._drain(f"{metric_key_prefix}_", gather=False)
        self.log(metrics)
        # Without it the request stands until the next step, and the library evaluates again where an epoch ends.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last call; the only place where the device is waited for."""
        if "loss" in logs:
            logs |= self._drain("", gather=True) | self._constants
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: the library's estimate assumes a head over every position."""
        return 0

    def _sums(self, model: nn.Module, batch: Batch) -> Sums:
        unit_RT, mask_RU = batch["unit"], batch["mask"]
        logps_N = score(model, batch["input_ids"], Score(batch["predictors"], batch["targets"]))
        logps_RT = logps_N.new_zeros(unit_RT.shape).masked_scatter(unit_RT >= 0, logps_N)
        policy_RU = unit_logps(logps_RT, unit_RT, num_units=mask_RU.shape[1], aggregate=self.objective.layout.aggregate)
        sums: Sums = self.objective(
            Units(policy=policy_RU, mask=mask_RU, reference=batch.get("reference"), weights=batch.get("weights"))
        )
        return sums

    def _count(self, batch: Batch) -> int:
        if self.objective.counts == "tokens":
            return int(batch["mask"].sum())
        return len(batch["input_ids"]) // len(self.objective.sides)

    def _accumulate(self, prefix: str, sums: Sums, batch: Batch) -> None:
        items = torch.as_tensor(len(batch["input_ids"]) // len(self.objective.sides))
        for name, value in sums.metrics.items():
            self._add(f"{prefix}{name}", value.detach(), items)

    def _add(self, name: str, value: Tensor, count: Tensor) -> None:
        term = torch.stack([value.double(), count.to(value.device).double()])
        self._running[name] = self._running[name] + term if name in self._running else term

    def _drain(self, prefix: str, *, gather: bool) -> dict[str, float]:
        names = sorted(
            name for name in self._running if name.startswith(prefix) and (prefix or not name.startswith("eval_"))
        )
        if not names:
            return {}
        totals = torch.stack([self._running.pop(name) for name in names])
        if gather and self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(dim=0)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        return dict(zip(names, means, strict=True))
