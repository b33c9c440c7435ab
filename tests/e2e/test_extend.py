"""Every worked example of docs/extend.md: its blocks are applied to a copy of the project, and its tests are run there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.documents import Block, blocks, sections
from tests.fixtures.launch_processes import imports_from

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    title: text
    for title, text in sections((ROOT / "docs/extend.md").read_text(encoding="utf-8")).items()
    if "*Files:*" in text
}
COPIED = (
    "ctpd",
    "baselines",
    "harness",
    "tests/conftest.py",
    "tests/fixtures",
    "tests/arch",
    "tests/regression",
    "docs",
    "README.md",
    "pyproject.toml",
)
GUARDS = (  # of the project's own tests, those that an extension must keep
    "tests/arch/test_architecture.py::test_every_method_is_an_objective_with_defaults",
    "tests/arch/test_architecture.py::test_every_method_is_in_a_shipped_recipe",
    "tests/arch/test_architecture.py::test_no_branch_asks_for_the_name_of_a_method",
    "tests/unit/test_keys_stay.py",
)
KEYS_STAY = '''"""No example moves the key of anything that is computed; a record, which lists all parameters, is written anew."""

from tests.regression import identities
from tests.regression.test_keys import recorded


def test_no_key_moves() -> None:
    def computed(keys: dict[str, str]) -> dict[str, str]:
        return {label: key for label, key in keys.items() if not key.startswith(("evaluate/", "record/"))}

    assert computed(identities.keys()) == computed(recorded(identities.KEYS)["keys"])
'''


def files_of(section: str) -> list[str]:
    """The files that an example says it touches."""
    (line,) = re.findall(r"^\*Files:\* (.*)$", section, flags=re.MULTILINE)
    return re.findall(r"`([^`]+)`", line)


def titled(section: str) -> Iterator[Block]:
    return (block for block in blocks(section) if block.title is not None)


def edited(text: str, diff: str) -> str:
    """A text with one hunk applied: the lines that stay and those that go must stand in it exactly once."""
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    assert text.count(old) == 1, f"the text has these lines {text.count(old)} times:\n{old}"
    return text.replace(old, new)


def apply(block: Block, root: Path) -> None:
    assert block.title is not None
    path = root / block.title
    if block.language == "diff":
        path.write_text(edited(path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
        return
    assert not path.exists(), f"{block.title} is there already: show an edit of it as a diff"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all examples in it."""
    root = tmp_path_factory.mktemp("extended")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, root / name)
    for section in EXAMPLES.values():
        for block in titled(section):
            apply(block, root)
    (root / "tests/unit/test_keys_stay.py").write_text(KEYS_STAY, encoding="utf-8")
    return root


def test_there_are_examples() -> None:
    assert set(EXAMPLES) == {
        "A weight strategy",
        "A parameter of the weights",
        "A preference loss",
        "A baseline",
        "A column of a suite",
        "A stage",
    }


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_touches_the_files_that_it_says(title: str) -> None:
    shown = {block.title for block in titled(EXAMPLES[title])}
    assert shown == set(files_of(EXAMPLES[title]))
    assert any(name is not None and name.startswith("tests/") for name in shown)


def test_all_examples_work_in_a_copy_of_the_project(extended: Path) -> None:
    added = [name for section in EXAMPLES.values() for name in files_of(section) if name.startswith("tests/")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *added, *GUARDS],
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
        env=environment(extended),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_all_examples_are_in_style(extended: Path) -> None:
    touched = {name for section in EXAMPLES.values() for name in files_of(section) if name.endswith(".py")}
    ruff = Path(sys.executable).with_name("ruff")
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *arguments, "--no-cache", *sorted(touched)],
            cwd=extended,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def environment(root: Path) -> dict[str, str]:
    """This process's, with the copy's packages first."""
    return os.environ | imports_from(root)


def test_an_edit_that_does_not_fit_is_found() -> None:
    assert edited("a\nb\nc\n", " a\n-b\n+B\n c\n") == "a\nB\nc\n"
    with pytest.raises(AssertionError, match="0 times"):
        edited("a\n", " x\n+y\n")
    with pytest.raises(AssertionError, match="2 times"):
        edited("a\na\n", " a\n+b\n")
