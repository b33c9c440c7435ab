"""Several processes on one graph: each stage is built once, also when processes wait, fail or are killed."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest

from ctpd.core.errors import NotFinite
from ctpd.core.store import Store
from ctpd.pipeline.build import build_missing
from ctpd.pipeline.graph import FAILED, Graph
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage, Work
from tests.fixtures.process_graph import NUM_SINGLE, process_graph
from tests.fixtures.stages import small_stage
from tests.fixtures.waiting import HANGS, until

ROOT = Path(__file__).resolve().parents[2]
GRAPH = "tests.fixtures.process_graph"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def run(store: Store, graph: Graph, progress: Progress | None = None) -> int:
    return build_missing(graph, store, runtime=Runtime(device="cpu"), progress=progress or Progress(quiet=True))


def sleepy(name: str, built: list[tuple[str, int]], *inputs: Stage) -> Stage:
    def build(stage: Stage, work: Work) -> None:
        built.append((name, threading.get_ident()))
        time.sleep(0.2)
        (work.folder / "text").write_text(name)

    return small_stage(name, build, *inputs)


def test_two_workers_share_the_stages_and_build_none_twice(store: Store) -> None:
    built: list[tuple[str, int]] = []
    base = sleepy("base", built)
    graph = Graph([sleepy("top", built, *(sleepy(f"part{i}", built, base) for i in range(6)))])
    workers = [threading.Thread(target=run, args=(store, graph)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(HANGS)
    assert Counter(name for name, _ in built) == Counter(stage.label for stage in graph.stages)
    assert {who for name, who in built if name.startswith("part")} == {worker.ident for worker in workers}
    assert not graph.missing(store)


def test_a_stage_that_another_process_builds_is_waited_for_and_the_rest_is_built(store: Store) -> None:
    built: list[tuple[str, int]] = []
    first, second = sleepy("first", built), sleepy("second", built)
    shown = StringIO()
    graph = Graph([sleepy("top", built, first, second)])
    with store.lock(first.kind, first.key):
        worker = threading.Thread(target=run, args=(store, graph, Progress(stream=shown)))
        worker.start()
        until(lambda: "Another process builds: first" in shown.getvalue())
        assert [name for name, _ in built] == ["second"]
    worker.join(HANGS)
    assert [name for name, _ in built] == ["second", "first", "top"]
    assert shown.getvalue().count("Another process") == 1


def test_the_stage_of_a_process_that_dies_is_built_by_another(store: Store) -> None:
    command = [sys.executable, "-m", GRAPH, str(store.root), "slow"]
    helper = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: list(store.root.glob("single/*.partial/text")))
    graph = process_graph()
    worker = threading.Thread(target=run, args=(store, graph))
    worker.start()
    held = next(store.root.glob("single/*.partial/text")).parent.stem
    until(lambda: store.has("single", next(s.key for s in graph.stages if s.kind == "single" and s.key != held)))
    assert not store.has("single", held)
    helper.kill()
    helper.wait()
    worker.join(HANGS)
    assert (store.open("single", held) / "text").read_text() == "0"
    assert not graph.missing(store)
    assert not store.partials()


def launched(store: Store, *mode: str) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--log-dir",
        str(store.root.with_name("logs")),
    ]
    return subprocess.run(
        [*launcher, "-m", GRAPH, str(store.root), *mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


def test_processes_of_a_launch_build_collective_stages_together_and_the_others_one_each(store: Store) -> None:
    done = launched(store)
    assert done.returncode == 0, done.stderr
    graph = process_graph()
    assert not graph.missing(store)
    lines = [line.split() for line in (store.root / "log").read_text().splitlines()]
    found = Counter(name for name, _ in lines)
    assert found == {"base": 2, "single": NUM_SINGLE, "top": 2}
    assert {rank for name, rank in lines if name == "single"} == {"0", "1"}
    assert (
        store.path("base", next(s.key for s in graph.stages if s.kind == "base")) / "text"
    ).read_text() == "3"  # the sum of what both computed
    assert "[1/6] base" in done.stderr
    assert done.stderr.count("base") == 1  # one process shows progress
    assert not store.partials()


def test_a_failure_in_one_process_ends_all_of_a_launch(store: Store) -> None:
    done = launched(store, "broken")
    assert done.returncode != 0
    assert "ValueError: the second process fails" in done.stderr
    assert not store.artifacts()


def _diverging(name: str, *inputs: Stage) -> Stage:
    def build(stage: Stage, work: Work) -> None:
        raise NotFinite("the loss is not finite")

    return small_stage(name, build, *inputs)


def _choice(name: str, *inputs: Stage, attempts: Sequence[Stage]) -> Stage:
    """A stage that can do without those of its inputs that fail, and writes how many it was given."""

    def build(stage: Stage, work: Work) -> None:
        (work.folder / "given").write_text(str(len(work.folders)))

    made = small_stage(name, build, *inputs)
    object.__setattr__(made, "attempts", lambda: iter(attempts))
    return made


def test_an_attempt_that_is_not_finite_fails_alone_with_what_reads_it(store: Store) -> None:
    built: list[tuple[str, int]] = []
    lost = _diverging("lost")
    reader, good = sleepy("reader", built, lost), sleepy("good", built)
    graph = Graph([_choice("choice", reader, good, attempts=[lost, reader, good])])
    run(store, graph)
    assert [name for name, _ in built] == ["good"]
    assert (store.open("choice", graph.targets[0].key) / "given").read_text() == "1"
    assert graph.missing(store) == []
    assert {line.label for line in graph.plan(store) if line.failed} == {"lost", "reader"}
    assert store.has(FAILED, lost.key)
    assert not store.partials()


def test_what_is_not_finite_outside_of_attempts_stops_the_build(store: Store) -> None:
    lost = _diverging("lost")
    with pytest.raises(NotFinite):
        run(store, Graph([lost]))
    assert not store.has(FAILED, lost.key)
    with pytest.raises(NotFinite):  # only the reader may fail
        run(store, Graph([_choice("choice", lost, attempts=[])]))


def test_a_failed_attempt_is_tried_again_by_a_graph_that_needs_it(store: Store) -> None:
    lost = _diverging("lost")
    run(store, Graph([_choice("choice", lost, attempts=[lost])]))
    with pytest.raises(NotFinite):
        run(store, Graph([lost]))
