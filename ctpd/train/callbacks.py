"""Callbacks of the Trainer: progress, evaluations, resume states."""

import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ctpd.core.processes import processes
from ctpd.train.stopping import SIGNALS, StopRequest


class ReportProgress(TrainerCallback):
    """Reports the step number, and the loss when it is logged, to the pipeline's progress bar."""

    def __init__(self, report: Callable[[int, int], None], detail: Callable[[str], None]) -> None:
        self._report, self._detail = report, detail

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forward the loss."""
        loss = state.log_history[-1].get("loss") if state.log_history else None
        if loss is not None:
            self._detail(f"loss {loss:.4g}")

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


class SaveStates(TrainerCallback):
    """Asks for a resume state every ``seconds``, by the clock of rank 0, and when a signal asks any rank to end.

    Metrics are logged at the same step: those accumulated since the last logging are not part of a resume state.
    """

    def __init__(self, seconds: float, stop: StopRequest) -> None:
        self._seconds, self._stop, self._last = seconds, stop, time.monotonic()
        self._ending: signal.Signals | None = None  # what `on_save` delivers

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask when the time has passed, but not after the last step: the result itself is saved then."""
        is_last = state.global_step >= state.max_steps
        is_due = self._agree(is_due=not is_last and time.monotonic() - self._last >= self._seconds)
        if is_due or self._ending is not None:
            control.should_save = True
            control.should_log = control.should_log or not is_last
            self._last = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A signal during the last evaluation: no step comes after it."""
        if state.global_step >= state.max_steps:
            self._agree(is_due=False)
            control.should_save = control.should_save or self._ending is not None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End, if that is what the state was written for."""
        if self._ending is not None:
            self._stop.deliver(self._ending)

    def _agree(self, *, is_due: bool) -> bool:
        """Whether rank 0 says that a state is due; what any rank has received becomes what all of them end with."""
        ranks = processes()
        asked = [is_due and ranks.is_main, *(self._stop.received == number for number in SIGNALS)]
        due, *received = ranks.all_reduce(np.array(asked, dtype=np.int64)).tolist()
        self._ending = next((number for number, count in zip(SIGNALS, received, strict=True) if count), None)
        return bool(due)
