"""A process that is killed at any of its file events leaves a whole artifact or none, and the next one completes it."""

import subprocess
import sys
from pathlib import Path

from tests.fixtures.tried import Tried
from tests.fixtures.waiting import HANGS

ROOT = Path(__file__).resolve().parents[2]


def test_a_kill_at_every_file_event_of_building_removing_and_rebuilding(tmp_path: Path, tried: Tried) -> None:
    command = [sys.executable, "-m", "tests.fixtures.killed_store", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60
    tried("kills at file events of the store", int(done.stdout))
