"""What a rehearsal has found: the rows of its page."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from ctpd.core.errors import UserError
from ctpd.pipeline.stage import Stage
from ctpd.pipeline.stages.evaluate import EvaluateStage
from ctpd.rehearsal.costs import Need, Needs

_SEED = re.compile(r", seed \d+")
_ONE_ROW = {"record": "records", "weights": "importance weights", "choice": "choices of the trials"}
"""Kinds of stages that need next to nothing, and so share a row."""
_TRIAL = re.compile(r": trial \d+ \([^()]*\)")


class State(StrEnum):
    """What became of a stage in the rehearsal."""

    RAN = "ran"
    FAILED = "failed"
    BLOCKED = "blocked"  # it reads what failed
    NOT_TRIED = "not tried"


_WORST_FIRST = (State.FAILED, State.BLOCKED, State.RAN)


class Problem(NamedTuple):
    """Something that will not run, or could not be tried: the stage, and a paragraph."""

    where: str
    text: str


class Row(NamedTuple):
    """The stages of a recipe that are alike but for seed, trial or column.

    Attributes:
        label: of the stages, without these.
        stages: how many there are.
        tried: how many of them the rehearsal tried; those of other seeds and trials count as tried with the first.
        state: the worst of those that were rehearsed.
        memory: bytes of one device that the largest needs; None where it needs no model, or that is not known.
        operations: floating-point operations of all of them; None as for `memory`.
    """

    label: str
    kind: str
    stages: int
    tried: int
    state: State
    memory: float | None
    operations: float | None


@dataclass
class Rehearsal:
    """The page.

    Attributes:
        recipe: as it was given.
        rows: the recipe's stages.
        problems: what will not run.
        unknown: what could not be rehearsed.
        notes: what a user should know.
        pairs: of the whole pairs stage: pairs, dropped ones by reason, tokens, spans; None if it failed.
        processes: of the recipe's launch.
        sharded: whether weights are sharded over them.
        seconds: of the rehearsal.
    """

    recipe: str
    rows: list[Row]
    problems: list[Problem]
    unknown: list[Problem]
    notes: list[str]
    pairs: Mapping[str, Any] | None
    processes: int
    sharded: bool
    seconds: float = 0.0

    @property
    def will_run(self) -> bool:
        """Whether nothing was found that will not run."""
        return not self.problems

    @property
    def operations(self) -> float:
        """Floating-point operations of all stages, as far as they are known."""
        return sum(row.operations for row in self.rows if row.operations is not None)


def rows_of(stages: Iterable[Stage], states: Mapping[str, State], needs: Needs) -> tuple[list[Row], list[Problem]]:
    """The rows of a page, and which stages cannot be run with their pairs and the processes of the launch.

    Args:
        stages: of the recipe.
        states: of the stages of the rehearsal, by label.
        needs: what the recipe's stages need.
    """
    by_row: dict[str, set[State]] = {}
    for label, state in states.items():
        by_row.setdefault(_general(label), set()).add(state)
    groups: dict[tuple[str, str], list[Stage]] = {}
    for stage in stages:
        groups.setdefault((_row_label(stage), stage.kind), []).append(stage)
    rows, problems = list[Row](), dict[str, Problem]()
    for (label, kind), members in groups.items():
        found = {state for stage in members for state in by_row.get(_general(stage.label), ())}
        state = next((one for one in _WORST_FIRST if one in found), State.NOT_TRIED)
        each = list[Need]()
        for stage in members:
            try:
                each.append(needs.of(stage))
            except UserError as error:
                problems.setdefault(str(error), Problem(label, str(error)))
        memory = max((need.memory for need in each if need.memory is not None), default=None)
        done = [need.operations for need in each if need.operations is not None]
        tried = sum(_general(stage.label) in by_row for stage in members)
        rows.append(Row(label, kind, len(members), tried, state, memory, sum(done) if done else None))
    return rows, list(problems.values())


def _row_label(stage: Stage) -> str:
    label = _ONE_ROW.get(stage.kind, stage.label)
    if isinstance(stage, EvaluateStage):
        label = label.removesuffix(f" on {stage.task.column.name}")
    return _general(label)


def _general(label: str) -> str:
    """A label without seed and trial."""
    return _TRIAL.sub(": trials", _SEED.sub("", label))
