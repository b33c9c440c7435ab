"""Compare the numbers of testbed-smoke with those recorded in testbed-smoke.json."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SmokeRun
from tests.regression.record import REFERENCE, environment, measured

# Other machines and thread counts sum in another order. The resulting differences are far below the first limit and have
# both signs, so the second limit, on the mean of the signed differences, is smaller.
MAX_DIFFERENCE = 2e-3
MEAN_RESIDUAL = 2e-4


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(smoke: SmokeRun) -> dict[str, Any]:
    assert smoke.outcome.code == 0, smoke.outcome.err
    return measured(smoke.store)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}/{number}")
    else:
        yield path, value


@pytest.mark.parametrize("part", ["losses", "evaluation_losses", "scores", "weights"])
def test_numbers_are_the_recorded_ones(part: str, recorded: dict[str, Any], found: dict[str, Any]) -> None:
    """No number differs by more than rounding, and the mean difference is close to 0."""
    expected, actual = dict(leaves(recorded[part])), dict(leaves(found[part]))
    assert actual.keys() == expected.keys()
    difference = np.array([actual[name] - expected[name] for name in expected])
    names = list(expected)
    worst = int(np.abs(difference).argmax())
    hint = f"{names[worst]} moved by {difference[worst]:.2e}; recorded with {recorded['env']}, now {environment()}"
    assert np.abs(difference).max() <= MAX_DIFFERENCE, hint
    assert abs(difference.mean()) <= MEAN_RESIDUAL, hint


def test_recording_refuses_a_working_tree_with_changes(tmp_path: Path) -> None:
    """In a repository of its own, with one uncommitted file."""
    script = tmp_path / "tests" / "regression" / "record.py"
    script.parent.mkdir(parents=True)
    script.write_text(Path(REFERENCE).with_name("record.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "commit them first" in done.stdout
    assert not script.with_name(REFERENCE.name).exists()
