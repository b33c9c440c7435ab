"""What a user should know of a plan before it is run: trainings of few steps, and prompts that differ in evaluation."""

from collections.abc import Iterable, Iterator

from ctpd.core.errors import UserError
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.train.config import pairs_of_process

MOST_NAMED = 12  # trainings of which the same is to be said; a search has hundreds


def plan_notes(graph: Graph) -> list[str]:
    """Sentences about the stages of a graph, for `--plan`."""
    return [*_short_trainings(graph), *_templates(graph), *_teachers(graph)]


def refuse_trainings(stages: Iterable[Stage], *, num_processes: int) -> None:
    """Refuse stages with a training of no step, that changes nothing, or whose steps the processes cannot divide.

    Raises:
        UserError: there is one, as far as a plan can tell; or its pairs cannot be read, which is said first.
    """
    for stage in stages:
        if isinstance(stage, TrainStage):
            try:
                stage.planned_steps()
                pairs_of_process(
                    stage.config.schedule.pairs_per_step,
                    num_processes=num_processes,
                    micro_batch=stage.method.requires.micro_batch,
                )
            except UserError as error:
                stage.pairs.train.check()
                raise UserError(f"{stage.label}: {error.what}", fix=error.fix) from error


def _short_trainings(graph: Graph) -> Iterator[str]:
    labels: dict[str, list[str]] = {}
    for stage in graph.stages:
        steps = stage.planned_steps() if isinstance(stage, TrainStage) else None
        if steps is not None and steps.note is not None:
            labels.setdefault(steps.note, []).append(stage.label)
    for note, found in labels.items():
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        yield f"{'; '.join(found[:MOST_NAMED])}{more}: {note}."


def _teachers(graph: Graph) -> Iterator[str]:
    """Methods that run the teacher in every step, which a stored signal spares the others."""
    found = [stage for stage in graph.stages if isinstance(stage, TrainStage) and _holds_teacher(stage)]
    if found:
        yield (
            f"{'; '.join(stage.label for stage in found)}: the teacher is in memory while the student trains. Its weights "
            "come on top of the student's memory, and each step runs it on the batch as well, which with a large teacher takes "
            "most of the time."
        )


def _holds_teacher(stage: TrainStage) -> bool:
    view = stage.method.requires.teacher
    return view is not None and not view.is_stored


def _templates(graph: Graph) -> Iterator[str]:
    pairs = [stage for stage in graph.stages if isinstance(stage, PairsStage)]
    chat = {role for stage in pairs for role in ("teacher", "student") if getattr(stage, role).template == "chat"}
    without = any(isinstance(stage, EvaluateStage) and not stage.protocol.chat_template for stage in graph.stages)
    if chat and without:
        who = " and ".join(role for role in ("teacher", "student") if role in chat)
        yield (
            f"The {who} {'are' if len(chat) > 1 else 'is'} trained in the chat template (`template: chat`) and evaluated "
            "without it (`evaluation: chat_template: false`)."
        )
