"""The recipe that `ctpd init` writes is sized for the data and fits the models."""

import json
from pathlib import Path
from typing import Any

import pytest

from ctpd.cli.template import write_recipe
from ctpd.objectives.preference import PreferenceParams
from ctpd.pipeline.methods import Method
from ctpd.recipe import PlainSpec, Recipe, load_recipe
from ctpd.recipe.model import SftPhase
from ctpd.train.config import Steps


def written(tmp_path: Path, pairs: int, *, chat: bool = True) -> Recipe:
    model = tmp_path / "model"
    model.mkdir()
    template = {"chat_template": "{{ messages }}"} if chat else {}
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x", **template}))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * pairs)
    to = tmp_path / "mine.yaml"
    write_recipe(to, teacher=str(model), student=str(model), data=tmp_path / "pairs.jsonl")
    return load_recipe(to)


@pytest.mark.parametrize("pairs", [1, 7, 60, 128, 200, 255, 1000, 5000])
def test_every_training_has_at_least_twenty_steps(tmp_path: Path, pairs: int) -> None:
    shared = written(tmp_path, pairs).shared
    assert isinstance(shared.student.sft, SftPhase)
    for schedule in (shared.train, shared.student.sft, shared.teacher.positive, shared.student.negative):
        assert schedule is not None
        assert not isinstance(schedule, str)
        assert Steps.of(pairs, schedule).total >= 20


def test_with_enough_data_the_sizes_are_the_papers(tmp_path: Path) -> None:
    shared = written(tmp_path, 5000).shared
    assert isinstance(shared.student.sft, SftPhase)
    assert (shared.train.pairs_per_step, shared.student.sft.pairs_per_step) == (16, 128)
    assert (shared.train.epochs, shared.student.sft.epochs) == (1, 1)


def test_it_says_the_weights_of_ctpd_and_whether_requests_are_templated(tmp_path: Path) -> None:
    recipe = written(tmp_path, 60)
    params: dict[str, Any] = dict(recipe.runs["CTPD"].params)
    assert params.keys() == {"k", "mu", "lower", "upper"}
    assert Method.make("ctpd", params, source="x").params == PreferenceParams()
    assert recipe.shared.evaluation.chat_template
    assert "chat_template: true" in (tmp_path / "mine.yaml").read_text()


def test_a_model_without_a_chat_template_has_a_plain_one_and_is_fine_tuned(tmp_path: Path) -> None:
    shared = written(tmp_path, 60, chat=False).shared
    assert isinstance(shared.student.template, PlainSpec)
    assert shared.student.template.user == "{content}\n"
    assert isinstance(shared.teacher.sft, SftPhase)
    assert not shared.evaluation.chat_template


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pair"):
        written(tmp_path, 0)
