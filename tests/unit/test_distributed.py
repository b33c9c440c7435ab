"""Scoring and training in several processes give the results of one process."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from ctpd.core.errors import UserError
from ctpd.models import load_model
from ctpd.text.blocks import TokenRows
from ctpd.train.config import FsdpSpec
from ctpd.train.scoring import ScoringSettings, scoring_pass, token_logps
from tests.fixtures import data_parallel, fsdp
from tests.fixtures.launch_processes import launch
from tests.fixtures.tiny import tiny_model


class Found(NamedTuple):
    """The results of each of two processes, and of one process."""

    ranks: tuple[dict[str, Any], dict[str, Any]]
    alone: dict[str, Any]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes for all tests of this module."""
    folder = tmp_path_factory.mktemp("launched")
    launch("tests.fixtures.fsdp", "run_all", folder)
    return folder


@pytest.fixture(scope="module")
def found(launched: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """The scoring passes and trainings of the launch, and of this process."""
    result = {}
    for name in ("scoring_passes", "trainings"):
        alone = tmp_path_factory.mktemp(name)
        getattr(data_parallel, name)(alone)
        first, second = (torch.load(launched / name / f"{rank}.pt", weights_only=False) for rank in (0, 1))
        result[name] = Found((first, second), torch.load(alone / "0.pt", weights_only=False))
    return result


@pytest.mark.parametrize("rows", ["many", "one batch"])
@pytest.mark.parametrize("signal", ["logps", "top"])
def test_a_signal_does_not_depend_on_the_number_of_processes(found: dict[str, Found], rows: str, signal: str) -> None:
    """Bit for bit, also for integers, in each process, and if one process has no batch."""
    expected = found["scoring_passes"].alone[f"{rows}, {signal}"]
    for of_rank in found["scoring_passes"].ranks:
        values = of_rank[f"{rows}, {signal}"]
        assert values.keys() == expected.keys()
        for name in expected:
            assert values[name].dtype == expected[name].dtype
            assert values[name].tobytes() == expected[name].tobytes(), name


def test_a_signal_of_no_rows_is_empty() -> None:
    empty = np.zeros(0, dtype=np.int32)
    rows = TokenRows(empty, np.zeros(1, dtype=np.int64), empty)
    settings = ScoringSettings(max_tokens=8, progress=lambda done, total: None)
    assert scoring_pass(tiny_model(), rows, measure=token_logps, settings=settings) == {}


def test_the_progress_of_a_scoring_pass_counts_the_rows_of_all_processes(found: dict[str, Found]) -> None:
    many = found["scoring_passes"].ranks[0]["many, progress"]
    assert many == sorted(many[: len(many) // 2]) * 2
    assert many[-1] == (18, 18)
    assert found["scoring_passes"].ranks[0]["one batch, progress"] == [(2, 2)] * 2


@pytest.mark.parametrize("name", ["full", "lora", "shared prompts", "dskd_cma"])
def test_two_processes_train_as_one_does(found: dict[str, Found], name: str) -> None:
    """At the same global batch: losses within 1e-5, every metric and evaluation, the weights, in both processes."""
    expected = found["trainings"].alone[name]
    for of_rank in found["trainings"].ranks:
        made = of_rank[name]
        assert len(made["fit"]["history"]) == len(expected["fit"]["history"]) >= 4
        for entry, alone in zip(made["fit"]["history"], expected["fit"]["history"], strict=True):
            assert entry.keys() == alone.keys()
            assert entry.get("loss", 0.0) == pytest.approx(alone.get("loss", 0.0), abs=1e-5)
            assert entry.get("eval_loss", 0.0) == pytest.approx(alone.get("eval_loss", 0.0), abs=1e-5)
            for metric, value in alone.items():
                assert entry[metric] == pytest.approx(value, rel=1e-4, abs=2e-5), metric
        for part in ("weights", "projectors"):
            for key, value in expected.get(part, {}).items():
                torch.testing.assert_close(made[part][key], value, rtol=1e-3, atol=2e-5, msg=key)
        facts = ("micro_batch", "steps", "weights_mib", "trainable_parameters", "parameters", "objective_parameters")
        assert {fact: made["fit"][fact] for fact in facts} == {fact: expected["fit"][fact] for fact in facts}


def test_both_processes_end_with_the_same_weights_bit_for_bit(found: dict[str, Found]) -> None:
    first, second = found["trainings"].ranks
    for name in ("full", "lora", "shared prompts", "dskd_cma"):
        for key, value in first[name]["weights"].items():
            assert torch.equal(value, second[name]["weights"][key]), key
        assert first[name]["fit"]["history"] == second[name]["fit"]["history"]


def test_peak_memory_is_the_largest_of_the_processes(found: dict[str, Found]) -> None:
    first, second = (of_rank["full"]["fit"]["peak_memory_mib"] for of_rank in found["trainings"].ranks)
    assert first == second
    assert first > 100


def test_an_interrupted_training_of_two_processes_goes_on_bit_for_bit(launched: Path, found: dict[str, Found]) -> None:
    """Rank 0 decides when the state is written; the other process's clock never requests one."""
    for rank, straight in enumerate(found["trainings"].ranks):
        made = torch.load(launched / "interrupted" / f"{rank}.pt", weights_only=False)
        assert made["resumed"]["steps"] == [5, 6, 7, 8]
        assert made["resumed"]["fit"]["history"] == straight["full"]["fit"]["history"]
        for key, value in straight["full"]["weights"].items():
            assert torch.equal(made["resumed"]["weights"][key], value), key
    states = torch.load(launched / "interrupted" / "0.pt", weights_only=False)["states"]
    assert states == [f"stopped/checkpoint-4/rng_state_{rank}.pth" for rank in (0, 1)]


def test_a_signal_to_one_process_stops_all_of_them_after_a_state_and_a_damaged_state_is_used_by_none(
    launched: Path, found: dict[str, Found]
) -> None:
    for rank, straight in enumerate(found["trainings"].ranks):
        made = torch.load(launched / "signalled" / f"{rank}.pt", weights_only=False)
        assert made["code"] == 143
        assert made["states"] == ["checkpoint-3"]
        assert made["resumed"]["steps"] == [4, 5, 6, 7, 8]
        assert len(made["afresh"]["notes"]) == (2 if rank == 0 else 0)
        for name in ("resumed", "afresh"):
            for key, value in straight["full"]["weights"].items():
                assert torch.equal(made[name]["weights"][key], value), (name, key)


def test_a_loss_that_is_not_finite_in_one_process_stops_both_with_the_same_words(found: dict[str, Found]) -> None:
    first, second = (of_rank["not finite"] for of_rank in found["trainings"].ranks)
    assert first == second
    assert first.startswith("the loss is not finite at step 2 of 2, whose pairs are 'item ")


def test_fsdp_is_refused_for_one_process_and_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one process"):
        data_parallel.train(tiny_model(), tmp_path, fsdp=FsdpSpec())


def test_fsdp_on_cpus_is_refused_where_accelerate_would_copy_the_model(launched: Path) -> None:
    for rank in (0, 1):
        refused = torch.load(launched / "refused" / f"{rank}.pt", weights_only=False)
        assert "accelerate would train with MULTI_CPU here" in refused["on a CPU"]
        assert "parameters of its own" in refused["own parameters"]


def of_ranks(launched: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(launched / name / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize(("name", "plan"), fsdp.SHARED)
def test_sharded_weights_give_the_loss_and_gradients_of_unsharded_ones(launched: Path, name: str, plan: str) -> None:
    """`fully_shard`: the scorer reads the output embedding's weight without calling the module, so it must be gathered, and get
    its gradient. Checked twice: each pass follows one without gradients, which leaves some weights gathered.
    """
    expected = fsdp.expected(name)
    for rank, of_rank in enumerate(of_ranks(launched, "passes")):
        made = of_rank[f"{name}, {plan}"]
        assert made["parameters"] == {"DTensor"}
        torch.testing.assert_close(made["logps"], expected["logps"][rank], rtol=1e-6, atol=2e-6)
        for objective, kind in (
            ("pairs", "pairs"),
            ("shared prompts", "shared prompts"),
            ("kd", "kd"),
            ("again", "pairs"),
        ):
            whole = expected["passes"][kind]
            assert made[objective]["losses"] == pytest.approx([whole["losses"][rank]], abs=5e-6)
            for key, gradient in whole["gradients"].items():
                if gradient is None:
                    assert made[objective]["gradients"][key] is None
                else:
                    torch.testing.assert_close(made[objective]["gradients"][key], gradient, rtol=1e-5, atol=5e-6)


def assert_close_histories(made: list[dict[str, float]], expected: list[dict[str, float]], *, abs: float) -> None:
    assert len(made) == len(expected) == 6
    for entry, alone in zip(made, expected, strict=True):
        assert entry.keys() == alone.keys()
        for metric, value in alone.items():
            assert entry[metric] == pytest.approx(value, rel=abs, abs=abs), metric


@pytest.mark.parametrize("name", ["untied", "tied", "lora"])
def test_fsdp_trains_and_exports_what_one_process_does(launched: Path, tmp_path: Path, name: str) -> None:
    """accelerate's own path, on CPUs that are presented as GPUs; `GpuTrainer` asserts that accelerate uses FSDP."""
    alone = fsdp.trained(tmp_path, name)
    for of_rank in of_ranks(launched, "accelerated"):
        assert of_rank[name]["parameters"] == {"DTensor"}
        assert_close_histories(of_rank[name]["history"], alone["history"], abs=2e-5)
    exported, expected = launched / "accelerated" / name / "model", tmp_path / "model"
    assert {path.name for path in exported.iterdir()} == {path.name for path in expected.iterdir()}
    weights = next(expected.glob("*.safetensors"))
    made, whole = load_file(exported / weights.name), load_file(weights)
    assert made.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(made[key], value, rtol=1e-3, atol=2e-5, msg=key)
    if name != "lora":
        loaded = load_model(exported, precision="float32", device="cpu")
        assert all(torch.equal(parameter, made[key]) for key, parameter in loaded.named_parameters())


def test_fsdp_rounds_to_bfloat16_where_one_process_does(launched: Path, tmp_path: Path) -> None:
    """Weights are gathered as float32 under autocast, checkpointed layers too; accelerate's default rounds everything."""
    alone = fsdp.trained(tmp_path, "untied", precision="bfloat16")
    exact = fsdp.trained(tmp_path / "exact", "untied")
    for of_rank in of_ranks(launched, "accelerated"):
        assert_close_histories(of_rank["bfloat16"]["history"], alone["history"], abs=1e-3)
    assert abs(exact["history"][0]["logps/chosen"] - alone["history"][0]["logps/chosen"]) > 2e-3


def test_an_interrupted_training_under_fsdp_goes_on_bit_for_bit(launched: Path) -> None:
    for of_rank in of_ranks(launched, "accelerated"):
        assert of_rank["states"] == ["checkpoint-2"]
        assert of_rank["resumed"]["history"] == of_rank["untied"]["history"]
    straight, resumed = (
        load_file(launched / "accelerated" / name / "model/model.safetensors") for name in ("untied", "resumed")
    )
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP needs two GPUs")
def test_fsdp_on_gpus_trains_exports_and_reloads(tmp_path: Path) -> None:
    launch("tests.fixtures.fsdp", "on_gpus", tmp_path)
    for of_rank in of_ranks(tmp_path, "."):
        assert of_rank["types"] == [DistributedType.FSDP] * 3
        for name in ("untied", "tied", "lora"):
            alone = fsdp.trained(tmp_path / f"{name}-alone", name)
            assert of_rank[name]["parameters"] == {"DTensor"}
            assert_close_histories(of_rank[name]["history"], alone["history"], abs=1e-3)
            exported, expected = tmp_path / name / "model", tmp_path / f"{name}-alone" / "model"
            weights = next(expected.glob("*.safetensors"))
            made, whole = load_file(exported / weights.name), load_file(weights)
            assert made.keys() == whole.keys()
            for key, value in whole.items():
                torch.testing.assert_close(made[key], value, rtol=1e-2, atol=1e-3, msg=key)
            if name != "lora":
                loaded = load_model(exported, precision="float32", device="cpu")
                assert all(torch.equal(parameter, made[key]) for key, parameter in loaded.named_parameters())
