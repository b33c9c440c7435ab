"""The graph: what a key depends on, what is built, and damaged artifacts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from baselines.dpo import DPO, DPOParams
from ctpd.app import Experiment
from ctpd.core.errors import DamagedArtifact
from ctpd.core.store import Store
from ctpd.pipeline.build import build_missing
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.references import External
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage, Work
from tests.fixtures.stages import SmallStage, small_stage


class Recorder:
    """Makes stages whose builds are recorded and concatenate their inputs."""

    def __init__(self) -> None:
        self.built: list[str] = []

    def stage(
        self,
        name: str,
        *inputs: Stage,
        config: Mapping[str, Any] | None = None,
        external: tuple[External, ...] = (),
        version: int = 1,
        label: str | None = None,
    ) -> Stage:
        def build(stage: Stage, work: Work) -> None:
            self.built.append(name)
            parts = [(work.path(source) / "text").read_text() for source in inputs]
            (work.folder / "text").write_text(name + "(" + ",".join(parts) + ")")

        return small_stage(name, build, *inputs, config=config or {}, external=external, version=version, label=label)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def run(store: Store, *targets: Stage, rebuild: bool = False) -> int:
    return build_missing(
        Graph(targets), store, runtime=Runtime(device="cpu"), progress=Progress(quiet=True), rebuild=rebuild
    )


def test_key_changes_with_everything_that_decides_the_result(recorder: Recorder) -> None:
    base, other = recorder.stage("base"), recorder.stage("base", config={"x": 1})
    stages = [
        recorder.stage("a", base),
        recorder.stage("a", base, config={"x": 1}),
        recorder.stage("a", base, config={"x": 1.5}),
        recorder.stage("a", base, version=2),
        recorder.stage("a", base, external=(External("data", "1"),)),
        recorder.stage("a", other),
        recorder.stage("a"),
        recorder.stage("b", base),
    ]
    assert len({stage.key for stage in stages}) == len(stages)


def test_key_ignores_the_label_and_the_order_of_settings(recorder: Recorder) -> None:
    first = recorder.stage("a", config={"x": 1, "y": 2}, label="one")
    assert first.key == recorder.stage("a", config={"y": 2, "x": 1}, label="two").key
    assert len(first.key) == 32


def test_key_ignores_the_path_of_an_outside_file(recorder: Recorder) -> None:
    first, second = (recorder.stage("a", external=(External(location, "1"),)) for location in ("here", "there"))
    assert first.key == second.key


def test_a_field_at_its_default_is_left_out_of_the_key() -> None:
    """Therefore a new field changes no key."""

    @dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
    class Grown(SmallStage):
        added: int = 3

    plain = SmallStage(label="")
    assert Grown(label="").key == plain.key
    assert Grown(label="", added=4).key != plain.key


def test_a_build_that_reads_what_is_not_in_the_key_fails(recorder: Recorder, store: Store) -> None:
    """The label, and a stage that is not an input."""
    stranger = recorder.stage("stranger")

    def reads_label(stage: Stage, work: Work) -> None:
        (work.folder / "text").write_text(stage.label)

    def reads_other_stage(stage: Stage, work: Work) -> None:
        work.path(stranger)

    with pytest.raises(AttributeError, match="label"):
        run(store, small_stage("a", reads_label))
    with pytest.raises(LookupError, match="not part of the key"):
        run(store, stranger, small_stage("b", reads_other_stage))
    assert [artifact.stage for artifact in store.artifacts()] == ["stranger"]


def test_a_field_without_a_canonical_form_has_no_key() -> None:
    with pytest.raises(TypeError, match="cannot be part of a key"):
        _ = small_stage("a", lambda stage, work: None, config={"x": object()}).key


def test_each_stage_is_built_once_after_its_inputs(recorder: Recorder, store: Store) -> None:
    base = recorder.stage("base")
    left, right = recorder.stage("left", base), recorder.stage("right", base)
    top = recorder.stage("top", left, right)
    assert run(store, top, left) == 4
    assert recorder.built == ["base", "left", "right", "top"]
    assert (store.open("top", top.key) / "text").read_text() == "top(left(base()),right(base()))"


def test_second_run_is_all_hits(recorder: Recorder, store: Store) -> None:
    top = recorder.stage("top", recorder.stage("base"))
    run(store, top)
    assert run(store, top) == 0
    assert recorder.built == ["base", "top"]
    assert all(line.hit for line in Graph([top]).plan(store))


def test_input_of_a_hit_is_not_needed(recorder: Recorder, store: Store) -> None:
    base = recorder.stage("base")
    top = recorder.stage("top", base)
    run(store, top)
    store.remove("base", base.key)
    assert run(store, top) == 0
    assert run(store, recorder.stage("next", top)) == 1
    assert not store.has("base", base.key)


def test_failed_stage_keeps_what_is_finished(recorder: Recorder, store: Store) -> None:
    def fail(stage: Stage, work: Work) -> None:
        raise RuntimeError("no")

    base = recorder.stage("base")
    with pytest.raises(RuntimeError):
        run(store, small_stage("top", fail, base))
    assert store.has("base", base.key)
    assert run(store, recorder.stage("top", base)) == 1


def damage(store: Store, stage: Stage) -> None:
    (store.path(stage.kind, stage.key) / "text").write_text("?")


def test_damage_is_refused_before_anything_is_built(recorder: Recorder, store: Store) -> None:
    """The damaged artifact is an input of the third stage; the second, which could be built, is not."""
    base = recorder.stage("base")
    run(store, base)
    damage(store, base)
    recorder.built.clear()
    with pytest.raises(DamagedArtifact, match=base.key):
        run(store, recorder.stage("second"), recorder.stage("third", base))
    assert recorder.built == []


def test_rebuild_builds_the_damaged_artifact_and_its_missing_inputs(recorder: Recorder, store: Store) -> None:
    base = recorder.stage("base")
    top = recorder.stage("top", base)
    run(store, top)
    damage(store, top)
    damage(store, base)
    recorder.built.clear()
    assert run(store, top, rebuild=True) == 2
    assert recorder.built == ["base", "top"]
    assert run(store, top) == 0


def test_damaged_artifact_that_nothing_needs_is_left_alone(recorder: Recorder, store: Store) -> None:
    base = recorder.stage("base")
    top = recorder.stage("top", base)
    run(store, top)
    damage(store, base)
    assert run(store, top) == 0


SMOKE = "testbed-smoke"


def edited(tmp_path: Path, old: str, new: str) -> Experiment:
    from ctpd.recipe import shipped_recipes

    text = shipped_recipes()[SMOKE].read_text()
    assert old in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new))
    return Experiment(path)


def changed_kinds(experiment: Experiment) -> set[str]:
    """The kinds of the artifacts that a change rebuilds, without records, which contain the recipe's values."""
    before = {stage.key for stage in Graph(Experiment(SMOKE).records).stages}
    return {s.kind for s in Graph(experiment.records).stages if s.key not in before} - {"record"}


CHANGES = {
    "runs' learning rate": ("tuned: {learning_rate: 1e-3,", "tuned: {learning_rate: 2e-3,", {"train", "evaluate"}),
    "documents": ("batch_size: 16", "batch_size: 8", {"evaluate"}),
    "caption": ("caption: Main results", "caption: Other words", set()),
    "longest row": ("max_prompt_tokens: 128", "max_prompt_tokens: 127", {"pairs", "signals", "weights", "train", "evaluate"}),
    "evaluation precision": ("data_root: testbed}", "data_root: testbed, precision: bfloat16}", {"evaluate"}),
    "precision": ("seeds: [0]", "seeds: [0]\n  precision: bfloat16", {"signals", "weights", "train", "evaluate"}),
    "seed": ("seeds: [0]", "seeds: [1]", {"weights", "train", "evaluate"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_recipe_rebuilds_exactly_what_depends_on_it(name: str, tmp_path: Path) -> None:
    old, new, kinds = CHANGES[name]
    assert changed_kinds(edited(tmp_path, old, new)) == kinds


def test_a_new_parameter_of_a_method_moves_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default is the old behaviour; records list it, and keep their keys too."""

    class Grown(DPOParams):
        added: int = 3

    before = [stage.key for stage in Graph(Experiment(SMOKE).records).stages]
    monkeypatch.setattr(DPO, "params_type", Grown)
    assert [stage.key for stage in Graph(Experiment(SMOKE).records).stages] == before


def test_runs_that_are_the_same_training_share_it() -> None:
    runs = {run.name: run for run in Experiment(SMOKE).runs}
    assert runs["CTPD"].training is not None
    assert runs["weights: Origin"].training is not None
    assert runs["CTPD"].training.key == runs["weights: Origin"].training.key
    assert runs["CTPD"].training.key != runs["weights: Average"].training.key  # type: ignore[union-attr]


def test_only_pairs_whose_long_prompts_are_cut_have_the_version_of_cutting_in_their_key() -> None:
    """Other pairs keep the keys that they had before prompts were cut at words."""
    pairs = Experiment(SMOKE).stages.pairs
    config = pairs.config.model_copy(update={"long_prompt": "cut"})
    assert "cutting" not in pairs.identity
    assert dataclasses.replace(pairs, config=config).identity["cutting"] == 2
