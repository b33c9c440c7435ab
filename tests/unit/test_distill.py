"""Distillation in the Trainer: aligned tokens, teachers in memory and stored, an objective's own parameters, resume."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from baselines.uld import ULD, ULDParams
from ctpd.models import add_lora
from ctpd.objectives.base import Sums, TeacherView
from ctpd.objectives.distillation import DistillationObjective, DistillBatch, LogitTokens, ModelFacts, mixed
from ctpd.pipeline.references import LocatedModel
from ctpd.pipeline.vocabularies import dropped_mass, model_facts
from ctpd.text.blocks import TokenRows
from ctpd.train.collator import ScoredRows
from ctpd.train.config import Schedule
from ctpd.train.distillation import DistillPass, DistillRows
from ctpd.train.fit import Fit, FitSettings, Optimization, fit
from ctpd.train.scoring import (
    BOUNDARY_LOGPS,
    TOKEN_LOGPS,
    TOP_LOGPS,
    ScoringSettings,
    logps_with_boundary,
    scoring_pass,
    top_k,
)
from ctpd.train.trainer import OBJECTIVE_FILE, Training, save_objective
from tests.fixtures.tiny import VOCABULARY, tiny_model, tiny_rows
from tests.fixtures.tokenizers import tokenizer

SCHEDULE = Schedule(epochs=2, pairs_per_step=4)
FACTS = ModelFacts(tokens=tuple("?" * VOCABULARY), special_ids=frozenset(), vocab_size=VOCABULARY, hidden_size=16)


def scored(rows: ScoredRows, row: int) -> np.ndarray:
    start, end = rows.row_starts[row], rows.row_starts[row + 1]
    return np.flatnonzero(rows.unit[start:end] >= 0) + start


def by_position(student: ScoredRows, teacher: ScoredRows) -> np.ndarray:
    aligned = np.full(len(student.input_ids), -1, dtype=np.int32)
    for row in range(len(student.row_starts) - 1):
        mine, theirs = scored(student, row), scored(teacher, row)
        aligned[mine] = np.where(np.arange(len(mine)) < len(theirs), np.arange(len(mine)), -1)
    return aligned


def plain(rows: ScoredRows) -> ScoredRows:
    return ScoredRows(rows.input_ids, rows.row_starts, rows.unit, rows.unit_starts, rows.counted, rows.items)


def both_rows(num_items: int = 20, *, stored: tuple[dict[str, np.ndarray], ...] = ()) -> DistillRows:
    """Responses of two models, of unequal lengths."""
    student, teacher = plain(tiny_rows(num_items, sides=1, seed=0)), plain(tiny_rows(num_items, sides=1, seed=1))
    return DistillRows(student, teacher, by_position(student, teacher), stored)


def teacher_model() -> nn.Module:
    return tiny_model("gemma2_softcap", seed=7).requires_grad_(False)


@dataclass(frozen=True)
class ProjectedParams:
    """Nothing to choose."""


class Projected(DistillationObjective[LogitTokens]):
    """Cross-entropy, and the distance of the student's states to projected ones of the teacher: has parameters."""

    params_type = ProjectedParams
    counts = "tokens"
    sides = ("chosen",)
    teacher = TeacherView()
    objective_learning_rate = 1e-2

    def __init__(self, params: ProjectedParams) -> None:
        super().__init__()
        self.params = params

    def bind(self, student: ModelFacts, teacher: ModelFacts) -> None:
        self.project = nn.Linear(teacher.hidden_size, student.hidden_size)

    def forward(self, batch: DistillBatch[LogitTokens]) -> Sums:
        student, teacher = batch.student.rows, batch.teachers[0].rows
        nll = -student.logps(batch.student.targets).sum()
        theirs = self.project(teacher.select(batch.aligned.clamp(min=0)).hidden)
        kd = ((student.hidden - theirs) ** 2).mean(-1).masked_fill(batch.aligned < 0, 0.0).sum()
        return mixed(nll, kd, kd_rate=0.5, batch=batch)


def train(
    model: nn.Module,
    objective: DistillationObjective[Any],
    folder: Path,
    *,
    rows: DistillRows | None = None,
    micro_batch_tokens: int = 10**6,
    checkpoint_seconds: float = 1e9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    torch.manual_seed(5)
    objective.bind(FACTS, FACTS)
    rows = both_rows() if rows is None else rows
    teachers = [] if rows.stored else [teacher_model()]
    settings = FitSettings(
        device="cpu",
        micro_batch_tokens=micro_batch_tokens,
        checkpoint_seconds=checkpoint_seconds,
        report_to=(),
        progress=progress,
    )
    training = Training(model=model, objective=objective, rows=rows, forward_pass=DistillPass(objective, teachers))
    optimization = Optimization(schedule=SCHEDULE, learning_rate=1e-3, seed=3, precision="float32")
    return fit(training, optimization, folder=folder, settings=settings)


def losses(done: Fit) -> list[float]:
    return [entry["loss"] for entry in done.history if "loss" in entry]


def test_a_batch_says_which_token_of_the_teacher_is_aligned() -> None:
    rows = both_rows()
    items = [3, 0, 7]
    batch = rows.collate(items)
    student_row = batch.student.predictors // batch.student.input_ids.shape[1]
    teacher_row = batch.teacher.predictors // batch.teacher.input_ids.shape[1]
    for position, item in enumerate(items):
        mine, theirs = (student_row == position).nonzero()[:, 0], (teacher_row == position).nonzero()[:, 0]
        expected = [int(theirs[k]) if k < len(theirs) else -1 for k in range(len(mine))]
        assert batch.aligned[mine].tolist() == expected
        assert batch.student.targets[mine].tolist() == rows.student.input_ids[scored(rows.student, item)].tolist()
        assert batch.teacher.targets[theirs].tolist() == rows.teacher.input_ids[scored(rows.teacher, item)].tolist()


@pytest.mark.parametrize(
    "make", [lambda: ULD(ULDParams()), lambda: Projected(ProjectedParams())], ids=["without parameters", "with"]
)
def test_one_micro_batch_of_four_equals_four_of_one(make: Callable[[], Any], tmp_path: Path) -> None:
    one = train(tiny_model(), make(), tmp_path / "a")
    four = train(tiny_model(), make(), tmp_path / "b", micro_batch_tokens=1)
    assert (one.micro_batch, four.micro_batch) == (4, 1)
    assert losses(one) == pytest.approx(losses(four), abs=2e-6)


def kept(measure: Any) -> dict[str, np.ndarray]:
    settings = ScoringSettings(max_tokens=40, progress=lambda done, total: None)
    return scoring_pass(teacher_model(), both_rows().teacher.tokens, measure=measure, settings=settings)


def test_all_of_a_stored_distribution_is_the_teacher_in_memory(tmp_path: Path) -> None:
    online = train(tiny_model(), ULD(ULDParams()), tmp_path / "a")
    stored = both_rows(stored=(kept(top_k(VOCABULARY, 1.0)),))
    offline = train(tiny_model(), ULD(ULDParams(top_k=VOCABULARY)), tmp_path / "b", rows=stored)
    assert losses(offline) == pytest.approx(losses(online), abs=2e-6)


def test_dropped_mass_is_that_of_the_rows_that_are_trained_on() -> None:
    teacher = TokenRows(
        np.arange(7, dtype=np.int32), np.array([0, 3, 7]), np.array([-1, 0, 1, -1, 0, 0, 1], dtype=np.int32)
    )
    logps = np.log(np.array([[0.5, 0.25], [0.5, 0.5], [0.1, 0.1], [0.2, 0.1], [0.3, 0.1]], dtype=np.float32))
    assert dropped_mass(teacher, {TOP_LOGPS: logps}, np.array([[0]])) == pytest.approx((0.25 + 0.0) / 2)
    assert dropped_mass(teacher, {TOP_LOGPS: logps}, np.array([[0, 1]])) == pytest.approx(
        (0.25 + 0.0 + 0.8 + 0.7 + 0.6) / 5
    )


def test_an_id_without_a_logit_is_no_part_of_a_models_vocabulary(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one id more than its text model has logits."""
    made = tokenizer("byte_bpe")
    made.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    made.save_pretrained(str(tmp_path))
    fewer = len(made) - 1
    config = tiny_model().config
    config.vocab_size = fewer
    config.save_pretrained(str(tmp_path))
    located = LocatedModel(
        folder=str(tmp_path), revision=None, adapters=(), tokenizer=str(tmp_path), tokenizer_revision=None
    )
    facts = model_facts(located)
    assert len(facts.tokens) == facts.vocab_size == fewer
    assert max(facts.special_ids) < fewer


def test_a_stored_boundary_is_the_probability_of_the_boundary_after_each_token() -> None:
    rows, ids = both_rows().teacher, [3, 5, 60]
    found = kept(logps_with_boundary(ids))
    columns = np.stack([found[TOKEN_LOGPS], found[BOUNDARY_LOGPS]], axis=1)
    with torch.no_grad():
        for row in (0, 4):
            tokens = rows.input_ids[rows.row_starts[row] : rows.row_starts[row + 1]].astype(np.int64)
            logps = teacher_model()(input_ids=torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
            positions = scored(rows, row) - rows.row_starts[row]
            first = int((rows.unit[: rows.row_starts[row]] >= 0).sum())
            mine = torch.from_numpy(columns[first : first + len(positions)])
            torch.testing.assert_close(mine[:, 0], logps[positions - 1, tokens[positions]], atol=1e-5, rtol=0)
            torch.testing.assert_close(mine[:, 1], logps[positions][:, ids].logsumexp(-1), atol=1e-5, rtol=0)


def test_parameters_of_an_objective_train_at_their_own_learning_rate_and_stay_out_of_the_model(tmp_path: Path) -> None:
    model, objective = tiny_model(), Projected(ProjectedParams())
    torch.manual_seed(5)
    start = nn.Linear(16, 16).weight.detach()
    names = set(model.state_dict())
    done = train(model, objective, tmp_path)
    assert set(model.state_dict()) == names
    assert done.objective_parameters == 16 * 16 + 16
    moved = (objective.project.weight.detach() - start).abs().max()
    assert moved > 5 * 1e-3  # ten steps at 1e-2, not at the student's 1e-3
    save_objective(objective, tmp_path)
    assert (tmp_path / OBJECTIVE_FILE).is_file()
    save_objective(ULD(ULDParams()), tmp_path / "none")  # an objective without parameters leaves no file


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize("lora", [False, True])
def test_resume_restores_the_parameters_of_the_objective(lora: bool, tmp_path: Path) -> None:
    def model() -> Any:
        made: Any = tiny_model()
        return add_lora(made, r=2, alpha=4, targets="all-linear", seed=1) if lora else made

    whole, parts = Projected(ProjectedParams()), Projected(ProjectedParams())
    expected = train(model(), whole, tmp_path / "a")
    with pytest.raises(Stop):
        train(model(), parts, tmp_path / "b", checkpoint_seconds=0.0, progress=stop_at(4))
    resumed = train(model(), parts, tmp_path / "b", checkpoint_seconds=0.0)
    assert losses(resumed) == losses(expected)
    torch.testing.assert_close(parts.project.weight, whole.project.weight, atol=0, rtol=0)


def test_a_teacher_gets_no_gradient_and_does_not_change(tmp_path: Path) -> None:
    objective, teacher = ULD(ULDParams()), tiny_model("llama_tied", seed=9)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = both_rows().collate([0, 1])
    DistillPass(objective, [teacher])(tiny_model(), batch).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
