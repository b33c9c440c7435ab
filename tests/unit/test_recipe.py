"""Recipes: ranges of values, and checks across fields when the recipe is loaded."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctpd.core.config import Config
from ctpd.core.errors import UserError
from ctpd.pipeline.methods import METHODS, Method
from ctpd.pipeline.runs import expand
from ctpd.recipe import AblationSpec, Recipe, checked_variables, load_recipe, shipped_recipes
from ctpd.train.config import LoraSpec, Schedule

SMOKE = yaml.safe_load(shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8"))
Load = Callable[[dict[str, Any]], Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load testbed-smoke with values put at dotted keys; None removes one."""

    def changed(changes: dict[str, Any]) -> Recipe:
        recipe = copy.deepcopy(SMOKE)
        for key, value in changes.items():
            *parents, last = key.split(".")
            block = recipe
            for parent in parents:
                block = block.setdefault(parent, {})
            if value is None:
                del block[last]
            else:
                block[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return load_recipe(path)

    return changed


PHASES = (
    "shared.train",
    *(f"shared.{role}.{phase}" for role in ("teacher", "student") for phase in ("sft", "positive", "negative")),
)
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    **{f"{phase}.{field}": values for phase in PHASES for field, values in {
        "epochs": (0, -1, 1.5),
        "pairs_per_step": (0,),
        "warmup_ratio": (7, -0.1),
        "weight_decay": (-1,),
        "max_grad_norm": (-1,),
        "evaluations_per_epoch": (0,),
        "schedule": ("cosin",),
        "lora": ({"r": 0}, {"alpha": 0}, {"targets": []}, {"base": "8bit"}),
    }.items()},
    **{f"{phase}.learning_rate": (0, -1e-3, ".nan", "1e-3x", True) for phase in PHASES[1:]},
    **{f"{phase}.beta": (0, -0.1) for phase in PHASES if phase.endswith("tive")},
    **{f"{phase}.seed": (-1, 2**32) for phase in PHASES[1:]},
    **{f"shared.testbed.{size}": (0,) for size in ("num_topics", "num_pairs", "num_eval_pairs", "num_documents", "teacher_texts", "student_texts")},
    **{f"shared.testbed.{rate}": (1.1, -0.1) for rate in ("student_error", "chosen_right", "rejected_right")},
    **{f"shared.teacher.pretrain.{size}": (0,) for size in ("vocab_size", "hidden", "layers", "heads", "intermediate", "steps", "texts_per_step", "max_position")},
    "shared.teacher.pretrain.learning_rate": (0,),
    "shared.teacher.pretrain.warmup_ratio": (2,),
    "shared.teacher.revision": ("main",),
    "shared.student.template_variables": ({"messages": []}, {"tokenize": True}),
    "shared.data.max_tokens": (0,),
    "shared.data.max_prompt_tokens": (0,),
    "shared.data.limit": (0, -5),
    "shared.data.max_dropped": (5, -0.1),
    "shared.evaluation.limit": (-5, 0),
    "shared.evaluation.batch_size": (0,),
    "shared.seeds": ([], [0, 0], [-1]),
    "launch.num_processes": (0,),
    "runs.DPO.tuned.learning_rate": (0, -1e-3),
    "ablations.weights.values": ({},),
    "name": ("",),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_its_range_is_refused_when_the_recipe_is_loaded(key: str, value: Any, load: Load) -> None:
    with pytest.raises(UserError) as error:
        load({key: value})
    assert f"'{key}" in str(error.value)
    assert "mine.yaml, line " in str(error.value)
    assert "\n" not in str(error.value)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "heads": ({"shared.teacher.pretrain.heads": 5}, ("'shared.teacher.pretrain'", "cannot share a hidden size of 48")),
    "byte-level": ({"shared.teacher.pretrain.vocab_size": 259}, ("at least 260 pieces",)),
    "documents": ({"shared.testbed.num_documents": 257}, ("'shared.testbed'", "at most 256 test documents")),
    "rates": ({"shared.testbed.rejected_right": 1.0}, ("'shared.testbed'", "lower `rejected_right`")),
    "no room": ({"shared.data.max_prompt_tokens": 256}, ("'shared.data'", "no room for a response")),
    "shortest": ({"shared.data.select": "shortest"}, ("needs a `limit`",)),
    "two origins": ({"shared.student.model": "./x"}, ("'shared.student'", "exactly one of `model` and `pretrain`")),
    "unknown encoding": (
        {"shared.data.train": {"path": "x.csv", "encoding": "cp1525"}},
        ("'shared.data.train.encoding'", "Did you mean 'cp125", "such as cp1252"),
    ),
    "encoding of the hub": ({"shared.data.train.encoding": "cp1252"}, ("'shared.data.train'", "is that of text files")),
    "two sources": ({"shared.data.train.path": "x"}, ("'shared.data.train'", "exactly one of")),
    "hub without revision": ({"shared.data.train": {"hub": "a/b", "split": "train"}}, ("pinned `revision`",)),
    "no testbed": ({"shared.testbed": None}, ("'shared.teacher' is pretrained on the testbed",)),
    "turn": ({"shared.teacher.template.user": "{content}{content}"}, ("template.user'", "{content}", "2 times")),
    "lora": ({"shared.train.lora": {"base": "4bit"}}, ("'shared.train.lora.base'", "float32", "precision: bfloat16")),
    "rate in params": ({"runs.DPO.params": {"learning_rate": 1e-3}}, ("'runs.DPO.params' holds `learning_rate`",)),
    "no rate": ({"runs.DPO.tuned": {"beta": 0.1}}, ("'runs.DPO.tuned' lacks `learning_rate`")),
    "given twice": ({"runs.CTPD.params": {"beta": 0.2}}, ("'runs.CTPD' gives `beta` twice", "in `params` and in `tuned`")),
    "ablated learning rate": ({"ablations.weights": {"base": "CTPD", "field": "learning_rate", "values": {"Origin": 0}}}, ("'ablations.weights.values.Origin' must be a number above 0",)),
    "ablation of nothing": ({"ablations.weights.base": "CTP"}, ("names no run: 'CTP'", "Did you mean 'CTPD'?")),
    "row of an ablation": ({"runs.weights: Origin": {"method": "dpo", "tuned": {"learning_rate": 1e-3}}}, ("two rows have the name 'weights: Origin'", "'ablations.weights.values.Origin'")),
    "untrained and run": ({"untrained.DPO": "student"}, ("two rows have the name 'DPO'",)),
    "report": ({"tables.report": {"caption": "x", "rows": ["DPO"]}}, ("may not be named `report`",)),
    "rows and ablation": ({"tables.weights.rows": ["DPO"]}, ("'tables.weights' needs exactly one of",)),
    "no such row": ({"tables.main.base": "DPU"}, ("'tables.main' names no row: 'DPU'", "'DPO'")),
    "old key": ({"anchors": {"Teacher": "teacher"}}, ("unknown key 'anchors'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused_by_key_and_line(name: str, load: Load) -> None:
    changes, parts = CONTRADICTIONS[name]
    with pytest.raises(UserError) as error:
        load(changes)
    assert "mine.yaml, line " in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_an_ablation_wins_over_the_base_run(load: Load) -> None:
    """It replaces parameters of the base's `tuned`, the learning rate included, and of its `params`."""
    ablations = {
        "beta": {"base": "CTPD", "field": "beta", "values": {"a": 0.01, "b": 10}},
        "rate": {"base": "CTPD", "field": "learning_rate", "values": {"c": 5e-4}},
        "k": {"base": "CTPD", "field": "k", "values": {"d": 2.0}},
    }
    changes = {"ablations": ablations, "tables.weights": None, "tables.reference": None, "runs.CTPD.params": {"k": 3.0}}
    runs = expand(load(changes))
    assert {**runs["beta: a"].params, **runs["beta: a"].tuned} == {"k": 3.0, "beta": 0.01, "learning_rate": 1e-3}
    assert {**runs["beta: b"].params, **runs["beta: b"].tuned} == {"k": 3.0, "beta": 10, "learning_rate": 1e-3}
    assert runs["rate: c"].tuned == {"beta": 0.1, "learning_rate": 5e-4}
    assert (runs["k: d"].params, runs["k: d"].tuned) == ({"k": 2.0}, runs["CTPD"].tuned)
    for run in runs.values():
        assert not set(run.params) & set(run.tuned)


def test_an_ablation_of_an_unknown_field_is_refused_when_the_plan_is_made(tmp_path: Path) -> None:
    from ctpd.app import Experiment

    path = tmp_path / "mine.yaml"
    text = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")
    path.write_text(text.replace("field: weights", "field: weight"), encoding="utf-8")
    line = next(n for n, line in enumerate(text.splitlines(), start=1) if "field: weights" in line)
    found = rf"mine\.yaml, line {line}, run 'weights: Origin': unknown key 'weight'\. Did you mean 'weights'"
    with pytest.raises(UserError, match=found):
        Experiment(path)


def test_a_run_with_a_wrong_parameter_is_named_with_its_line(tmp_path: Path) -> None:
    from ctpd.app import Experiment

    old = "{method: dpo, tuned: {learning_rate: 1e-3, beta: 0.1}}"
    new = "{method: uld, params: {top_k: 0}, tuned: {learning_rate: 1e-3}}"
    text = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8").replace(old, new)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    line = next(n for n, line in enumerate(text.splitlines(), start=1) if "top_k: 0" in line)
    with pytest.raises(
        UserError, match=rf"line {line}, run '.*: 'top_k' must be a whole number of at least 1, and is 0"
    ):
        Experiment(path)


def test_a_phase_trains_by_its_schedule_alone() -> None:
    phase = load_recipe("gemma270m-smollm135m").shared.teacher.positive
    assert isinstance(phase, Schedule)
    assert Schedule.of(phase) == Schedule(epochs=1, pairs_per_step=8, lora=LoraSpec(r=16, alpha=32))
    assert type(Schedule.of(phase)) is Schedule


PARAMETERS = [
    ("dpo", {"beta": 0}), ("dpo", {"beta": -0.1}), ("ctpd", {"beta": float("nan")}), ("ctpd", {"lower": 2.0}),
    ("ctpd", {"k": -1}), ("tis_dpo", {"beta": 0}), ("tis_dpo", {"lower": 2.0}), ("uld", {"top_k": 0}), ("uld", {"kd_rate": 1.5}),
    ("alm", {"merge_threshold": 1.0}), ("gold", {"matched_weight": 0.5}), ("token_kd", {"divergence": "kl"}),
    ("token_kd", {"top_k": 5, "divergence": "reverse_kl"}), ("dskd_cma", {"micro_batch": 0}), ("x_token", {"top_k": 0}),
    ("mined", {"temperature": 0}), ("multi_level_ot", {"ctpd_variant": True, "top_k": 5}), ("adpa", {"top_k": 0}),
    ("dckd", {"chosen_weight": -1}), ("dskd", {"projector_learning_rate": 0}), ("sft", {"beta": 1.0}), ("sequence_kd", {"k": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "params"), PARAMETERS)
def test_a_parameter_of_a_method_out_of_its_range_is_one_paragraph(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        Method.make(method, params, source="mine.yaml, run 'X'")
    assert str(error.value).startswith("mine.yaml, run 'X': ")
    assert "\n" not in str(error.value)
    assert next(iter(params)) in str(error.value)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_parameter_of_a_method_is_described(method: str) -> None:
    params_type = type(Method.make(method, {}, source="test").params)
    assert issubclass(params_type, Config)
    for name, field in params_type.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_every_field_of_a_recipe_is_described() -> None:
    seen: set[type[Config]] = set()

    def visit(cls: Any) -> None:
        if isinstance(cls, type) and issubclass(cls, Config) and cls not in seen:
            seen.add(cls)
            for name, field in cls.model_fields.items():
                assert field.description, f"{cls.__name__}.{name}"
                visit(field.annotation)
        for part in getattr(cls, "__args__", ()):
            visit(part)

    visit(Recipe)
    assert AblationSpec in seen
    assert LoraSpec in seen


def test_the_arguments_of_the_function_that_renders_are_no_template_variables() -> None:
    """Those of the installed transformers: a variable of such a name would fail on every row, or render another text."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    taken = {
        name
        for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
        for name, one in inspect.signature(function).parameters.items()
        if one.kind is not one.VAR_KEYWORD
    }
    for name in taken | {"messages"}:
        with pytest.raises(UserError, match=f"'{name}' is no variable of a template"):
            checked_variables({"enable_thinking": False, name: 1})
    assert checked_variables({"date_string": "1 May"}) == {"date_string": "1 May"}
