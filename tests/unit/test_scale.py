"""Several processes: what is dealt to them gives what one of them gives."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ctpd.core.errors import UserError
from ctpd.core.recipe import FsdpSpec
from tests.fixtures import together
from tests.fixtures.ranks import launch
from tests.fixtures.tiny import tiny_model, tiny_rows


class Found(NamedTuple):
    """What each of two processes wrote, and what one process alone writes."""

    ranks: tuple[dict[str, Any], dict[str, Any]]
    alone: dict[str, Any]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes for all tests of this module."""
    folder = tmp_path_factory.mktemp("launched")
    launch("tests.fixtures.together", "all_of_ddp", folder)
    return folder


@pytest.fixture(scope="module")
def found(launched: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """The sweeps and trainings of the launch, and of this process."""
    result = {}
    for name in ("sweeps", "trainings"):
        alone = tmp_path_factory.mktemp(name)
        getattr(together, name)(alone)
        first, second = (torch.load(launched / name / f"{rank}.pt", weights_only=False) for rank in (0, 1))
        result[name] = Found((first, second), torch.load(alone / "0.pt", weights_only=False))
    return result


@pytest.mark.parametrize("rows", ["many", "one batch"])
@pytest.mark.parametrize("signal", ["logps", "top"])
def test_a_signal_does_not_depend_on_the_number_of_processes(found: dict[str, Found], rows: str, signal: str) -> None:
    """Bit for bit, integers too, in each process, and where one of them has no batch at all."""
    expected = found["sweeps"].alone[f"{rows}, {signal}"]
    for of_rank in found["sweeps"].ranks:
        values = of_rank[f"{rows}, {signal}"]
        assert values.keys() == expected.keys()
        for name in expected:
            assert values[name].dtype == expected[name].dtype
            assert values[name].tobytes() == expected[name].tobytes(), name


def test_a_signal_of_no_rows_is_empty() -> None:
    empty = np.zeros(0, dtype=np.int32)
    made = together.sweep(
        tiny_model(), empty, np.zeros(1, dtype=np.int64), empty > 0, measure=together.log_probabilities, max_tokens=8,
        progress=lambda done, total: None,
    )  # fmt: skip
    assert made == {}


def test_the_progress_of_a_sweep_counts_the_rows_of_all_processes(found: dict[str, Found]) -> None:
    many = found["sweeps"].ranks[0]["many, progress"]
    assert many == sorted(many[: len(many) // 2]) * 2
    assert many[-1] == (18, 18)
    assert found["sweeps"].ranks[0]["one batch, progress"] == [(2, 2)] * 2


@pytest.mark.parametrize("name", ["full", "lora", "dskd_cma"])
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
    for name in ("full", "lora", "dskd_cma"):
        for key, value in first[name]["weights"].items():
            assert torch.equal(value, second[name]["weights"][key]), key
        assert first[name]["fit"]["history"] == second[name]["fit"]["history"]


def test_peak_memory_is_the_largest_of_the_processes(found: dict[str, Found]) -> None:
    first, second = (of_rank["full"]["fit"]["peak_memory_mib"] for of_rank in found["trainings"].ranks)
    assert first == second
    assert first > 100


def test_an_interrupted_training_of_two_processes_goes_on_bit_for_bit(launched: Path, found: dict[str, Found]) -> None:
    """The state is written by the first one's clock: the other one's never asks."""
    for rank, straight in enumerate(found["trainings"].ranks):
        made = torch.load(launched / "interrupted" / f"{rank}.pt", weights_only=False)
        assert made["resumed"]["steps"] == [5, 6, 7, 8]
        assert made["resumed"]["fit"]["history"] == straight["full"]["fit"]["history"]
        for key, value in straight["full"]["weights"].items():
            assert torch.equal(made["resumed"]["weights"][key], value), key
    states = torch.load(launched / "interrupted" / "0.pt", weights_only=False)["states"]
    assert states == [f"stopped/checkpoint-4/rng_state_{rank}.pth" for rank in (0, 1)]


def test_a_loss_that_is_no_number_is_seen_in_a_sum_over_processes(found: dict[str, Found]) -> None:
    for of_rank in found["trainings"].ranks:
        assert not any(math.isnan(value) for entry in of_rank["full"]["fit"]["history"] for value in entry.values())
        assert all(math.isnan(entry["loss"]) for entry in of_rank["nan"]["fit"]["history"] if "loss" in entry)


def test_fsdp_is_refused_for_one_process_and_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one process"):
        together.train(tiny_model(), tmp_path, fsdp=FsdpSpec())


def test_fsdp_on_cpus_is_refused_where_accelerate_would_copy_the_model(launched: Path) -> None:
    for rank in (0, 1):
        refused = torch.load(launched / "refused" / f"{rank}.pt", weights_only=False)
        assert "accelerate would train with MULTI_CPU here" in refused["on a CPU"]
        assert "parameters of its own" in refused["own parameters"]
