"""Checks of the ready-made models of a graph before its first stage: what a stage will do with them, tried without weights."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctpd.core.errors import UserError
from ctpd.pipeline.references import External, Model, Source
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.evaluate import EvaluateStage, Protocol
from ctpd.pipeline.stages.pairs import ModelInput, PairsStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.recipe import PlainSpec

if TYPE_CHECKING:
    from ctpd.checkpoints import Skeleton


@dataclass(frozen=True)
class _Use:
    """What a stage does with a model.

    Attributes:
        model: the model.
        prompt: how its texts are written; None for tasks of lm-eval.
        max_tokens: of the longest row; None for those tasks, whose requests are cut.
        training: the stage that trains it; None where it is frozen.
        tasks: how tasks are rendered with its chat template; None where they are not, or there are none.
    """

    model: Model
    prompt: ModelInput | None
    max_tokens: int | None
    training: TrainStage | None = None
    tasks: Protocol | None = None


def check_models(stages: Sequence[Stage], *, local: bool) -> list[str]:
    """Try on each ready-made model what the stages will do with it.

    Args:
        stages: those that are missing.
        local: read of the hub only what its cache holds.

    Returns:
        What a user should know: which part of a multimodal model is trained, rows longer than a model's positions,
        weights that a model does not use.

    Raises:
        UserError: something will not work; what, where and how to mend it.
    """
    found = find_problems(stages, Skeletons(local))
    if found.problems:
        raise found.problems[0][1]
    return found.notes


class Found(NamedTuple):
    """What checks of ready-made models say.

    Attributes:
        problems: the label of a stage, and what will not work in it.
        notes: what a user should know.
    """

    problems: list[tuple[str, UserError]]
    notes: list[str]


def find_problems(stages: Sequence[Stage], skeletons: "Skeletons") -> Found:
    """As `check_models`, with every problem instead of the first one.

    Args:
        stages: those whose models are tried.
        skeletons: the models without weights, as far as they are known.
    """
    problems: list[tuple[str, UserError]] = []
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stage in stages:
            for use in _uses(stage):
                try:
                    notes += _check(use, skeletons)
                except UserError as error:
                    problems.append((stage.label, error))
    notes += [str(w.message) for w in caught if w.category is UserWarning]
    return Found(problems, list(dict.fromkeys(notes)))


class Skeletons:
    """The models without weights, each made once.

    Args:
        local: read of the hub only what its cache holds.
        needs_weights: refuse a directory that holds configuration and tokenizer alone.
    """

    def __init__(self, local: bool, *, needs_weights: bool = True) -> None:
        self.local, self._needs_weights = local, needs_weights
        self._known: dict[External, Skeleton | UserError | None] = {}
        self._seen: set[Any] = set()

    def of(self, source: External) -> "Skeleton | None":
        """The model of a directory or hub id; None where its files are not at hand.

        Raises:
            UserError: there is no such model, or weights of it are missing.
        """
        if source not in self._known:
            try:
                self._known[source] = self._load(source)
            except UserError as error:
                self._known[source] = error
        found = self._known[source]
        if isinstance(found, UserError):
            raise found
        return found

    def _load(self, source: External) -> "Skeleton | None":
        from ctpd.checkpoints import check_weights, load_skeleton

        found = load_skeleton(
            source.location, revision=source.revision, local=self.local, needs_weights=self._needs_weights
        )
        if found is not None and found.found is not None:
            check_weights(found.found, where=source.location)
        return found

    def first_time(self, *what: Any) -> bool:
        """Whether this is asked for the first time."""
        new = what not in self._seen
        self._seen.add(what)
        return new


def _uses(stage: Stage) -> Iterator[_Use]:
    if isinstance(stage, EvaluateStage):
        if stage.protocol.backend == "hf":
            yield _Use(stage.model, None, None, tasks=stage.protocol if stage.protocol.chat_template else None)
        return
    pairs = getattr(stage, "pairs", None)
    if not isinstance(pairs, PairsStage):
        return
    role: Any = getattr(getattr(stage, "config", None), "role", None)
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        for model in value if isinstance(value, tuple) else (value,):
            if isinstance(model, Model):
                prompt = pairs.teacher if field.name == "teachers" or role == "teacher" else pairs.student
                trains = stage if isinstance(stage, TrainStage) and field.name == "start" else None
                yield _Use(model, prompt, pairs.config.max_tokens, trains)


def _check(use: _Use, skeletons: Skeletons) -> Iterator[str]:
    base = origin(use.model.root)
    skeleton = None if base is None else skeletons.of(base)
    if base is None or skeleton is None:
        return
    from ctpd.model_checks import check_length, check_ready_adapter, check_training  # imports torch and peft

    where = base.location
    for adapter in use.model.adapters:
        if isinstance(adapter, External) and skeletons.first_time(base, adapter):
            check_ready_adapter(skeleton, Path(adapter.location))
    _check_tokenizer(use, base, skeletons)
    if use.max_tokens is not None and (note := check_length(skeleton, use.max_tokens, where=where)):
        yield note
    if use.training is not None:
        lora = use.training.config.schedule.lora
        if skeletons.first_time(base, lora) and (note := check_training(skeleton, lora, where=where)):
            yield note


def _check_tokenizer(use: _Use, base: External, skeletons: Skeletons) -> None:
    from ctpd.model_checks import check_tokenizer

    tokenizer, skeleton = use.model.tokenizer, skeletons.of(base)
    template = None if use.prompt is None else use.prompt.template
    chat = use.tasks is not None or template == "chat"
    how = [
        None if use.prompt is None else (use.prompt.variables, use.prompt.end_token, use.prompt.system),
        None if use.tasks is None else (use.tasks.template_variables, use.tasks.think_end_token),
    ]
    if not isinstance(tokenizer, External) or not skeletons.first_time(base, tokenizer, template, repr(how)):
        return
    found = _tokenizer(tokenizer, local=skeletons.local)
    if found is None or skeleton is None:
        return
    texts = [str(found.chat_template)] if chat else []
    if isinstance(template, PlainSpec):
        texts = [template.user, template.assistant, template.system]
    check_tokenizer(skeleton, found, where=base.location, templates=texts)
    _check_template(use, found, where=tokenizer.location)


def _check_template(use: _Use, tokenizer: Any, *, where: str) -> None:
    """Refuse a template that is not there, is none, or loses what the user says, for pairs and for tasks."""
    if use.prompt is not None:
        from ctpd.text.pairs import Message
        from ctpd.text.templates import QUESTION

        side = use.prompt.templated(tokenizer, folder=where, role="model")
        (refused,) = side.refused([(Message("user", QUESTION),)], where=[where])
        if refused is not None and refused.reason == "lost_text":  # any other may be due to this conversation
            raise UserError(refused.why, fix="Give a template of texts alone")
    if use.tasks is not None:
        from harness.prompts import Documents, check_template  # imports lm-eval

        documents = Documents(None, chat_template=True, template_variables=use.tasks.template_variables or {})
        try:
            check_template(tokenizer, documents._replace(think_end_token=use.tasks.think_end_token))
        except UserError as error:
            raise UserError(error.what, where=where, fix=error.fix) from error


def origin(source: Source) -> External | None:
    """The ready-made model whose class and sizes a model has, through full trainings; None if there is none."""
    while isinstance(source, TrainStage):
        source = source.start.root
    return source if isinstance(source, External) else None


def _tokenizer(source: External, *, local: bool) -> Any:
    """The tokenizer; None where it is the hub's, and may not be or cannot be asked for."""
    from ctpd.checkpoints import find_file
    from ctpd.models import load_tokenizer

    revision = source.revision
    if revision is not None and (
        local or find_file(source.location, "tokenizer.json", revision=revision, local=False) is None
    ):
        return None
    return load_tokenizer(source.location, revision=revision)
