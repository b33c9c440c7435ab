"""Every command and every piece of Python that README shows works."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ctpd.core.store import Store

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def test_readme_shows_commands_at_all() -> None:
    assert {line[0] for line in commands()} == {"make", "ctpd"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_every_make_target_that_readme_names_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in commands() if line[0] == "ctpd"], ids=" ".join)
def test_every_shown_command_works(
    line: list[str], cli: Any, smoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`testbed-smoke` replaces the reader's recipe and models, and a key of its store replaces KEY."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTPD_STORE", str(smoke.store))
    store = Store(smoke.store)
    key = next(a.key for a in store.artifacts() if a.stage == "train")
    big, small = (str(store.path(a.stage, a.key) / "model") for a in store.artifacts() if a.stage == "tokenizer")
    put = {"KEY": key, "models/big": big, "models/small": small}
    if line[1] != "init":
        put["mine.yaml"] = "testbed-smoke"
    outcome = cli(*(put.get(word, word) for word in line[1:]))
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`ctpd ([a-z]+)", README))))
def test_every_command_that_readme_names_exists(name: str, cli: Any) -> None:
    assert cli(name, "--help").code == 0


@pytest.mark.parametrize("block", blocks("python"))
def test_every_piece_of_python_prints_what_readme_says(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README", "exec"), {})
    assert capsys.readouterr().out.strip() in block


def test_the_figure_is_that_of_its_script(tmp_path: Path) -> None:
    """The spans of the example, and the shipped picture: `python scripts/spans_figure.py` draws it anew."""
    spec = importlib.util.spec_from_file_location("spans_figure", ROOT / "scripts/spans_figure.py")
    assert spec is not None
    assert spec.loader is not None
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    assert [kind for _, _, kind in figure.spans()] == ["n:m", "1:1", "1:n", "1:1", "1:1", "1:1", "n:1", "1:1", "1:1"]
    figure.draw(tmp_path / "spans.svg")
    assert (tmp_path / "spans.svg").read_text(encoding="utf-8") == figure.FILE.read_text(encoding="utf-8")
    assert figure.FILE.stat().st_size < 100_000
