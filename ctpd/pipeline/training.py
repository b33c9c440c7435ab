"""Helpers of the stages that train or score: execution settings, and saving of results."""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ctpd.core.config import to_plain
from ctpd.core.roles import Role
from ctpd.core.store import RESUME_FOLDER
from ctpd.model_checks import check_tokens
from ctpd.models import save_model, whole_state
from ctpd.pipeline.references import MODEL_FOLDER, TRAINING, LocatedModel
from ctpd.pipeline.rows import token_rows
from ctpd.pipeline.stage import Work
from ctpd.text.prepare import PreparedPairs
from ctpd.train.fit import Fit, FitSettings
from ctpd.train.scoring import Arrays, Measure, ScoringSettings, scoring_pass
from ctpd.train.sharing import share_prompts_where_quicker
from harness.record import TrainingSummary, training_summary


class Scoring(Protocol):
    """What the configurations of stages that score have in common."""

    @property
    def role(self) -> Role:
        """Whose tokens."""
        ...

    @property
    def precision(self) -> str:
        """Of the model."""
        ...


def fit_settings(work: Work) -> FitSettings:
    """The settings of a training that depend on this machine."""
    runtime = work.runtime
    return FitSettings(
        device=runtime.torch_device(),
        micro_batch_tokens=runtime.micro_batch_tokens,
        checkpoint_seconds=runtime.checkpoint_seconds,
        report_to=runtime.report_to,
        progress=work.progress,
        note=work.note,
        detail=work.detail,
        fsdp=runtime.fsdp,
        log_target=work.log_target,
    )


def resume_folder(work: Work) -> Path:
    """The folder of a training's resume states."""
    return work.folder / RESUME_FOLDER


def save_trained(work: Work, model: nn.Module) -> None:
    """Write the weights. All processes of a launch must call it, since each may hold a shard."""
    state = whole_state(model)
    if work.writes:
        save_model(model, work.folder / MODEL_FOLDER, state=state)


def finish_training(work: Work, done: Fit) -> None:
    """Write the history and remove the resume states, which are not needed any more."""
    text = json.dumps(to_plain(done), ensure_ascii=False, allow_nan=False)
    (work.folder / TRAINING).write_text(text, encoding="utf-8")
    shutil.rmtree(resume_folder(work), ignore_errors=True)
    if done.note is not None:
        work.remark(done.note)


def read_training(folder: Path) -> TrainingSummary:
    """The history of the training in an artifact, and what it cost."""
    return training_summary(json.loads((folder / TRAINING).read_text(encoding="utf-8")))


def scored(work: Work, located: LocatedModel, pairs: PreparedPairs, config: Scoring, measure: Measure) -> Arrays:
    """One scoring pass of a frozen model over all response tokens of its rows."""
    model: Any = located.load_frozen(precision=config.precision, device=work.runtime.torch_device())
    rows = token_rows(pairs, config.role)
    check_tokens(model, rows.input_ids, where=located.title)

    def row_name(row: int) -> str:
        return f"{pairs.pair_ids[row // 2]} ({'rejected' if row % 2 else 'chosen'})"

    settings = ScoringSettings(
        max_tokens=work.runtime.signal_batch_tokens,
        progress=work.progress,
        shares_prompts=share_prompts_where_quicker(model),
        model=located.title,
        row_name=row_name,
    )
    return scoring_pass(model, rows, measure=measure, settings=settings)
