"""From a recipe's `shared` block to stages: one small function a stage. Planning reads no model and computes nothing."""

import dataclasses
import importlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ctpd.core.config import to_plain
from ctpd.core.errors import UserError
from ctpd.objectives.base import Generation, Objective, TeacherView
from ctpd.ops.weights import Signal, find_strategy
from ctpd.pipeline.graph import Builder, Stage, Work
from ctpd.pipeline.methods import METHODS, make_objective
from ctpd.pipeline.references import External, ModelRef, Source, external_model
from ctpd.pipeline.sources import file_digest
from ctpd.recipe import ContrastivePhase, ModelSpec, Shared
from ctpd.recipe import Source as PairSource
from ctpd.train.config import Schedule

ROLES = ("teacher", "student")


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective with everything that makes it an identity."""

    name: str
    params: Mapping[str, Any]
    objective: Objective

    @classmethod
    def make(cls, name: str, params: Mapping[str, Any], *, source: str) -> "Method":
        """Look the method up and fill in its defaults."""
        objective = make_objective(name, params, source=source)
        return cls(name, to_plain(objective.params), objective)

    @property
    def identity(self) -> dict[str, Any]:
        """The class and every parameter, defaults included."""
        return {"objective": METHODS[self.name], "params": dict(self.params)}


class SharedStages:
    """The stages that all runs of a recipe share, made on first use; and the training of one run."""

    def __init__(self, shared: Shared, *, source: str) -> None:
        self.shared, self.source = shared, source

    @cached_property
    def world(self) -> Stage:
        """The testbed's files."""
        world = self.shared.testbed
        assert world is not None
        return Stage("world", 1, world, _builder("world", config=world), "testbed world")

    @cached_property
    def bases(self) -> dict[str, ModelRef]:
        """The models before any training of ours, testbed models excepted, which are pretrained here."""
        return {role: self._base(role, self.spec(role)) for role in ROLES}

    def spec(self, role: str) -> ModelSpec:
        """The recipe's block of the teacher or the student."""
        return self.shared.teacher if role == "teacher" else self.shared.student

    def _base(self, role: str, spec: ModelSpec) -> ModelRef:
        if spec.pretrain is None:
            assert spec.model is not None
            given = external_model(spec.model, revision=spec.revision, role=role)
            return ModelRef(role, given, given)
        pretrain = spec.pretrain
        corpus = pretrain.tokenizer_corpus or pretrain.corpus
        vocabulary = {"corpus": corpus, "kind": pretrain.tokenizer, "vocab_size": pretrain.vocab_size}
        tokenizer = Stage(
            "tokenizer", 1, vocabulary, _builder("tokenizer", **vocabulary), f"{role}: tokenizer", {"world": self.world}
        )
        root = Stage(
            "pretrain", 2, pretrain, _builder("pretrain", config=pretrain), f"{role}: pretraining",
            {"world": self.world, "tokenizer": tokenizer}, together=True,
        )  # fmt: skip
        return ModelRef(role, root, tokenizer)

    @cached_property
    def pairs(self) -> Stage:
        """The pairs, tokenized by both models and aligned: one data step for every method."""
        return self._prepared(*self._data(), label="pairs: tokenize and align", config={})

    def generated_pairs(self, generation: Generation) -> Stage:
        """The pairs with one side written by a model, prepared like the data's own."""
        writer = self.sft[generation.writer]
        inputs, external = self._data()
        written = Stage(
            "generate", 2, {"generation": generation, "precision": self.shared.precision},
            _builder("generate", model=writer, generation=generation, data=self.shared.data,
                     precision=self.shared.precision),
            f"{generation.writer} responses as {generation.side}",
            {"pairs": self.pairs, **inputs, **writer.stages("model")}, {**external, **writer.externals("model")},
        )  # fmt: skip
        label = f"pairs: {generation.side} responses of the {generation.writer}"
        return self._prepared({"generated": written}, {}, label=label, config={"generation": generation})

    def _data(self) -> tuple[dict[str, Stage], dict[str, str]]:
        """What the pairs are read from: stages, and digests of files."""
        inputs: dict[str, Stage] = {}
        external: dict[str, str] = {}
        for split, source in (("train", self.shared.data.train), ("eval", self.shared.data.eval)):
            if source is None:
                continue
            if source.testbed is not None:
                inputs["world"] = self.world
            else:
                external[f"data.{split}"] = _data_digest(source)
        return inputs, external

    def _prepared(
        self, sources: Mapping[str, Stage], digests: Mapping[str, str], *, label: str, config: Mapping[str, Any]
    ) -> Stage:
        data, inputs, external = self.shared.data, dict(sources), dict(digests)
        tokenizers = {role: base.tokenizer for role, base in self.bases.items()}
        inputs |= {f"{role}.tokenizer": t for role, t in tokenizers.items() if isinstance(t, Stage)}
        external |= {
            f"{role}.tokenizer": _tokenizer_digest(t) for role, t in tokenizers.items() if isinstance(t, External)
        }
        templates = {
            role: {"template": self.spec(role).template, "variables": self.spec(role).template_variables}
            for role in ROLES
        }
        splits = {"train": data.train, "eval": data.eval}
        config = {
            **config,
            "lengths": [data.max_tokens, data.max_prompt_tokens, data.long_prompt],
            "max_dropped": data.max_dropped,
            "select": [data.select, data.limit],
            "testbed": {split: s.testbed for split, s in splits.items() if s is not None},
            "templates": templates,
        }
        locations = {role: t.location for role, t in tokenizers.items() if isinstance(t, External)}
        build = _builder("pairs", data=data, models={role: self.spec(role) for role in ROLES}, tokenizers=locations)
        return Stage("pairs", 1, config, build, label, inputs, external)

    @cached_property
    def sft(self) -> dict[str, ModelRef]:
        """Teacher and student after supervised fine-tuning: the references, and the student every run starts from."""
        return {role: self._sft(role) for role in ROLES}

    def _sft(self, role: str) -> ModelRef:
        base, phase = self.bases[role], self.spec(role).sft
        if isinstance(phase, str):
            return (
                base if phase == "skip" else base.replaced(external_model(phase, revision=None, role=f"{role}'s SFT"))
            )
        method = Method.make("sft", {}, source=self.source)
        return self.train(base, method, phase, learning_rate=phase.learning_rate, seed=phase.seed, label=f"{role}: SFT")

    def contrastive(self, role: str, sign: str) -> ModelRef:
        """The model trained with DPO on the pairs (`positive`) or on the swapped pairs (`negative`) (METHOD 4)."""
        phase: ContrastivePhase | str | None = getattr(self.spec(role), sign)
        where = f"shared.{role}.{sign}"
        if phase is None:
            raise UserError(
                f"a run needs the {role}'s {sign} contrastive model, and '{where}' is missing",
                where=self.source,
                fix="Add its training, or the path of a ready-made model or adapter",
            )
        if isinstance(phase, str):
            return self.sft[role].replaced(external_model(phase, revision=None, role=f"{role} ({sign})"))
        method = Method.make("dpo", {"beta": phase.beta}, source=f"{self.source}, {where}")
        return self.train(
            self.sft[role], method, phase, learning_rate=phase.learning_rate, seed=phase.seed,
            label=f"{role}: contrastive {sign}", swap=sign == "negative",
        )  # fmt: skip

    def signal(self, model: ModelRef, label: str) -> Stage:
        """Per-token log-probabilities of one frozen model on its own tokens of all pairs."""
        config = {"role": model.role, "precision": self.shared.precision}
        return Stage(
            "signals", 2, config, _builder("signals", model=model, precision=self.shared.precision),
            f"signals: {label}",
            {"pairs": self.pairs, **model.stages("model")}, model.externals("model"), together=True,
        )  # fmt: skip

    def named_signal(self, signal: Signal) -> Stage:
        """The signal that a weight strategy asks for by name."""
        role, _, kind = signal.value.partition("_")
        return self.signal(self._model(signal), f"{role} {'SFT' if kind == 'reference' else kind}")

    def teachers(self, method: Method, pairs: Stage) -> tuple[list[ModelRef], dict[str, Stage], dict[str, str]]:
        """The teachers of an objective over distributions, with the inputs and externals of its training.

        Raises:
            UserError: it compares token by token, and the recipe gives the models two tokenizers.
        """
        view = method.objective.teacher
        if view is None:
            return [], {}, {}
        if view.same_tokenizer:
            self._refuse_two_tokenizers(method)
        models = [self._model(signal) for signal in view.models]
        inputs: dict[str, Stage] = {}
        external: dict[str, str] = {}
        for number, model in enumerate(models):
            inputs |= model.stages(f"teacher{number}")
            external |= model.externals(f"teacher{number}")
            if view.is_stored:
                inputs[f"stored{number}"] = self._distributions(model, view, pairs, view.models[number])
        return models, inputs, external

    def _model(self, signal: Signal) -> ModelRef:
        role, _, kind = signal.value.partition("_")
        return self.sft[role] if kind == "reference" else self.contrastive(role, kind)

    def _distributions(self, model: ModelRef, view: TeacherView, pairs: Stage, signal: Signal) -> Stage:
        kept = {"boundary": True} if view.boundary else {"top_k": view.top_k, "temperature": view.temperature}
        config = {"role": model.role, "precision": self.shared.precision, **kept}
        return Stage(
            "distributions", 2, config,
            _builder("distributions", model=model, view=view, precision=self.shared.precision),
            f"distributions: {signal.value.replace('_', ' ')}",
            {"pairs": pairs, **model.stages("model")}, model.externals("model"), together=True,
        )  # fmt: skip

    def _refuse_uneven_steps(self, method: Method, schedule: Schedule) -> None:
        fixed = method.objective.micro_batch
        if fixed is not None and schedule.pairs_per_step % fixed:
            raise UserError(
                f"the method '{method.name}' has micro-batches of {fixed}, and a step of {schedule.pairs_per_step} pairs cannot be "
                "cut into them",
                where=self.source,
                fix="Make `pairs_per_step` a multiple of the method's `micro_batch`, or change that",
            )

    def _refuse_two_tokenizers(self, method: Method) -> None:
        teacher, student = (self.bases[role].tokenizer for role in ROLES)
        if isinstance(teacher, Stage) and isinstance(student, Stage) and teacher.key != student.key:
            raise UserError(
                f"the method '{method.name}' compares distributions token by token, and teacher and student have "
                "different tokenizers",
                where=self.source,
                fix="Leave the run out, or give both models one tokenizer",
            )

    def weights(self, method: Method, *, seed: int, label: str) -> Stage | None:
        """The importance weights of a method's units, or None where it has none."""
        layout = method.objective.layout
        if layout.weighting is None:
            return None
        needs = sorted(find_strategy(layout.weighting.strategy).needs - {Signal.MARKS})
        config = {
            "weighting": layout.weighting,
            "granularity": layout.granularity,
            "aggregate": layout.aggregate,
            "seed": seed,
        }
        inputs = {"pairs": self.pairs, **{need.value: self.named_signal(need) for need in needs}}
        return Stage(
            "weights", 1, config, _builder("weights", layout=layout, seed=seed), f"importance weights: {label}", inputs
        )

    def train(
        self,
        start: ModelRef,
        method: Method,
        schedule: Schedule,
        *,
        learning_rate: float,
        seed: int,
        label: str,
        swap: bool = False,
    ) -> ModelRef:
        """Train ``start`` with a method: the same stage for SFT, contrastive models and every run."""
        stage = self.training(start, method, schedule, learning_rate=learning_rate, seed=seed, label=label, swap=swap)
        return start.trained(stage, adapter=schedule.lora is not None)

    def training(
        self,
        start: ModelRef,
        method: Method,
        schedule: Schedule,
        *,
        learning_rate: float,
        seed: int,
        label: str,
        swap: bool = False,
    ) -> Stage:
        """The stage of `train`."""
        layout, generation = method.objective.layout, method.objective.generation
        own_pairs = layout.reference is None and layout.weighting is None
        assert generation is None or own_pairs, "signals and weights are those of the data's own pairs"
        self._refuse_uneven_steps(method, schedule)
        pairs = self.pairs if generation is None else self.generated_pairs(generation)
        teachers, teacher_inputs, teacher_externals = self.teachers(method, pairs)
        inputs = {"pairs": pairs, **start.stages("start"), **teacher_inputs}
        if layout.reference is not None:
            anchor = "teacher" if layout.reference == "teacher" else start.role
            inputs["reference"] = self.signal(self.sft[anchor], f"{anchor} SFT")
        weights = self.weights(method, seed=seed, label=label)
        if weights is not None:
            inputs["weights"] = weights
        config = {
            **method.identity,
            "role": start.role,
            "swap": swap,
            "schedule": Schedule.of(schedule),
            "learning_rate": learning_rate,
            "seed": seed,
            "precision": self.shared.precision,
        }
        build = _builder(
            "train", start=start, teachers=teachers, objective=method.objective, schedule=Schedule.of(schedule),
            learning_rate=learning_rate, seed=seed, precision=self.shared.precision, swap=swap,
        )  # fmt: skip
        external = {**start.externals("start"), **teacher_externals}
        return Stage("train", 2, config, build, label, inputs, external, together=True)


def _builder(name: str, **arguments: Any) -> Builder:
    """The function of `ctpd.pipeline.builders` with these arguments; the module is imported when it is called."""

    def build(work: Work) -> None:
        builders = importlib.import_module("ctpd.pipeline.builders")
        getattr(builders, name)(work, **arguments)

    return build


def _data_digest(source: PairSource) -> str:
    if source.hub is not None:
        return f"hub:{source.hub}/{source.name}/{source.split}@{source.revision}"
    assert source.path is not None
    return file_digest(Path(source.path).expanduser())


def _tokenizer_digest(tokenizer: Source) -> str:
    assert isinstance(tokenizer, External)
    return tokenizer.digest
