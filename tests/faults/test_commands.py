"""What the command line says and leaves when a training is stopped, its state is damaged, or its numbers are not finite."""

import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ctpd.core.store import RESUME_FOLDER, Store
from ctpd.recipe.load import shipped_recipes
from ctpd.train.callbacks import ReportProgress
from tests.conftest import Cli, SmokeRun
from tests.fixtures.data_parallel import flip_byte


@pytest.fixture
def store(smoke: SmokeRun, tmp_path: Path) -> Store:
    """A copy of the finished store."""
    assert smoke.outcome.code == 0, smoke.outcome.err
    shutil.copytree(smoke.pristine, tmp_path / "store")
    return Store(tmp_path / "store")


def command(store: Store, *words: object) -> tuple[object, ...]:
    return ("train", *words, "--store", store.root, "--device", "cpu")


@pytest.mark.parametrize("damaged", [False, True])
def test_sigterm_leaves_a_state_and_a_damaged_one_is_not_used(
    damaged: bool, store: Store, smoke: SmokeRun, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = min((one for one in store.artifacts() if one.stage == "train"), key=lambda one: one.key)
    store.remove(train.stage, train.key)
    report = ReportProgress.on_step_end

    def interrupted(self: ReportProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report(self, args, state, control, **kwargs)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(ReportProgress, "on_step_end", interrupted)
        stopped = cli(*command(store, "testbed-smoke"))
    assert stopped.code == 128 + signal.SIGTERM
    assert "Stopping after a resume state is written" in stopped.err
    states = store.partial(train.stage, train.key) / RESUME_FOLDER
    assert [path.name for path in states.iterdir()] == ["checkpoint-2"]
    if damaged:
        flip_byte(next(states.rglob("optimizer.pt")))
    again = cli(*command(store, "testbed-smoke"))
    assert again.code == 0, again.err
    assert (
        "The resume state of step 2 is not used: the contents of optimizer.pt have changed." in again.err
    ) == damaged
    weights = sorted(path.relative_to(train.path) for path in train.path.rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert (train.path / path).read_bytes() == (smoke.store / train.stage / train.key / path).read_bytes()
    assert not (train.path / RESUME_FOLDER).exists()


def test_a_training_that_diverges_ends_with_a_paragraph_and_leaves_no_artifact(
    store: Store, cli: Cli, tmp_path: Path
) -> None:
    text = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")
    recipe = tmp_path / "diverging.yaml"
    recipe.write_text(
        text.replace("DPO: {method: dpo, tuned: {learning_rate: 1e-3", "DPO: {method: dpo, tuned: {learning_rate: 1e9")
    )
    before = {one.path for one in store.artifacts()}
    outcome = cli(*command(store, recipe, "--only", "DPO"))
    assert outcome.code == 2
    error = next(line for line in outcome.err.splitlines() if line.startswith("Error: "))
    assert re.search(r"not finite at step \d+ of 4, whose pairs are '", error), error
    assert "Lower the learning rate, which is 1e+09" in error
    assert {one.path for one in store.artifacts()} == before


@pytest.mark.parametrize("kind", ["a weight that is NaN", "logits that overflow"])
def test_a_model_whose_numbers_are_not_finite_gets_no_score(kind: str, store: Store, cli: Cli, tmp_path: Path) -> None:
    model = shutil.copytree(next(store.root.glob("pretrain/*/model")), tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][0] = math.nan if kind == "a weight that is NaN" else 3e38
    state["model.embed_tokens.weight"][:, 0] *= 1e3
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    hub = next(store.root.glob("world/*/hub"))
    before = {one.path for one in store.artifacts()}
    words = ("--model", model, "--suite", "testbed", "--data-root", hub, "--store", store.root, "--device", "cpu")
    outcome = cli("eval", *words)
    assert outcome.code == 2
    error = next(line for line in outcome.err.splitlines() if line.startswith("Error: "))
    said = (
        "the weight model.norm.weight of the model holds NaN" if "NaN" in kind else "logits of the model are not finite"
    )
    assert said in error
    assert {one.path for one in store.artifacts()} == before
