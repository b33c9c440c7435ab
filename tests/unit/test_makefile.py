"""`make setup`: the version of Python is checked first, and another version makes the environment anew."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# An interpreter that says its version, and makes environments whose `python` does nothing.
FAKE = """#!/bin/sh
if [ "$1" = -c ]; then echo {version}; exit; fi
echo "$@" >> calls
case "$*" in *--clear*) rm -rf .venv ;; esac
mkdir -p .venv/bin
echo 'version = {version}.4' > .venv/pyvenv.cfg
cp "$0" .venv/bin/python.new && mv .venv/bin/python.new .venv/bin/python
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    if shutil.which("make") is None:
        pytest.skip(reason="there is no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for version in ("3.10", "3.11", "3.12"):
        script = tmp_path / f"python{version}"
        script.write_text(FAKE.format(version=version))
        script.chmod(0o755)
    return tmp_path


def make(project: Path, target: str, python: str | None) -> subprocess.CompletedProcess[str]:
    chosen = [] if python is None else [f"PYTHON=./{python}"]
    environment = {"PATH": f"{project}:/usr/bin:/bin"}
    return subprocess.run(
        ["make", "--silent", target, *chosen], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def made(project: Path) -> list[str]:
    """The environments that were made since the last call."""
    calls = project / "calls"
    found = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [line for line in found if line.startswith("-m venv")]


@pytest.mark.parametrize(("python", "is_what"), [("python3.10", "3.10"), ("nosuch", "not there")])
def test_a_python_that_is_too_old_is_refused_in_one_line(python: str, is_what: str, project: Path) -> None:
    outcome = make(project, "demo", python)
    assert outcome.returncode == 2
    assert outcome.stdout.splitlines() == [
        f"ctpd needs Python 3.11 or later, and ./{python} is {is_what}: run `make demo PYTHON=PATH` with another."
    ]
    assert made(project) == []
    assert not (project / ".venv").exists()


def test_another_version_makes_the_environment_anew_and_the_same_keeps_it(project: Path) -> None:
    assert make(project, "setup", None).returncode == 0
    assert made(project) == ["-m venv --clear .venv"]
    for python in (None, "python3.11"):
        assert make(project, "setup", python).returncode == 0
        assert made(project) == []
    assert make(project, "setup", "python3.12").returncode == 0
    assert made(project) == ["-m venv --clear .venv"]
    assert make(project, "setup", None).returncode == 0  # without PYTHON, the environment that is there
    assert made(project) == []
    assert "3.12" in (project / ".venv" / "pyvenv.cfg").read_text()


def test_an_environment_that_an_old_python_left_is_no_obstacle(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / "pyvenv.cfg").write_text("version = 3.10.13\n")
    assert make(project, "setup", None).returncode == 0
    assert made(project) == ["-m venv --clear .venv"]


def test_new_constraints_install_into_the_same_environment(project: Path) -> None:
    assert make(project, "setup", None).returncode == 0
    made(project)
    stamp = (project / ".venv" / ".installed").stat().st_mtime
    os.utime(project / "constraints.txt", (stamp + 10, stamp + 10))
    assert make(project, "setup", None).returncode == 0
    assert made(project) == ["-m venv .venv"]


def test_clean_needs_no_python(project: Path) -> None:
    assert make(project, "clean", "nosuch").returncode == 0
