"""Models with adapters and tokenizers: which parts a training changes."""

from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from ctpd.pipeline.references import External, Model, external_model
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage, Work
from tests.fixtures.stages import small_stage

HUB = External("org/name", "hub:org/name@abc", "abc")

COMMIT = "a1" * 20


def build(stage: Stage, work: Work) -> None:
    raise AssertionError("a plan builds nothing")


def test_a_fine_tuned_hub_model_keeps_the_pinned_revision_of_its_tokenizer() -> None:
    """The trained model is an artifact; the tokenizer still comes from the hub, at the commit of the recipe."""
    stage = small_stage("train", build)
    work = Work(Path(), Runtime(), lambda done, total: None, folders={stage.key: Path("store")})
    located = Model(HUB, HUB).trained(stage, adapter=False).located(work)
    assert (located.folder, located.revision) == (str(Path("store") / "model"), None)
    assert (located.tokenizer, located.tokenizer_revision) == ("org/name", "abc")


def test_an_adapter_refers_to_the_pinned_base() -> None:
    stage = small_stage("train", build)
    chain = Model(HUB, HUB).trained(stage, adapter=True).chain()
    assert chain["base"] == "org/name"
    assert chain["revision"] == chain["tokenizer_revision"] == "abc"
    assert chain["adapters"] == [f"store:train/{stage.key}"]


def test_an_evaluation_from_a_mirror_is_keyed_by_the_documents_it_reads(tmp_path: Path) -> None:
    from ctpd.pipeline.evaluations import Prompting, evaluation_stage
    from ctpd.recipe import EvaluationSpec
    from harness.suites import load_suite

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    mirror = tmp_path / "hub"
    for name in ("openai/gsm8k", "allenai/winogrande"):
        (mirror / name).mkdir(parents=True)
        (mirror / name / "test.jsonl").write_text("1")
    column = load_suite("card").columns[0]
    root = external_model(str(model), revision=None, role="model")

    def key(data_root: Path | None) -> str:
        spec = EvaluationSpec(
            suite="card", precision="float32", data_root=None if data_root is None else str(data_root)
        )
        return evaluation_stage(Model(root, root), column, spec, prompting=Prompting(), title="x").key

    before = key(mirror)
    (mirror / "allenai/winogrande/test.jsonl").write_text("2")
    assert key(mirror) == before, "another task's documents"
    (mirror / "openai/gsm8k/test.jsonl").write_text("22")
    assert key(mirror) != before
    assert key(None) not in (before, key(mirror))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory named like a hub id, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = Path("org") / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_local_directory_is_never_used_for_a_pinned_hub_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'org/name' with the revision 'abc' .* give './org/name' without a revision"):
        external_model("org/name", revision="abc", role="student")
    assert external_model("org/name", revision=None, role="student").revision is None
    assert external_model("./org/name", revision=None, role="student").location == str(tmp_path / "org" / "name")
    assert external_model("org/other", revision=COMMIT, role="student") == External(
        "org/other", f"hub:org/other@{COMMIT}", COMMIT
    )


@pytest.mark.parametrize("revision", ["main", "a1b2c3d", "v1.0"])
def test_a_branch_of_the_hub_is_refused(revision: str) -> None:
    """`--model org/name@main` would find the scores of last month's commit."""
    with pytest.raises(UserError, match=f"'{revision}' is not a commit"):
        external_model("org/name", revision=revision, role="--model option", in_recipe=False)


def test_a_hub_id_without_a_revision_is_recognised_and_the_message_fits_its_origin() -> None:
    with pytest.raises(UserError, match="add `revision:` with a commit"):
        external_model("org/name", revision=None, role="student")
    with pytest.raises(UserError, match="give `org/name@COMMIT`") as found:
        external_model("org/name", revision=None, role="--model option", in_recipe=False)
    with pytest.raises(UserError, match="Correct the path") as path:
        external_model("/no/such/model", revision=None, role="--model option", in_recipe=False)
    assert "recipe" not in str(found.value) + str(path.value)


def test_a_chain_names_a_local_base_by_its_absolute_path(model: Path, tmp_path: Path) -> None:
    base = external_model("org/name", revision=None, role="student")
    chain = Model(base, base).trained(small_stage("train", build), adapter=True).chain()
    assert chain["base"] == chain["tokenizer"] == str(tmp_path / "org" / "name")
