"""Fuzz each target of `tests/faults` for some minutes, with a new seed every time, and print how many examples that were.

    make fuzz MINUTES=10
    python scripts/fuzz.py --minutes 10 test_fuzz_alignment.py::test_spans_of_cut_bytes

A target is run again and again, with seed 0, 1, 2, ..., until its examples have taken that long, the start of pytest not
counted. It stops at its first finding, whose output is shown; the exit code is then 1.
"""

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILES = ("tests/faults/test_fuzz.py", "tests/faults/test_fuzz_alignment.py")
# What `--hypothesis-show-statistics` prints of each phase: in which time, and how many examples passed.
PHASE = re.compile(r"during \w+ phase \(([\d.]+) seconds\):(?:(?!during).)*?(\d+) passing", re.DOTALL)
FIRST, MOST = 200, 50_000  # examples of the first run, which tells how long one takes, and of any run


class Fuzzed(NamedTuple):
    """What was done with one target: examples that it was called with, seconds, and the output of a finding."""

    examples: int
    seconds: float
    finding: str | None


def pytest(*options: str, examples: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CTPD_FUZZ_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def targets(chosen: list[str]) -> list[str]:
    """The test ids of all targets whose id ends with one of ``chosen``; all for none."""
    listed = pytest("--collect-only", *FILES).stdout.splitlines()
    found = [line for line in listed if "::" in line]
    return [target for target in found if not chosen or any(target.endswith(name) for name in chosen)]


def fuzz(target: str, *, seconds: float) -> Fuzzed:
    seed, done, took = 0, 0, 0.0
    while took < seconds:
        wanted = FIRST if not done else min(MOST, math.ceil((seconds - took) * done / took))
        ran = pytest(target, f"--hypothesis-seed={seed}", "--hypothesis-show-statistics", examples=wanted)
        phases = PHASE.findall(ran.stdout)
        done += sum(int(passing) for _, passing in phases)
        took += sum(float(phase) for phase, _ in phases)
        if ran.returncode:
            return Fuzzed(done, took, ran.stdout + ran.stderr)
        if not took:
            sys.exit(f"{target} has run no example:\n{ran.stdout}{ran.stderr}")
        seed += 1
    return Fuzzed(done, took, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="ends of test ids; default: all")
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    options = parser.parse_args()
    findings = 0
    print("| target | minutes | examples | findings |\n| --- | ---: | ---: | ---: |")
    for target in targets(options.targets):
        result = fuzz(target, seconds=60 * options.minutes)
        found = int(result.finding is not None)
        findings += found
        name = target.rpartition("::")[2]
        print(f"| `{name}` | {result.seconds / 60:.1f} | {result.examples:,} | {found} |", flush=True)
        if result.finding:
            print(result.finding, file=sys.stderr, flush=True)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
