"""The benchmark of the step, at a tiny shape: whether both sides run and train the same, never how fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measuring import ROOT
from benchmarks.step import CTPD, DPO, PRECOMPUTED, TRL


def test_both_sides_show_the_same_losses_at_a_tiny_shape(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--only", "default", "--rounds", "1", "--steps", "2"]
    done = subprocess.run([*command, "--to", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "step" / "step.json").read_text())
    found = {name: reported[0] for name, reported in record["measurements"]["default"].items()}
    assert set(found) == {DPO, CTPD, TRL, PRECOMPUTED}
    ours, theirs = found[DPO]["losses"], found[TRL]["losses"]
    assert len(theirs) == 2
    assert ours[:2] == pytest.approx(theirs, abs=1e-5)
    assert found[PRECOMPUTED]["losses"] == pytest.approx(theirs, abs=1e-6)
    assert theirs[0] == pytest.approx(0.693147, abs=1e-6)
    assert abs(theirs[1] - theirs[0]) > 1e-5, "nothing was trained"
    assert (tmp_path / "README.md").exists()
