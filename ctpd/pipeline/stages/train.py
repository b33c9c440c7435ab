"""One training: supervised fine-tuning, a contrastive model, or a run of a method."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctpd.core.config import Config
from ctpd.core.roles import Role
from ctpd.pipeline.methods import Method
from ctpd.pipeline.references import Model
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.distributions import DistributionsStage
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.pipeline.stages.signals import SignalsStage
from ctpd.pipeline.stages.weights import WeightsStage
from ctpd.train.config import Schedule, Steps

if TYPE_CHECKING:
    from ctpd.objectives.base import Objective
    from ctpd.text.prepare import PreparedPairs
    from ctpd.train.collator import ScoredRows
    from ctpd.train.trainer import Training

CHAIN = "chain.json"


class TrainConfig(Config):
    """How a model is trained, except for the method."""

    role: Role
    """The model that is trained; its tokens are used."""
    schedule: Schedule
    """Epochs, pairs per step and the like."""
    learning_rate: float
    """The peak learning rate."""
    seed: int
    """Seed of the order of the pairs and of the initial values of adapters and of the objective's parameters."""
    precision: str
    """Number format of the computation: float32 or bfloat16 autocast."""
    swap: bool = False
    """Swap chosen and rejected responses (for the negative contrastive model)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainStage(Stage):
    """A trained model, or an adapter, with the history of its metrics.

    `reference` are log-probabilities of the model that `method`'s layout names; `teachers` are in memory while the
    student trains, unless `stored` holds what the objective needs of their distributions.
    """

    kind = "train"
    version = 2
    collective = True

    config: TrainConfig
    method: Method
    start: Model
    pairs: PairsStage
    reference: SignalsStage | None = None
    weights: WeightsStage | None = None
    teachers: tuple[Model, ...] = ()
    stored: tuple[DistributionsStage, ...] = ()

    def planned_steps(self) -> Steps | None:
        """The steps with the most pairs that there may be; None where a plan cannot tell, or there are none at all.

        Raises:
            UserError: a training of no step, or one that changes nothing.
        """
        most = self.pairs.most_pairs
        return None if not most else Steps.of(most, self.config.schedule)

    def build(self, work: Work) -> None:
        """Train and save."""
        from ctpd.pipeline.training import finish_training, fit_settings, resume_folder, save_trained
        from ctpd.train.fit import Optimization, fit
        from ctpd.train.trainer import save_objective

        config = self.config
        objective, model = self.method.objective(), self._load(work)
        training = self._training(work, objective, model)
        optimization = Optimization(
            schedule=config.schedule,
            learning_rate=config.learning_rate,
            seed=config.seed,
            precision=config.precision,
        )
        done = fit(training, optimization, folder=resume_folder(work), settings=fit_settings(work))
        save_trained(work, model)
        if work.writes:
            save_objective(objective, work.folder)
            self._save_tokenizer(work)
            finish_training(work, done)

    def _load(self, work: Work) -> Any:
        """The model that the training starts from, with new adapters where the schedule asks for them."""
        from ctpd.models import add_lora
        from ctpd.probes import configure_scorer

        lora = self.config.schedule.lora
        model = self.start.located(work).load(
            precision="float32" if lora is None else lora.base, device=work.runtime.torch_device()
        )
        if lora is not None:
            model = add_lora(model, r=lora.r, alpha=lora.alpha, targets=lora.targets, seed=self.config.seed)
        configure_scorer(model)
        return model

    def _training(self, work: Work, objective: "Objective", model: Any) -> "Training[Any]":
        """The rows of each split, the forward pass and constant metrics."""
        from ctpd.model_checks import check_tokens
        from ctpd.objectives.distillation import DistillationObjective
        from ctpd.pipeline.rows import token_rows
        from ctpd.train.sharing import share_prompts_where_quicker
        from ctpd.train.trainer import Training, UnitPass

        prepared, start = self.pairs.read(work), self.start.located(work)
        check_tokens(model, token_rows(prepared, self.config.role).input_ids, where=start.title)
        distills = isinstance(objective, DistillationObjective)
        shares = len(objective.sides) > 1 and not distills and share_prompts_where_quicker(model)
        rows = {
            split: dataclasses.replace(self._rows(work, prepared, split), shares_prompts=shares)
            for split in sorted(set(prepared.split))
        }
        if isinstance(objective, DistillationObjective):
            return self._distillation(work, prepared, objective, model, rows)
        return Training(
            model=model,
            objective=objective,
            rows=rows["train"],
            eval_rows=rows.get("eval"),
            forward_pass=UnitPass(objective),
            constants=self._clamped(work),
        )

    def _rows(self, work: Work, prepared: "PreparedPairs", split: str) -> "ScoredRows":
        from ctpd.pipeline.rows import Constants, scored_rows

        requires, reference = self.method.requires, None
        if self.reference is not None:
            reference = (self.reference.config.role, self.reference.logps(work))
        return scored_rows(
            prepared,
            role=self.config.role,
            layout=requires.layout,
            sides=requires.sides[::-1] if self.config.swap else requires.sides,
            split=split,
            constants=Constants(reference, None if self.weights is None else self.weights.values(work)),
        )

    def _distillation(
        self, work: Work, prepared: "PreparedPairs", objective: Any, model: Any, rows: "Mapping[str, ScoredRows]"
    ) -> "Training[Any]":
        from ctpd.pipeline.vocabularies import bind_objective, distill_rows, dropped_mass
        from ctpd.train.distillation import DistillPass
        from ctpd.train.trainer import Training

        facts = bind_objective(
            objective,
            student=self.start.located(work),
            teacher=self.teachers[0].located(work),
            seed=self.config.seed,
        )
        stored = [stage.arrays(work) for stage in self.stored]
        by_split = distill_rows(prepared, objective, rows, facts=facts, stored=stored)
        in_memory = []
        if not stored:
            device, precision = work.runtime.torch_device(), self.config.precision
            in_memory = [m.located(work).load_frozen(precision=precision, device=device) for m in self.teachers]
        for teacher in in_memory:
            teacher.requires_grad_(False)
        constants = {}
        if objective.teacher is not None and objective.teacher.top_k is not None:
            constants["teacher/dropped_mass"] = dropped_mass(prepared.teacher, stored[0], rows["train"].items)
        return Training(
            model=model,
            objective=objective,
            rows=by_split["train"],
            eval_rows=by_split.get("eval"),
            forward_pass=DistillPass(objective, in_memory),
            constants=constants,
        )

    def _clamped(self, work: Work) -> dict[str, float]:
        if self.weights is None:
            return {}
        summary = self.weights.summary(work)
        return {
            "weights/mean": summary.mean,
            "weights/clamped_low": summary.clamped_low,
            "weights/clamped_high": summary.clamped_high,
        }

    def _save_tokenizer(self, work: Work) -> None:
        """With whole weights, save the tokenizer; with an adapter, save references to its base model and tokenizer."""
        from ctpd.pipeline.references import MODEL_FOLDER
        from ctpd.saving import copy_processor, save_tokenizer

        if self.config.schedule.lora is None:
            located, folder = self.start.located(work), work.folder / MODEL_FOLDER
            save_tokenizer(located.load_tokenizer(), folder)
            copy_processor(located.tokenizer, revision=located.tokenizer_revision, to=folder)
        else:
            text = json.dumps(self.start.chain(), ensure_ascii=False)
            (work.folder / CHAIN).write_text(text, encoding="utf-8")
