"""`ctpd doctor --deterministic`: what two trainings have written is compared file by file."""

import json
from pathlib import Path

import pytest

from ctpd.cli import determinism
from ctpd.cli.determinism import Compared
from ctpd.core.errors import UserError
from tests.conftest import Cli
from tests.fixtures.stages import small_stage


def nothing(*_: object) -> None: ...


def written(store: Path, stage: object, *, loss: float, weights: bytes, seconds: float) -> Path:
    folder = store / stage.kind / stage.key  # type: ignore[attr-defined]
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    (folder / "manifest.json").write_text(json.dumps({"time": seconds}))
    (folder / "training.json").write_text(json.dumps({"history": [{"loss": loss, "step": 1}], "seconds": seconds}))
    return store


@pytest.mark.parametrize(
    ("loss", "weights", "expected"),
    [
        (2.0, b"same", Compared("a", (), 0.0)),
        (2.5, b"same", Compared("a", ("training.json",), 0.2)),
        (2.0, b"other", Compared("a", ("model/model.safetensors",), 0.0)),
    ],
)
def test_weights_and_logged_numbers_are_compared_and_seconds_are_not(
    loss: float, weights: bytes, expected: Compared, tmp_path: Path
) -> None:
    stage = small_stage("a", nothing)
    stores = [
        written(tmp_path / "first", stage, loss=2.0, weights=b"same", seconds=1.0),
        written(tmp_path / "second", stage, loss=loss, weights=weights, seconds=2.0),
    ]
    assert list(determinism._compared([stage, small_stage("b", nothing)], stores)) == [expected]


def test_a_difference_is_named_and_ends_with_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Compared("SFT of the student", ("model/model.safetensors",), 1e-7), Compared("pairs", (), 0.0)]
    monkeypatch.setattr(determinism, "twice", lambda: made)
    outcome = cli("doctor", "--deterministic")
    assert outcome.code == 1
    assert "of its 2 stages 1 differ" in outcome.out
    assert "SFT of the student: model/model.safetensors; logged numbers differ by up to 1.0e-07" in outcome.out


def test_a_training_that_fails_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exit code 2: .*there is no recipe"):
        determinism._train(tmp_path / "none.yaml", tmp_path / "store")
