"""Plan the stages of a recipe's `shared` block. Planning reads no model and computes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ctpd.core.errors import UserError
from ctpd.core.roles import ROLES, Role
from ctpd.core.userfiles import user_path
from ctpd.objectives.base import Generation, TeacherView
from ctpd.ops.weights import Signal
from ctpd.pipeline.methods import Method
from ctpd.pipeline.peeks import reading_of
from ctpd.pipeline.references import External, Model, external_model
from ctpd.pipeline.sources import file_digest, same_vocabulary
from ctpd.pipeline.stages.distributions import DistributionsConfig, DistributionsStage
from ctpd.pipeline.stages.generate import GenerateConfig, GeneratedPairs, GenerateStage
from ctpd.pipeline.stages.pairs import (
    FilePairs,
    HubPairs,
    ModelInput,
    PairSource,
    PairsStage,
    WorldPairs,
)
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.signals import SignalsConfig, SignalsStage
from ctpd.pipeline.stages.tokenizer import TokenizerConfig, TokenizerStage
from ctpd.pipeline.stages.train import TrainConfig, TrainStage
from ctpd.pipeline.stages.weights import WeightsConfig, WeightsStage, needed_signals
from ctpd.pipeline.stages.world import WorldStage
from ctpd.recipe import ContrastivePhase, ModelSpec, Shared
from ctpd.recipe import Source as SourceSpec
from ctpd.text.config import PairsConfig
from ctpd.train.config import Schedule


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training to plan: everything except the model that it starts from."""

    method: Method
    schedule: Schedule
    learning_rate: float
    seed: int
    label: str
    swap: bool = False


class SharedStages:
    """The stages that all runs of a recipe share, planned on first use, and the training stage of a run.

    Args:
        shared: the recipe's block.
        source: the recipe, for errors.
    """

    def __init__(self, shared: Shared, *, source: str) -> None:
        self.shared, self.source = shared, source
        self._signals: dict[tuple[Model, Role], SignalsStage] = {}
        self._frozen: dict[Signal, Model] = {}

    @cached_property
    def world(self) -> WorldStage:
        """The testbed's files."""
        assert self.shared.testbed is not None
        return WorldStage(label="testbed world", config=self.shared.testbed)

    @cached_property
    def bases(self) -> dict[Role, Model]:
        """Teacher and student before fine-tuning; testbed models have a pretraining stage."""
        return {role: self._base(role) for role in ROLES}

    def spec(self, role: Role) -> ModelSpec:
        """The recipe's block of the teacher or the student."""
        return self.shared.teacher if role == "teacher" else self.shared.student

    def _base(self, role: Role) -> Model:
        spec = self.spec(role)
        if spec.pretrain is None:
            assert spec.model is not None
            given = external_model(spec.model, revision=spec.revision, role=role)
            return Model(given, given)
        config = spec.pretrain
        vocabulary = TokenizerConfig(
            corpus=config.tokenizer_corpus or config.corpus, tokenizer=config.tokenizer, vocab_size=config.vocab_size
        )
        tokenizer = TokenizerStage(label=f"{role}: tokenizer", config=vocabulary, world=self.world)
        root = PretrainStage(label=f"{role}: pretraining", config=config, world=self.world, tokenizer=tokenizer)
        return Model(root, tokenizer)

    @cached_property
    def pair_sources(self) -> dict[str, PairSource]:
        """Where the pairs of each split come from."""
        data = self.shared.data
        given = {"train": data.train} | ({} if data.eval is None else {"eval": data.eval})
        return {split: self._pair_source(source) for split, source in given.items()}

    def _pair_source(self, source: SourceSpec) -> PairSource:
        if source.testbed is not None:
            return WorldPairs(self.world, source.testbed)
        if source.hub is not None:
            assert source.split is not None
            assert source.revision is not None
            return HubPairs(source.hub, source.name, source.split, source.revision, source.layout, source.ignore)
        assert source.path is not None
        path, encoding = user_path(source.path), source.encoding
        digest = file_digest(path, encoding=encoding)
        reading = reading_of(path, source.layout, encoding=encoding, ignored=source.ignore)
        return FilePairs(source.path, digest, encoding, source.layout, reading)

    @cached_property
    def pairs(self) -> PairsStage:
        """The pairs, tokenized by both models and aligned, for all methods."""
        return self._pairs(self.pair_sources, label="pairs: tokenize and align")

    def generated_pairs(self, generation: Generation) -> PairsStage:
        """The pairs with one side generated by a model, prepared like the pairs of the data."""
        generated = GenerateStage(
            label=f"{generation.role} responses as {generation.side}",
            config=GenerateConfig(**dict(generation), precision=self.shared.precision),
            pairs=self.pairs,
            train=self.pair_sources["train"],
            eval=self.pair_sources.get("eval"),
            model=self.sft[generation.role],
        )
        sources = {split: GeneratedPairs(generated, split) for split in self.pair_sources}
        return self._pairs(sources, label=f"pairs: {generation.side} responses of the {generation.role}")

    def _pairs(self, sources: Mapping[str, PairSource], *, label: str) -> PairsStage:
        return PairsStage(
            label=label,
            config=PairsConfig.of(self.shared.data),
            train=sources["train"],
            eval=sources.get("eval"),
            teacher=self._input("teacher"),
            student=self._input("student"),
        )

    def _input(self, role: Role) -> ModelInput:
        spec = self.spec(role)
        return ModelInput(
            self.bases[role].tokenizer, spec.template, spec.template_variables, spec.end_token, spec.system
        )

    @cached_property
    def sft(self) -> dict[Role, Model]:
        """Teacher and student after supervised fine-tuning: the references, and the student every run starts from."""
        return {role: self._sft(role) for role in ROLES}

    def _sft(self, role: Role) -> Model:
        base, phase = self.bases[role], self.spec(role).sft
        if phase == "skip":
            return base
        if isinstance(phase, str):
            return base.replaced(external_model(phase, revision=None, role=f"{role}'s SFT"))
        training = Training(
            method=Method.make("sft", {}, source=self.source),
            schedule=phase,
            learning_rate=phase.learning_rate,
            seed=phase.seed,
            label=f"{role}: SFT",
            swap=self.spec(role).reversed,
        )
        return self.trained(role, base, training)

    def contrastive(self, signal: Signal) -> Model:
        """The model trained with DPO on the pairs (`positive`) or on the swapped pairs (`negative`) (docs/method.md#contrastive-models)."""
        role = signal.role
        spec = self.spec(role)
        phase: ContrastivePhase | str | None = spec.positive if signal.phase == "positive" else spec.negative
        where = f"shared.{role}.{signal.phase}"
        if phase is None:
            raise UserError(
                f"a run needs the {role}'s {signal.phase} contrastive model, and '{where}' is missing",
                where=self.source,
                fix="Add its training, or the path of a ready-made model or adapter",
            )
        if isinstance(phase, str):
            return self.sft[role].replaced(external_model(phase, revision=None, role=f"{role} ({signal.phase})"))
        training = Training(
            method=Method.make("dpo", {"beta": phase.beta}, source=f"{self.source}, {where}"),
            schedule=phase,
            learning_rate=phase.learning_rate,
            seed=phase.seed,
            label=f"{role}: contrastive {signal.phase}",
            swap=(signal.phase == "negative") != spec.reversed,
        )
        return self.trained(role, self.sft[role], training)

    def frozen_model(self, signal: Signal) -> Model:
        """The model that a signal is read from."""
        if signal not in self._frozen:
            is_reference = signal.phase == "reference"
            self._frozen[signal] = self.sft[signal.role] if is_reference else self.contrastive(signal)
        return self._frozen[signal]

    def signals(self, role: Role, model: Model, *, title: str) -> SignalsStage:
        """Per-token log-probabilities of one frozen model on its own tokens of all pairs."""
        known = (model, role)
        if known not in self._signals:
            config = SignalsConfig(role=role, precision=self.shared.precision)
            self._signals[known] = SignalsStage(label=f"signals: {title}", config=config, pairs=self.pairs, model=model)
        return self._signals[known]

    def named_signals(self, signal: Signal) -> SignalsStage:
        """The stored log-probabilities of a signal that a weight strategy needs."""
        return self.signals(signal.role, self.frozen_model(signal), title=signal.long_name)

    def weights(self, method: Method, *, seed: int, label: str) -> WeightsStage | None:
        """The importance weights of a method's units, or None if it uses none."""
        layout = method.requires.layout
        if layout.weighting is None:
            return None
        config = WeightsConfig(
            weighting=layout.weighting, granularity=layout.granularity, aggregate=layout.aggregate, seed=seed
        )
        return WeightsStage(
            label=f"importance weights: {label}",
            config=config,
            pairs=self.pairs,
            signals={signal: self.named_signals(signal) for signal in needed_signals(layout.weighting)},
        )

    def trained(self, role: Role, start: Model, training: Training) -> Model:
        """``start`` after a training."""
        return start.trained(self.training(role, start, training), adapter=training.schedule.lora is not None)

    def training(self, role: Role, start: Model, training: Training) -> TrainStage:
        """The training stage; SFT, contrastive models and runs all use it."""
        method, requires = training.method, training.method.requires
        layout, generation = requires.layout, requires.generation
        own_pairs = layout.reference is None and layout.weighting is None
        assert generation is None or own_pairs, "signals and weights exist only for the pairs of the data"
        pairs = self.pairs if generation is None else self.generated_pairs(generation)
        reference = None
        if layout.reference is not None:
            reference_role = "teacher" if layout.reference == "teacher" else role
            reference = self.signals(reference_role, self.sft[reference_role], title=f"{reference_role} SFT")
        view = requires.teacher
        return TrainStage(
            label=training.label,
            config=TrainConfig(
                role=role,
                schedule=Schedule.of(training.schedule),
                learning_rate=training.learning_rate,
                seed=training.seed,
                precision=self.shared.precision,
                swap=training.swap,
            ),
            method=method,
            start=start,
            pairs=pairs,
            reference=reference,
            weights=self.weights(method, seed=training.seed, label=training.label),
            teachers=() if view is None else self._teachers(method, view),
            stored=() if view is None or not view.is_stored else self._distributions(view, pairs),
        )

    def _teachers(self, method: Method, view: TeacherView) -> tuple[Model, ...]:
        if view.same_tokenizer:
            self._refuse_two_tokenizers(method)
        return tuple(self.frozen_model(signal) for signal in view.models)

    def _distributions(self, view: TeacherView, pairs: PairsStage) -> tuple[DistributionsStage, ...]:
        kept: dict[str, Any] = {"top_k": view.top_k, "temperature": view.temperature}
        if view.boundary:
            kept = {"boundary": True}
        return tuple(
            DistributionsStage(
                label=f"distributions: {signal.long_name}",
                config=DistributionsConfig(role=signal.role, precision=self.shared.precision, **kept),
                pairs=pairs,
                model=self.frozen_model(signal),
            )
            for signal in view.models
        )

    def _refuse_two_tokenizers(self, method: Method) -> None:
        teacher, student = (self.bases[role].tokenizer for role in ROLES)
        if isinstance(teacher, External) and isinstance(student, External):
            differ = same_vocabulary(teacher, student) is False
        else:
            differ = type(teacher) is type(student) and teacher.key != student.key  # type: ignore[union-attr]
        if differ:
            raise UserError(
                f"the method '{method.name}' compares distributions token by token, and teacher and student have "
                "different tokenizers",
                where=self.source,
                fix="Leave the run out, or give both models one tokenizer",
            )
