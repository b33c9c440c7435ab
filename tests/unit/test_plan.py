"""The plan: what is refused before the first stage, and what it holds of an objective."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ctpd.app import Experiment
from ctpd.core.errors import UserError
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.methods import METHODS, Method
from ctpd.pipeline.stage import Part
from tests.fixtures.tokenizers import tokenizer

RECIPE = """
name: own
about: "Two models of one's own."
shared:
  teacher: {{model: {folder}/teacher, template: chat, sft: skip}}
  student: {{model: {folder}/student, template: chat, sft: skip}}
  data: {{train: {{path: {folder}/pairs.jsonl}}, max_tokens: 64, max_prompt_tokens: 32}}
  train: {{pairs_per_step: 2}}
  evaluation: {{suite: card}}
runs:
  KD: {{method: token_kd, tuned: {{learning_rate: 1e-3}}}}
tables:
  main: {{caption: Main, rows: [KD]}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two ready-made models with the tokenizers `byte_bpe` and `unigram`, as far as a plan reads them."""
    for role, kind in (("teacher", "byte_bpe"), ("student", "unigram")):
        tokenizer(kind).save_pretrained(str(tmp_path / role))
        (tmp_path / role / "config.json").write_text(json.dumps({"model_type": "llama", "made_for": role}))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def test_a_method_for_one_tokenizer_is_refused_for_two_ready_made_models(recipe: Path) -> None:
    """Before any stage: their tokenizer files say it."""
    refused = r"line \d+, run 'KD': the method 'token_kd' compares distributions token by token.*different tokenizers"
    with pytest.raises(UserError, match=refused):
        Experiment(recipe)


def test_ready_made_models_that_share_a_tokenizer_are_planned(recipe: Path) -> None:
    """Other files may differ: what counts is the vocabulary."""
    shutil.copy(recipe.with_name("teacher") / "tokenizer.json", recipe.with_name("student") / "tokenizer.json")
    assert any(stage.kind == "train" for stage in Graph(Experiment(recipe).records).stages)


def held(value: Any) -> list[Any]:
    """A value and everything that a plan holds through it."""
    if isinstance(value, Part):
        return [value, *(item for f in dataclasses.fields(value) for item in held(getattr(value, f.name)))]  # type: ignore[arg-type]
    return [value]


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_holds_a_method_as_data_and_makes_the_module_anew(name: str) -> None:
    """So nothing of a finished training stays on the device."""
    method = Method.make(name, {}, source="test")
    assert not any(isinstance(item, nn.Module) for item in held(method))
    first, second = method.objective(), method.objective()
    assert isinstance(first, nn.Module)
    assert first is not second
    assert first.requirements == method.requires
