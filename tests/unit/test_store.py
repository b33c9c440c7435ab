"""The store: artifacts appear whole or not at all, and damage is named."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.hashes import digest_folder, sha256
from ctpd.core.manifests import MANIFEST
from ctpd.core.store import RESUME_FOLDER, Store

KEY = "0123456789abcdef" * 2


def commit(store: Store, *, stage: str = "train", key: str = KEY, text: str = "hello") -> Path:
    with store.build(stage, key, identity={"a": 1}, provenance={"b": 2}) as folder:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "file.txt").write_text(text)
    return store.path(stage, key)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_artifact_holds_its_files_and_a_manifest_that_describes_them(store: Store) -> None:
    folder = commit(store)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["identity"] == {"a": 1}
    assert manifest["provenance"] == {"b": 2}
    assert manifest["files"]["sub/file.txt"]["bytes"] == 5
    assert store.has("train", KEY)
    assert store.open("train", KEY) == store.verify("train", KEY) == folder


def test_no_artifact_exists_before_the_block_ends(store: Store) -> None:
    with store.build("train", KEY, identity={}, provenance={}) as folder:
        (folder / "file").write_text("x")
        assert not store.has("train", KEY)
        assert not store.path("train", KEY).exists()
        assert store.artifacts() == []
    assert store.has("train", KEY)
    assert store.partials() == []


def test_interrupted_build_leaves_no_artifact_but_its_resume_states(store: Store) -> None:
    """Half-written files are removed, so that none can become part of the artifact."""

    def interrupted() -> None:
        with store.build("train", KEY, identity={}, provenance={}) as folder:
            (folder / RESUME_FOLDER).mkdir()
            (folder / RESUME_FOLDER / "state").write_text("half")
            (folder / "hub").mkdir()
            (folder / "pairs.jsonl").write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not store.has("train", KEY)
    assert store.artifacts() == []
    assert [path.name for path in store.partials()] == [f"{KEY}.partial"]
    with store.build("train", KEY, identity={}, provenance={}) as again:
        assert (again / RESUME_FOLDER / "state").read_text() == "half"
        assert [path.name for path in again.iterdir()] == [RESUME_FOLDER]
    assert store.has("train", KEY)


def test_crash_between_manifest_and_rename_leaves_no_artifact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError("power")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="power"):
        commit(store)
    assert not store.has("train", KEY)
    assert store.artifacts() == []
    monkeypatch.undo()
    assert commit(store).is_dir()


DAMAGES = {
    "missing": (lambda folder: (folder / "sub" / "file.txt").unlink(), "file.txt is missing"),
    "longer": (lambda folder: (folder / "sub" / "file.txt").write_text("hello!"), "6 bytes instead of 5"),
    "changed": (lambda folder: (folder / "sub" / "file.txt").write_text("hallo"), "contents of sub/file.txt have changed"),
    "manifest": (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be read"),
    "manifest without files": (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json is not as a build writes it"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
    "added": (lambda folder: (folder / "sub" / "other").write_text(""), "the file sub/other was added"),
    "a folder": (lambda folder: shutil.move(folder / "sub" / "file.txt", folder) and (folder / "sub" / "file.txt").mkdir(), "no regular file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_with_path_and_correction(name: str, store: Store) -> None:
    damage, text = DAMAGES[name]
    folder = commit(store)
    damage(folder)
    with pytest.raises(DamagedArtifact) as caught:
        store.open("train", KEY)
    assert text in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "--rebuild" in str(caught.value)


def test_large_files_are_hashed_once_and_again_when_they_have_changed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a file is its size, its times and its inode; `verify` hashes every file."""
    monkeypatch.setattr("ctpd.core.hashes.REMEMBERED_BYTES", 3)
    read: list[str] = []
    monkeypatch.setattr("ctpd.core.hashes.sha256", lambda path: read.append(path.name) or sha256(path))
    folder = commit(store)
    assert read.count("file.txt") == 1
    Store(store.root).open("train", KEY)
    assert read.count("file.txt") == 1
    store.verify("train", KEY)
    times = (folder / "sub" / "file.txt").stat()
    (folder / "sub" / "file.txt").write_text("hallo")
    os.utime(folder / "sub" / "file.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamagedArtifact, match="contents"):
        Store(store.root).open("train", KEY)
    assert read.count("file.txt") == 2


def test_a_store_that_cannot_be_written_remembers_no_hashes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpd.core.hashes.REMEMBERED_BYTES", 3)
    folder = commit(store)
    next(folder.parent.glob(".*.hashes")).unlink()

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.replace", read_only)
    assert store.open("train", KEY) == folder
    assert not list(folder.parent.glob(".*.hashes*"))


def test_removing_takes_the_artifact_and_its_partial(store: Store) -> None:
    commit(store)
    store.path("train", KEY).with_name(f"{KEY}.partial").mkdir()
    store.remove("train", KEY)
    assert store.artifacts() == []
    assert store.partials() == []


def test_find_takes_a_prefix_that_fits_once(store: Store) -> None:
    commit(store, key=f"{'a' * 31}1")
    commit(store, key=f"{'a' * 31}2", text="longer text")
    commit(store, stage="pairs", key="b" * 32)
    assert store.find("a" * 31 + "1").key == "a" * 31 + "1"
    assert store.find("pairs/b").stage == "pairs"
    with pytest.raises(UserError, match=r"2 artifacts in .* begin with 'aa'"):
        store.find("aa")
    with pytest.raises(UserError, match=r"no artifact in .* begins with 'train/bb'"):
        store.find("train/bb")


def test_artifacts_are_listed_largest_first(store: Store) -> None:
    commit(store, key="a" * 32, text="x")
    commit(store, key="b" * 32, text="x" * 100)
    assert [(artifact.key, artifact.bytes) for artifact in store.artifacts()] == [("b" * 32, 100), ("a" * 32, 1)]


def test_one_builder_at_a_time_holds_a_key(store: Store) -> None:
    entered, order = threading.Event(), []

    def second() -> None:
        entered.set()
        with store.lock("train", KEY):
            order.append("second")

    with store.lock("train", KEY):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_that_is_held_is_refused_without_waiting_and_free_afterwards(store: Store) -> None:
    with store.try_lock("train", KEY) as first, store.try_lock("train", KEY) as second:
        assert (first, second) == (True, False)
    with store.lock("train", KEY), store.try_lock("train", KEY) as third:
        assert third is False
    with store.try_lock("train", KEY) as last:
        assert last is True


def test_the_lock_of_a_process_that_died_is_free(store: Store) -> None:
    code = f"""if True:
        import os
        from pathlib import Path
        from ctpd.core.store import Store
        with Store(Path({str(store.root)!r})).lock("train", {KEY!r}):
            print("held", flush=True)
            os.kill(os.getpid(), 9)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("held\n", -9)
    with store.try_lock("train", KEY) as free:
        assert free


def test_a_lock_file_is_never_emptied_and_a_link_in_its_place_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    (store.root / "train").mkdir(parents=True)
    lock = store.root / "train" / f".{KEY}.lock"
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="a symbolic link is in the place"), store.lock("train", KEY):
        pass
    lock.unlink()
    lock.write_text("data")
    with store.lock("train", KEY):
        pass
    assert lock.read_text() == (tmp_path / "precious").read_text() == "data"


def test_a_store_that_cannot_be_written_says_so_in_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a folder that can be written to"), Store(tmp_path / "file").try_lock("a", KEY):
        pass


def test_digest_of_a_folder_follows_names_and_contents_and_nothing_hidden(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = digest_folder(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("1")
    assert digest_folder(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    second = digest_folder(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, digest_folder(tmp_path)}) == 3


def test_a_build_whose_folder_was_replaced_fails(store: Store) -> None:
    def build() -> None:
        with store.build("train", KEY, identity={}, provenance={}) as folder:
            (folder / "weights").write_text("x")
            folder.rename(folder.with_name("moved"))
            folder.mkdir()

    with pytest.raises(UserError, match="removed or replaced while an artifact was built in it"):
        build()
    assert not store.has("train", KEY)
