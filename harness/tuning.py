"""Hyper-parameter search: the trials of a run, which of them is chosen, and what a reader must know of the choice.

A trial's score is the mean over the seeds of the Average on development documents, the measure by which tables compare
runs (docs/statistics.md#choosing-hyper-parameters).
"""

import math
from collections.abc import Mapping, Sequence

from ctpd.core.config import Config
from ctpd.core.errors import UserError
from harness.numbers import Number


class Trial(Config):
    """One point of a run's space.

    Attributes:
        values: of the parameters that are varied.
        scores: the Average on development documents for each seed, a fraction; None where the training or the
            evaluation gave a number that is not finite.
    """

    values: Mapping[str, int | float]
    scores: tuple[Number, ...]

    @property
    def mean(self) -> float | None:
        """The mean over the seeds; None if one of them is not finite."""
        return mean(self.scores)


class Tuning(Config):
    """What chose the values of a run.

    Attributes:
        run: whose trials these are; of a row of an ablation, its base, unless it has trials of its own.
        suite: of development documents.
        seeds: of the trainings.
        asked: trials that the recipe asks for; a run whose space has fewer points has fewer.
        space: the values that could be tried of each parameter.
        trials: in the order in which they are numbered, from 1.
        chosen: index of the one that was chosen.
        start: the score of the model that every trial starts from.
        shared_documents: how many documents of the study are development documents, too: there should be none.
    """

    run: str
    suite: str
    seeds: tuple[int, ...]
    asked: int
    space: Mapping[str, tuple[int | float, ...]]
    trials: tuple[Trial, ...]
    chosen: int
    start: Number
    shared_documents: int = 0

    @property
    def best(self) -> Trial:
        """The trial that was chosen."""
        return self.trials[self.chosen]

    @property
    def gains(self) -> bool:
        """Whether the best trial is above the start."""
        best = self.best.mean
        return best is not None and (self.start is None or best > self.start)

    @property
    def at_end(self) -> dict[str, str]:
        """Parameter -> `lowest` or `highest`, where the choice is at an end of what could be tried."""
        found = {}
        for name, levels in self.space.items():
            value = self.best.values[name]
            if len(levels) > 1 and value in (min(levels), max(levels)):
                found[name] = "lowest" if value == min(levels) else "highest"
        return found


def choose(trials: Sequence[Trial], *, run: str) -> int:
    """The index of the trial with the highest mean; of equal ones the first. One that is not finite is below all others.

    Raises:
        UserError: none is finite.
    """
    means = [-math.inf if (score := trial.mean) is None else score for trial in trials]
    best = max(range(len(means)), key=lambda index: (means[index], -index))
    if means[best] == -math.inf:
        raise UserError(
            f"none of the {len(trials)} trials of '{run}' has a finite score",
            fix="Give lower learning rates in `tune.space`",
        )
    return best


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, rounded once, so that the order of the values does not matter; None if one is not finite, or there are none."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found and len(found) == len(values) else None


def setting(values: Mapping[str, int | float]) -> str:
    """Values as text: `learning_rate 0.001, beta 0.1`."""
    return ", ".join(f"{name} {number_text(value)}" for name, value in values.items())


def number_text(value: float) -> str:
    """A number with six digits, or with as many as identify it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
