"""A finished store with one byte changed in every kind of file: found before it is used, named, and left alone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpd.core.errors import DamagedArtifact
from ctpd.core.manifests import MANIFEST
from ctpd.core.store import Store
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.stage import Stage
from tests.conftest import Cli, SmokeRun
from tests.fixtures.tried import Tried

KINDS = ["world", "tokenizer", "pretrain", "pairs", "signals", "weights", "train", "evaluate", "record"]


def flip(path: Path, position: int) -> None:
    """Change one bit of the byte at ``position``."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def one_of_each_kind(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Stage, key and path of one file for each stage and each name of a file."""
    seen: set[tuple[str, str]] = set()
    for path in sorted(path for path in root.glob("*/*/**/*") if path.is_file()):
        stage, key = path.relative_to(root).parts[:2]
        if stage in KINDS and (stage, path.name) not in seen:
            seen.add((stage, path.name))
            yield stage, key, path


def test_a_changed_byte_in_every_kind_of_file_is_found_and_the_file_named(
    smoke: SmokeRun, tmp_path: Path, tried: Tried
) -> None:
    """At the beginning, in the middle and at the end of the file; in a manifest the sentence names that file."""
    root = tmp_path / "store"
    shutil.copytree(smoke.pristine, root)
    store, changed = Store(root), 0
    for stage, key, path in list(one_of_each_kind(root)):
        size = path.stat().st_size
        for position in sorted({0, size // 2, size - 1}) if size else ():
            flip(path, position)
            with pytest.raises(DamagedArtifact) as caught:
                store.open(stage, key)
            assert path.name in str(caught.value), (path, position)
            flip(path, position)
            changed += 1
        store.open(stage, key)
    assert {kind for kind, _, _ in one_of_each_kind(root)} == set(KINDS)
    assert changed > 3 * len(KINDS)
    tried("changed bytes in files of artifacts", changed)


def test_every_byte_of_a_manifest_counts(smoke: SmokeRun, tmp_path: Path, tried: Tried) -> None:
    source = next(smoke.store.glob("weights/*/"))
    store = Store(tmp_path)
    shutil.copytree(source, store.path("weights", source.name))
    manifest = store.path("weights", source.name) / MANIFEST
    for position in range(0, manifest.stat().st_size, 7):
        flip(manifest, position)
        with pytest.raises(DamagedArtifact, match=MANIFEST):
            store.open("weights", source.name)
        flip(manifest, position)
        tried("changed bytes in files of artifacts", 1)
    store.open("weights", source.name)


def linked_copy(source: Path, target: Path) -> Path:
    """A copy whose files are hard links; replace a file in it instead of writing to it."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def downstream(stage: Stage, graph: Graph) -> list[Stage]:
    """The stages that read ``stage``, and those that read these."""
    found: dict[str, Stage] = {stage.key: stage}
    for other in graph.stages:
        if any(source.key in found for source in other.inputs.values()):
            found[other.key] = other
    return [other for other in found.values() if other is not stage]


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_that_needs_a_damaged_artifact_says_so_and_builds_nothing(
    kind: str, cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    from ctpd.app import plan

    root = linked_copy(smoke.store, tmp_path / "store")
    store, graph = Store(root), plan("testbed-smoke")
    stage = next(stage for stage in graph.stages if stage.kind == kind)
    for reader in downstream(stage, graph):
        store.remove(reader.kind, reader.key)
    path = max((p for p in store.path(kind, stage.key).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # the smoke store has a link to the same file
    path.write_bytes(content)
    before = {(artifact.stage, artifact.key) for artifact in store.artifacts()}
    outcome = cli("run", "testbed-smoke", "--store", root, "--device", "cpu")
    assert (outcome.code, outcome.out) == (2, "")
    assert path.name in outcome.err
    assert "--rebuild" in outcome.err
    assert path.read_bytes() == content
    assert {(artifact.stage, artifact.key) for artifact in store.artifacts()} <= before


def test_rebuild_mends_what_the_targets_were_made_of(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    """All targets are there: what they were made of is compared and built again, too."""
    root = tmp_path / "store"
    shutil.copytree(smoke.pristine, root)
    weights = next(root.glob("weights/*/*.safetensors"))
    whole = weights.read_bytes()
    flip(weights, len(whole) // 2)
    outcome = cli("run", "testbed-smoke", "--store", root, "--device", "cpu")
    assert outcome.code == 0, outcome.err  # nothing reads it
    outcome = cli("run", "testbed-smoke", "--store", root, "--device", "cpu", "--rebuild")
    assert outcome.code == 0, outcome.err
    assert "1 stage built" in outcome.err
    assert weights.read_bytes() == whole
    assert not list(root.glob("*/.*.damaged"))
