"""What changes between the check at the start of a command and its use: nothing wrong is stored under a right key."""

import json
from pathlib import Path

import pytest

from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.store import Store
from ctpd.pipeline.build import build_missing
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.references import external_model, location
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.sources import file_digest
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.evaluate import Mirror
from ctpd.pipeline.stages.pairs import FilePairs
from harness.suites import load_suite
from tests.fixtures.stages import small_stage

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


def write(stage: Stage, work: Work) -> None:
    parts = [(work.path(source) / "text").read_text() for source in stage.inputs.values()]
    (work.folder / "text").write_text("x" + "".join(parts))


def run(store: Store, *targets: Stage) -> int:
    return build_missing(Graph(targets), store, runtime=Runtime(device="cpu"), progress=Progress(quiet=True))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path, Runtime(device="cpu"), lambda done, total: None)


def test_an_input_that_is_damaged_while_other_stages_are_built_is_found_when_it_is_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    base = small_stage("base", write)
    run(store, base)

    def damage(stage: Stage, work: Work) -> None:
        write(stage, work)
        (store.path("base", base.key) / "text").write_text("y")

    first = small_stage("first", damage)
    top = small_stage("top", write, base)
    with pytest.raises(DamagedArtifact, match="contents of text have changed"):
        run(store, first, top)
    assert store.has("first", first.key)
    assert not store.has("top", top.key)


def changed_pairs(tmp_path: Path) -> FilePairs:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    source = FilePairs(str(path), file_digest(path))
    path.write_text(json.dumps({**ROW, "chosen": "d"}) + "\n")
    return source


def test_a_data_file_that_has_changed_since_the_plan_is_refused(tmp_path: Path, work: Work) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl: the contents have changed since this command was started"):
        list(changed_pairs(tmp_path).read(work).rows)


def test_a_data_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:

    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    source = FilePairs(str(path), file_digest(path))
    assert len(list(source.read(work).rows)) == 1
    rows = iter(source.read(work).rows)
    next(rows)
    path.write_text("")
    with pytest.raises(UserError, match="have changed"):
        next(rows)


def test_a_model_directory_that_has_changed_since_the_plan_is_refused(tmp_path: Path, work: Work) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("1")
    source = external_model(str(folder), revision=None, role="teacher")
    assert location(source, work) == str(folder)
    (folder / "model.safetensors").write_text("2")  # of the same size
    with pytest.raises(UserError, match="contents have changed"):
        location(source, work)
    (folder / "model.safetensors").write_text("1")
    assert location(source, work) == str(folder)
    (folder / "chat_template.jinja").write_text("")
    with pytest.raises(UserError, match="contents have changed"):
        location(source, work)


def test_evaluation_data_that_have_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    column = load_suite("card").columns[0]
    names = column.datasets or ("all",)
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "test.jsonl").write_text("1")
    mirror = Mirror.of(str(tmp_path), column)
    mirror.check()
    (tmp_path / names[-1] / "test.jsonl").write_text("2")
    with pytest.raises(UserError, match="contents have changed"):
        mirror.check()
