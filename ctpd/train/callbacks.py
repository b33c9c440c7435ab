"""Callbacks of the Trainer: progress, evaluations, resume states."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ctpd.core.processes import processes


class ReportProgress(TrainerCallback):
    """Reports the step number to the pipeline's progress bar."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forward the step number."""
        self._report(state.global_step, state.max_steps)


class EvaluateOften(TrainerCallback):
    """Asks for ``total`` evaluations at equal distances, the last one after the last step."""

    def __init__(self, total: int) -> None:
        self._total = total

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask after each step that completes another of ``total`` equal parts of the training."""
        before, after = ((step * self._total) // state.max_steps for step in (state.global_step - 1, state.global_step))
        control.should_evaluate = control.should_evaluate or before != after


class SaveByTime(TrainerCallback):
    """Asks for a resume state whenever ``seconds`` have passed since the last one, by the clock of rank 0.

    Metrics are logged at the same step: those accumulated since the last logging are not part of a resume state.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask when the time has passed, but not after the last step: the result itself is saved then."""
        is_due = state.global_step < state.max_steps and time.monotonic() - self._last >= self._seconds
        if processes().broadcast(int(is_due)):
            control.should_save = control.should_log = True
            self._last = time.monotonic()
