"""Every method of the table, trained through the command line on the smallest world, with one tokenizer and with two."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml

from ctpd.pipeline.methods import METHODS, Method
from ctpd.recipe import shipped_recipes
from tests.conftest import Cli

OBJECTIVES = {method: Method.make(method, {}, source="test").objective() for method in METHODS}
ACROSS = [name for name, made in OBJECTIVES.items() if made.teacher is None or not made.teacher.same_tokenizer]


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")


def write_recipe(folder: Path, *, methods: list[str], one_tokenizer: bool, precision: str = "float32") -> Path:
    """`testbed-smoke` with a run of each method."""
    recipe = yaml.safe_load(shipped_recipes()["testbed-smoke"].read_text())
    shared = recipe["shared"]
    shared["testbed"] |= {"num_pairs": 48, "num_eval_pairs": 16}
    shared["student"]["pretrain"] |= {"steps": 150, "hidden": 64}  # enough training that most generated responses end
    shared["train"] |= {"pairs_per_step": 8}
    shared["precision"] = precision
    if one_tokenizer:
        names = ("tokenizer", "vocab_size")
        teacher = {name: shared["teacher"]["pretrain"][name] for name in names}
        shared["student"]["pretrain"] |= {**teacher, "tokenizer_corpus": shared["teacher"]["pretrain"]["corpus"]}
    recipe |= {
        "runs": {name: {"method": name, "tuned": {"learning_rate": 0.001}} for name in methods},
        "ablations": {},
        "tables": {"main": {"caption": "All", "rows": methods}},
    }
    path = folder / "every-method.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def trained(cli: Cli, recipe: Path, store: Path, device: str = "cpu") -> dict[str, str]:
    outcome = cli("train", recipe, "--store", store, "--device", device, "--json")
    assert outcome.code == 0, outcome.err
    return {entry["run"]: entry["key"] for entry in json.loads(outcome.out)}


def losses_of(store: Path, key: str) -> list[float]:
    training = json.loads((store / "train" / key / "training.json").read_text())
    return [entry["loss"] for entry in training["history"] if "loss" in entry]


@pytest.mark.parametrize("one_tokenizer", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_every_method_trains_from_one_recipe(one_tokenizer: bool, cli: Cli, tmp_path: Path) -> None:
    methods = list(METHODS) if one_tokenizer else ACROSS
    store = tmp_path / "store"
    keys = trained(cli, write_recipe(tmp_path, methods=methods, one_tokenizer=one_tokenizer), store)
    assert set(methods) <= set(keys)
    for name in methods:
        folder = store / "train" / keys[name]
        training = json.loads((folder / "training.json").read_text())
        losses = losses_of(store, keys[name])
        assert len(losses) == training["steps"] > 0
        assert all(-50 < loss < 50 for loss in losses), name
        assert training["seconds"] > 0
        assert training["peak_memory_mib"] > 0
        has_parameters = training["objective_parameters"] > 0
        assert (folder / "objective.safetensors").is_file() == has_parameters


@ON_GPU
@pytest.mark.filterwarnings("default")  # of torch about the device
@pytest.mark.parametrize("one_tokenizer", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_a_gpu_trains_every_method_as_the_cpu_does(one_tokenizer: bool, cli: Cli, tmp_path: Path) -> None:
    """The keys are the same, and the losses of all steps, pretraining of both models included, to rounding."""
    methods = list(METHODS) if one_tokenizer else ACROSS
    recipe = write_recipe(tmp_path, methods=methods, one_tokenizer=one_tokenizer)
    keys = trained(cli, recipe, tmp_path / "cpu")
    assert trained(cli, recipe, tmp_path / "cuda", "cuda") == keys
    for name in methods:
        assert losses_of(tmp_path / "cuda", keys[name]) == pytest.approx(
            losses_of(tmp_path / "cpu", keys[name]), rel=1e-3
        )


@ON_GPU
@pytest.mark.filterwarnings("default")
def test_a_gpu_trains_every_method_in_bfloat16(cli: Cli, tmp_path: Path) -> None:
    """The mean of the losses is that of float32. Not each step's: teachers in bfloat16 may generate other texts."""
    exact = write_recipe(tmp_path, methods=list(METHODS), one_tokenizer=True)
    keys = trained(cli, exact, tmp_path / "store", "cuda")
    rounded = write_recipe(tmp_path, methods=list(METHODS), one_tokenizer=True, precision="bfloat16")
    for name, key in trained(cli, rounded, tmp_path / "store", "cuda").items():
        if name in METHODS:
            assert key != keys[name]
            expected = mean(losses_of(tmp_path / "store", keys[name]))
            assert mean(losses_of(tmp_path / "store", key)) == pytest.approx(expected, rel=0.1), name


def test_a_comparison_token_by_token_is_refused_for_two_tokenizers(cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, methods=["token_kd"], one_tokenizer=False)
    outcome = cli("train", recipe, "--store", tmp_path / "store", "--device", "cpu")
    assert outcome.code == 2
    assert "'token_kd' compares distributions token by token" in outcome.err
    assert not list((tmp_path / "store").glob("*/*")), "refused before anything is computed"


def test_a_step_that_a_fixed_micro_batch_does_not_divide_is_refused_in_the_plan(cli: Cli, tmp_path: Path) -> None:
    fixed = [name for name, made in OBJECTIVES.items() if made.micro_batch is not None]
    assert fixed
    recipe = write_recipe(tmp_path, methods=fixed[:1], one_tokenizer=False)
    recipe.write_text(recipe.read_text().replace("pairs_per_step: 8", "pairs_per_step: 12"))
    outcome = cli("run", recipe, "--store", tmp_path / "store", "--plan")
    assert outcome.code == 2
    assert "micro-batches of 8" in outcome.err


def test_an_exported_student_has_no_parameters_of_its_objective(cli: Cli, tmp_path: Path) -> None:
    methods = [name for name, made in OBJECTIVES.items() if made.objective_learning_rate is not None]
    assert methods
    store = tmp_path / "store"
    keys = trained(cli, write_recipe(tmp_path, methods=methods[:1], one_tokenizer=True), store)
    outcome = cli("export", keys[methods[0]], "--to", tmp_path / "model", "--store", store)
    assert outcome.code == 0, outcome.err
    assert not list((tmp_path / "model").glob("*objective*"))


def test_parameters_of_every_method_have_defaults() -> None:
    for made in OBJECTIVES.values():
        assert made.params_type() == made.params
