"""`ctpd doctor --deterministic`: one small training, twice, each in a process and a folder of its own."""

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctpd.cli.children import ending, start_own
from ctpd.core.errors import UserError

if TYPE_CHECKING:
    from ctpd.pipeline.stage import Stage

RUN = "DPO"
_STEPS, _PAIRS = 6, 32  # of the pretraining, and for the training: seconds


class Compared(NamedTuple):
    """A stage whose artifact was made twice: its name, the files that are not bitwise equal, and how far losses are apart.

    ``gap`` is the largest difference of two logged numbers, relative to the larger one; 0 of a stage that logs none.
    """

    stage: str
    differing: tuple[str, ...]
    gap: float


def small_recipe() -> dict[str, Any]:
    """The recipe of the row DPO of `testbed-smoke`, with fewer steps and pairs."""
    from ctpd.recipe import load_recipe
    from harness.reproduction import own_recipe

    recipe = load_recipe("testbed-smoke")
    found = own_recipe(recipe, run=RUN, seed=0, spec=recipe.runs[RUN])
    shared = found["shared"]
    shared["testbed"] |= {"num_pairs": _PAIRS, "teacher_texts": 200}
    for role in ("teacher", "student"):
        shared[role]["pretrain"]["steps"] = _STEPS
    return found


def twice() -> list[Compared]:
    """Train twice and compare what both have written, stage by stage in the order in which they were made.

    Raises:
        UserError: one of the trainings failed.
    """
    from ctpd.app import Experiment
    from ctpd.pipeline.graph import Graph

    with tempfile.TemporaryDirectory(prefix="ctpd-doctor-") as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(json.dumps(small_recipe()), encoding="utf-8")
        stores = [Path(folder) / name for name in ("first", "second")]
        for store in stores:
            _train(recipe, store)
        return list(_compared(Graph(Experiment(recipe).training).stages, stores))


def _train(recipe: Path, store: Path) -> None:
    errors = store.with_suffix(".err")
    with errors.open("wb") as stderr:
        arguments = ["train", str(recipe), "--store", str(store), "--quiet"]
        process = start_own(arguments, {}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
        with ending([process]):
            code = process.wait()
    if code:
        said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        raise UserError(f"the training ended with exit code {code}: {said[-1]}", where="ctpd doctor --deterministic")


def _compared(stages: "Sequence[Stage]", stores: Sequence[Path]) -> Iterator[Compared]:
    for stage in stages:
        folders = [store / stage.kind / stage.key for store in stores]
        if not any(folder.is_dir() for folder in folders):  # nothing of it was needed
            continue
        left, right = map(_digests, folders)
        differing = tuple(sorted(name for name in left | right if left.get(name) != right.get(name)))
        yield Compared(stage.label, differing, _gap(*folders))


def _digests(folder: Path) -> dict[str, str]:
    """The digest of each file of an artifact; of a training's history that of its numbers, without the seconds it took."""
    from ctpd.core.manifests import MANIFEST
    from ctpd.pipeline.references import TRAINING

    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != MANIFEST:
            content = json.dumps(_history(folder)).encode() if name == TRAINING else path.read_bytes()
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def _history(folder: Path) -> list[dict[str, float]]:
    from ctpd.pipeline.references import TRAINING

    path = folder / TRAINING
    history: list[dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))["history"] if path.is_file() else []
    return history


def _gap(*folders: Path) -> float:
    """How far the numbers that two trainings have logged are apart."""
    left, right = map(_history, folders)
    pairs = [(one[name], other[name]) for one, other in zip(left, right, strict=False) for name in one if name in other]
    return max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a != b), default=0.0)
