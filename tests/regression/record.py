"""Record the losses and scores of testbed-smoke, for `test_smoke.py` to compare with.

Run `make record-regression` after a change that is meant to change numbers, and explain the change in CHANGELOG.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.record import LogEntry

RECIPE = "testbed-smoke"
REFERENCE = Path(__file__).with_name(f"{RECIPE}.json")
ROOT = Path(__file__).resolve().parents[2]
DIGITS = 7  # significant; float32 has no more
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "lm_eval", "numpy")


def measured(store: Path) -> dict[str, Any]:
    """Every step's loss of every training, and every score, from the records of a finished store."""
    from ctpd.app import Experiment, read_records
    from ctpd.core.store import Store

    records = read_records(Experiment(RECIPE), Store(store))
    return {
        "losses": {r.run: _losses(r.training.history) for r in records if r.training is not None},
        "evaluation_losses": {
            r.run: _losses(r.training.history, "eval_loss") for r in records if r.training is not None
        },
        "scores": {r.run: {name: _round(c.value) for name, c in r.evaluation.items()} for r in records},
        "weights": {r.run: _round(r.weights.mean) for r in records if r.weights is not None},
    }


def environment() -> dict[str, Any]:
    """What can change a number besides the source."""
    from ctpd.pipeline.runtime import versions

    found = versions()
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: found[name] for name in PACKAGES},
    }


def _losses(history: "Iterable[LogEntry]", name: str = "loss") -> list[float]:
    return [_round(entry.metrics[name]) for entry in history if name in entry.metrics]


def _round(value: float | None) -> float:
    assert value is not None, "not finite"
    return float(f"{value:.{DIGITS}g}")


def _changes() -> str:
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", f":!{REFERENCE.relative_to(ROOT)}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow-dirty", action="store_true", help="record although the working tree has changes")
    arguments = parser.parse_args()
    if not arguments.allow_dirty and (changes := _changes()):
        print(f"The working tree has changes; commit them first, so that the numbers have a source:\n{changes}")
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"
    from ctpd.app import run
    from ctpd.pipeline.runtime import Runtime

    with tempfile.TemporaryDirectory() as folder:
        run(RECIPE, store=folder, runtime=Runtime(device="cpu"), quiet=False)
        content = {"env": environment(), **measured(Path(folder))}
    REFERENCE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {REFERENCE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
