"""Temporary folders: where they are made, and which of them a later process removes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctpd.core import temporary
from ctpd.core.errors import UserError
from ctpd.core.temporary import TemporaryFolder, kept_in, remove_left, temporary_folder

HOLDS = (
    "import pathlib, sys; from ctpd.core.temporary import *\n"
    "with kept_in(pathlib.Path(sys.argv[1])), temporary_folder('other') as path: print(path, flush=True); input()"
)


def test_a_folder_is_in_the_store_names_its_process_and_leaves_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with kept_in(store), temporary_folder("datasets") as outer, temporary_folder("jobs") as path:
        assert path.parent == outer.parent == store / "tmp"
        assert path.name.startswith(f"ctpd-jobs-{os.getpid()}-")
        (path / "file").touch()
    assert not store.exists()
    store.mkdir()
    with kept_in(store), temporary_folder("jobs"):
        pass
    assert list(store.iterdir()) == []  # a store that was there stays
    with temporary_folder("jobs") as path:  # outside of a block
        assert not path.is_relative_to(tmp_path)
    assert not path.exists()


def test_folders_of_the_living_stay_and_those_of_the_dead_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with kept_in(tmp_path):
            ours = TemporaryFolder("mine")
        (tmp_path / "tmp" / "notes").mkdir()
        remove_left(tmp_path / "tmp")
        assert theirs.is_dir()
        assert ours.path.is_dir()
        other.kill()
        other.wait()
        assert theirs.is_dir()
        remove_left(tmp_path / "tmp")
    assert not theirs.exists()
    ours.remove()
    ours.remove()
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["notes"]  # not made here


def test_a_link_in_the_place_of_a_folder_or_a_lock_is_not_followed(tmp_path: Path) -> None:
    root, precious = tmp_path / "tmp", tmp_path / "precious"
    root.mkdir()
    precious.mkdir()
    (precious / "file").write_text("data")
    (root / "ctpd-a-1-x").symlink_to(precious)
    (root / "ctpd-a-1-x.lock").touch()
    (root / "ctpd-b-1-x.lock").symlink_to(precious / "file")
    remove_left(root)
    assert (precious / "file").read_text() == "data"


def test_without_locks_folders_are_made_and_none_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(temporary.fcntl, "flock", refuse)
    with kept_in(tmp_path), temporary_folder("jobs") as path:
        remove_left(tmp_path / "tmp")
        assert path.is_dir()


def test_a_store_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with kept_in(tmp_path / "store"), pytest.raises(UserError, match=r"store.*temporary folder cannot be made"):
        TemporaryFolder("jobs")
