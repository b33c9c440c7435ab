"""The one Trainer: a thin subclass of `transformers.Trainer`.

The library brings the loop, resume, distribution, PEFT, mixed precision and loggers. What is ours: the order of the
items, the forward pass through the scorer, the objective, and *sums, then one division*: the loss of a step is the
objective's sum over all micro-batches and processes divided by the step's count of its unit, once.

Shape legend: R rows of a batch, T tokens, U units, N scored tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ctpd.models import Score, score
from ctpd.objectives.base import Objective, Sums, Units
from ctpd.ops.spans import unit_logps
from ctpd.train.collator import Batch, Items, StepLoader, StepSampler, shared_rows

OBJECTIVE = "ctpd_objective"  # the name under which an objective with parameters is a part of the model
OBJECTIVE_FILE = "objective.safetensors"


ForwardPass = Callable[[nn.Module, Batch], Sums]


class Rows(Protocol):
    """What the Trainer asks of its training items; see `ScoredRows`."""

    @property
    def item_lengths(self) -> NDArray[np.int64]:
        """Tokens of each item's longest row."""
        ...

    @property
    def items(self) -> NDArray[np.int64]:
        """The rows of each item."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether rows of an item may share a sequence."""
        ...

    def __len__(self) -> int: ...

    def collate(self, items: list[int]) -> Batch:
        """A batch of these items."""
        ...

    def check(self) -> None:
        """Refuse rows that cannot be scored."""
        ...


class PairPass:
    """The forward pass of an objective of the log-probabilities of units."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        """One micro-batch."""
        unit_RT, mask_RU = batch["unit"], batch["mask"]
        request = Score(batch["predictors"], batch["targets"])
        logps_N = score(model, batch["input_ids"], request, shared=shared_rows(batch))
        logps_RT = logps_N.new_zeros(unit_RT.shape).masked_scatter(unit_RT >= 0, logps_N)
        aggregate = self._objective.layout.aggregate
        policy_RU = unit_logps(logps_RT, unit_RT, num_units=mask_RU.shape[1], aggregate=aggregate)
        units = Units(policy=policy_RU, mask=mask_RU, reference=batch.get("reference"), weights=batch.get("weights"))
        sums: Sums = self._objective(units)
        return sums


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
    """Trains a model on scored rows with an objective.

    Args:
        model: a model with the scorer installed (`ctpd.models.load_model`), or a PEFT model around one.
        objective: what is trained for. Its own parameters, if any, become a part of the model for the training's time.
        rows: the training items.
        args: `per_device_train_batch_size` is the micro-batch, in items; micro-batches times processes times
            accumulation is the step.
        eval_rows: items for evaluation during the training.
        constants: metrics that do not change (shares of clamped weights), logged with the others.
        forward_pass: from the model and a batch to the objective's sums; None for log-probabilities of units.
        callbacks: as in the library.
    """

    loss_is_scaled_for_ga = True
    _has_own_group = False

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        rows: Rows,
        *,
        args: TrainingArguments,
        eval_rows: Rows | None = None,
        constants: Mapping[str, float] | None = None,
        forward_pass: ForwardPass | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        rows.check()
        self.objective, self.rows, self.eval_rows = objective, rows, eval_rows
        self._constants = dict(constants or {})
        self._running: dict[str, tuple[Tensor, float]] = {}  # name -> (sum, on the device; count)
        self._sums = forward_pass if forward_pass is not None else PairPass(objective)
        if any(True for _ in objective.parameters()):
            model.add_module(OBJECTIVE, objective)
        super().__init__(model=model, args=args, train_dataset=Items(len(rows)), callbacks=callbacks)
        objective.to(self.args.device)
        if self.is_fsdp_enabled and self.args.bf16:
            # accelerate puts this around every other model's forward. Without the cache: it would keep all weights.
            autocast = torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False)
            model.forward = autocast(model.forward)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's, with the objective's parameters in a group of their own where they have a step size."""
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """With the objective's parameters, which an adapter's checkpoint would leave out."""
        if (
            self.args.should_save
        ):  # first: what the library writes last makes the state complete, and it drops the older one
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_objective(self.objective, folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_objective(self.objective, Path(resume_from_checkpoint))

    def get_train_dataloader(self) -> StepLoader:
        """Micro-batches in the order of (seed, epoch), dealt to this process."""
        args = self.args
        sampler = StepSampler(
            self.rows.item_lengths,
            per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            micro_batch=args.per_device_train_batch_size,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return StepLoader(Items(len(self.rows)), batch_sampler=sampler, collate_fn=self.rows.collate)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of a step, and the step's count of the objective's unit over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        told = torch.tensor(sum(self._count(batch) for batch in batches))
        count = (told.pin_memory() if self.args.dataloader_pin_memory else told).to(device, non_blocking=True)
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _prepare_input(self, data: Any) -> Any:
        """Without waiting for the device: a batch lies in pinned memory where there is a GPU."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

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
        """The objective's loss and metrics over `eval_rows`, shared by the processes, logged with the prefix `eval_`."""
        if self.eval_rows is None:
            return {}
        self.model.eval()
        size, world_size, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        order = torch.from_numpy(self.eval_rows.item_lengths).argsort(descending=True, stable=True).tolist()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in range(0, len(order), size * world_size):
                own = order[first + rank * size : first + (rank + 1) * size]
                # One with nothing left takes part all the same: weights may lie in all processes. It adds nothing.
                batch = self._prepare_inputs(self.eval_rows.collate(own or order[:size]))
                sums = self._sums(self.model, batch)
                counts = bool(own)
                self._accumulate(f"{metric_key_prefix}_", sums, batch, counts=counts)
                self._add(f"{metric_key_prefix}_loss", sums.loss, float(sums.count), counts=counts)
        self.model.train()
        metrics = self._drain(f"{metric_key_prefix}_")
        self.log(metrics)
        # Without it the request stands until the next step, and the library evaluates again where an epoch ends.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last call; the only place where the device is waited for."""
        if "loss" in logs:
            logs |= self._drain("") | self._constants
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: the library's estimate assumes a head over every position."""
        return 0

    def _count(self, batch: Batch) -> int:
        num_pairs = len(batch["unit"]) // len(self.objective.sides)
        unit_RT = batch["unit"][:num_pairs]
        counts = {
            "pairs": lambda: num_pairs,
            "tokens": lambda: int((unit_RT >= 0).sum()),
            "units": lambda: int((unit_RT.amax(1) + 1).sum()),
        }
        return counts[self.objective.counts]()

    def _accumulate(self, prefix: str, sums: Sums, batch: Batch, *, counts: bool = True) -> None:
        num_items = len(batch["unit"]) // len(self.objective.sides)
        for name, value in sums.metrics.items():
            self._add(f"{prefix}{name}", value, num_items, counts=counts)

    def _add(self, name: str, value: Tensor, count: float, *, counts: bool) -> None:
        """Add without waiting for the device; with ``counts`` off, only make the name known."""
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
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(dim=0)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        return dict(zip(names, means, strict=True))
