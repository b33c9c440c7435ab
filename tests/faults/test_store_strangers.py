"""Folders that are no store, links in the store's places, other people's files, file systems without locks."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ctpd.core import locks
from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.manifests import MANIFEST
from ctpd.core.store import MARKER, Store
from tests.conftest import Cli, SmokeRun

KEY, OTHER = "a" * 32, "b" * 32
REMOVING = {"rm": ("rm", KEY), "gc": ("gc", "testbed-smoke"), "gc --dry-run": ("gc", "testbed-smoke", "--dry-run"), "du": ("du",)}  # fmt: skip


def commit(store: Store, *, stage: str = "train", key: str = KEY) -> Path:
    with store.build(stage, key, identity={}, provenance={}) as folder:
        (folder / "file").write_text("x")
    return store.path(stage, key)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of somebody else."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("data")
    return folder


def taken(store: Store) -> bool:
    with store.try_lock("train", KEY) as free:
        return free


def files(root: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", REMOVING)
@pytest.mark.parametrize("layout", ["empty", "missing", "manifests", "other key", "bad marker"])
def test_a_folder_that_is_no_store_is_refused(name: str, layout: str, cli: Cli, tmp_path: Path) -> None:
    """Whatever in it looks like an artifact or an interrupted build by its path alone."""
    home = tmp_path / "home"
    if layout != "missing":
        (home / "extension" / "chrome").mkdir(parents=True)
        (home / "downloads" / "film.partial").mkdir(parents=True)
        (home / "downloads" / "film.partial" / "part1").write_text("x")
    if layout == "manifests":
        (home / "extension" / "chrome" / MANIFEST).write_text('{"files": {}}')
    if layout == "other key":
        (home / "train" / KEY).mkdir(parents=True)
        (home / "train" / KEY / MANIFEST).write_text(json.dumps({"stage": "train", "key": OTHER, "files": {}}))
    if layout == "bad marker":
        (home / MARKER).write_text("[]")
    before = files(home)
    outcome = cli("store", *REMOVING[name], "--store", home)
    assert outcome.code == 2
    assert "this is no store of ctpd" in outcome.err
    assert outcome.out == ""
    assert files(home) == before


def test_gc_removes_nothing_but_artifacts_and_partial_builds(cli: Cli, store: Store) -> None:
    commit(store)
    stray = [store.root / "train" / "film.partial", store.root / "notes" / KEY[:-1], store.root / "train" / OTHER]
    for folder in stray:
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(json.dumps({"stage": "train", "key": KEY, "files": {}}))
    (store.root / "tables").mkdir()
    (store.root / "tables" / "main.txt").write_text("x")
    store.partial("train", OTHER).mkdir()
    outcome = cli("store", "gc", "testbed-smoke", "--store", store.root)
    assert "Removed 1 artifact and 1 partial build," in outcome.out
    assert all((folder / MANIFEST).is_file() for folder in stray)
    assert (store.root / "tables" / "main.txt").is_file()
    assert not store.has("train", KEY)


def test_the_first_write_marks_a_store_and_an_older_one_is_known_by_its_artifacts(cli: Cli, store: Store) -> None:
    commit(store)
    assert json.loads((store.root / MARKER).read_text()) == {"store": "ctpd", "version": 1}
    (store.root / MARKER).unlink()
    assert cli("store", "du", "--store", store.root).code == 0
    assert not (store.root / MARKER).exists()
    commit(store, key=OTHER)
    assert (store.root / MARKER).is_file()


def test_a_store_of_a_newer_version_is_refused(cli: Cli, store: Store) -> None:
    commit(store)
    (store.root / MARKER).write_text('{"store": "ctpd", "version": 2}')
    outcome = cli("store", "rm", KEY, "--store", store.root)
    assert outcome.code == 2
    assert "newer version of ctpd" in outcome.err
    assert store.has("train", KEY)


def test_an_artifact_of_an_older_version_has_no_hash_of_its_manifest_and_is_read(store: Store) -> None:
    folder = commit(store)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert store.open("train", KEY) == folder


def test_the_folder_of_another_artifact_is_not_taken_for_one(store: Store) -> None:
    shutil.copytree(commit(store), store.path("train", OTHER))
    with pytest.raises(DamagedArtifact, match="of another artifact"):
        store.open("train", OTHER)
    assert [artifact.key for artifact in store.artifacts()] == [KEY]


def built_or_opened(store: Store) -> Path:
    """What a command does with an artifact that it needs."""
    with store.lock("train", KEY):
        return store.open("train", KEY) if store.has("train", KEY) else commit(store)


LINKS: dict[str, Callable[[Store], Path]] = {
    "lock": lambda store: store.root / "train" / f".{KEY}.lock",
    "partial": lambda store: store.partial("train", KEY),
    "artifact": lambda store: store.path("train", KEY),
}


@pytest.mark.parametrize("place", LINKS)
def test_a_link_in_the_place_of_a_part_of_the_store_is_refused(place: str, store: Store, precious: Path) -> None:
    """Neither building nor removing changes what it points to."""
    link = LINKS[place](store)
    link.parent.mkdir(parents=True)
    link.symlink_to(precious / "thesis.txt" if place == "lock" else precious)
    with pytest.raises(UserError, match="symbolic link"):
        built_or_opened(store)
    store.remove("train", KEY)
    assert files(precious) == {str(precious / "thesis.txt"): "data"}


def test_a_link_in_an_interrupted_build_is_removed_and_not_followed(store: Store, precious: Path) -> None:
    partial = store.partial("train", KEY)
    partial.mkdir(parents=True)
    for name in ("checkpoints", "model"):
        (partial / name).symlink_to(precious)
    commit(store)
    assert [path.name for path in sorted(store.path("train", KEY).iterdir())] == ["file", MANIFEST]
    assert (precious / "thesis.txt").read_text() == "data"


def test_rm_and_gc_are_refused_while_something_is_built(cli: Cli, store: Store) -> None:
    """The build may read what would be removed."""
    commit(store)
    with store.lock("train", OTHER):
        for name in ("rm", "gc"):
            outcome = cli("store", *REMOVING[name], "--store", store.root)
            assert outcome.code == 2
            assert f"another process is working on train/{OTHER}" in outcome.err
            assert "nothing was removed" in outcome.err
            assert store.has("train", KEY)
        assert cli("store", "gc", "testbed-smoke", "--dry-run", "--store", store.root).code == 0
    assert cli("store", "rm", KEY, "--store", store.root).code == 0
    assert not store.has("train", KEY)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_has_files_instead(
    number: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr("filelock._unix.fcntl.flock", no_locks)
    monkeypatch.setattr(locks, "_reported", set())
    with pytest.warns(UserWarning, match="has no locks"):
        assert taken(store)
    with store.lock("train", KEY):  # without a second warning
        assert store.building() == [f"train/{KEY}"]
        assert not taken(store)
    assert not store.building()


def test_a_removal_that_is_interrupted_leaves_no_part_of_an_artifact(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.remove("train", KEY)
    monkeypatch.undo()
    assert not store.has("train", KEY)
    commit(store)
    assert store.open("train", KEY)


def test_the_smoke_store_is_marked(smoke: SmokeRun) -> None:
    assert (smoke.store / MARKER).is_file()
