"""`--device`: an existing device is used, also by the training; anything else is refused before the first stage."""

import os

import pytest
import torch

from ctpd.cli.options import prepare
from ctpd.core.errors import UserError
from ctpd.pipeline.runtime import Runtime, check_device
from ctpd.train.fit import _refuse_other_device
from tests.conftest import Cli


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # undone afterwards, whatever `prepare` sets


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("gpu", "`--device gpu` is not a device. Give auto, cpu, cuda, cuda:N or mps"),
        ("cuda:x", "is not a device"),
        ("cuda", "asks for a GPU, and torch finds none here"),
        ("cuda:1", "asks for a GPU, and torch finds none here"),
        ("mps", "no `mps` device"),
    ],
)
def test_a_device_that_is_not_here_is_refused(device: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=text):
        check_device(device)


@pytest.mark.usefixtures("two_gpus")
def test_a_number_beyond_the_gpus_is_refused() -> None:
    check_device("cuda:1")
    with pytest.raises(UserError, match="torch finds 2 here"):
        check_device("cuda:2")
    assert Runtime(device="cuda:1").torch_device() == "cuda:1"


def test_the_command_line_shows_the_libraries_the_named_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer uses the first visible GPU, so only this one must be visible."""
    assert prepare(offline=False, device="cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6f")
    assert prepare(offline=False, device="cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-6f"
    assert prepare(offline=False, device="cuda:1") == "cuda:1"  # one is visible: `check_device` refuses the second
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert prepare(offline=False, device="cuda:1") == "cuda:1"
    for device in ("auto", "cpu", "cuda"):
        assert prepare(offline=False, device=device) == device


def test_a_training_on_another_gpu_than_the_one_asked_for_is_refused() -> None:
    for chosen, wanted in (("cpu", "cpu"), ("cuda:0", "cuda"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")):
        _refuse_other_device(torch.device(chosen), wanted)
    with pytest.raises(UserError, match=r"would run on cuda:0, not on cuda:1.*CUDA_VISIBLE_DEVICES=1"):
        _refuse_other_device(torch.device("cuda:0"), "cuda:1")


@pytest.mark.parametrize("device", ["gpu", "cuda:7"])
def test_a_wrong_device_is_said_before_the_first_stage(
    device: str, cli: Cli, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = cli("train", "testbed-smoke", "--store", f"{tmp_path}/store", "--device", device)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: `--device ")
    assert outcome.err.count("\n") == 1
    assert not os.path.exists(f"{tmp_path}/store")


def test_one_device_for_several_processes_is_refused_where_they_are_started(cli: Cli, tmp_path: object) -> None:
    outcome = cli("train", "testbed-smoke", "--store", f"{tmp_path}/s", "--device", "cuda:1", "--num-processes", 2)
    assert outcome.code == 2
    assert "names one device for all 2 processes" in outcome.err
