"""`ctpd doctor --deterministic` on this machine: two trainings in two folders give the same bytes."""

import json
from pathlib import Path

import pytest

from ctpd.cli import determinism
from tests.conftest import Cli


def test_a_training_made_twice_is_the_same(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in one process, which spares the start of two others."""

    def train(recipe: Path, store: Path) -> None:
        assert cli("train", recipe, "--store", store, "--quiet").code == 0

    monkeypatch.setattr(determinism, "_train", train)
    outcome = cli("doctor", "--deterministic", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["deterministic"]["same"]
    assert len(found["deterministic"]["stages"]) >= 5
    assert found["threads"] >= 1
    assert "torch" in found["versions"]
