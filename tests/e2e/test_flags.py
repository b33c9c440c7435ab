"""A flag that would do nothing is refused in one sentence; hints are commands that can be pasted."""

import shlex
import shutil
from pathlib import Path

import pytest

from ctpd.core.printing import command
from ctpd.core.store import Store
from tests.conftest import Cli, SmokeRun
from tests.fixtures.tokenizers import CHATML

REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("eval", "testbed-smoke", "--suite", "card"), "--suite does nothing here: the RECIPE says it"),
    (("eval", "testbed-smoke", "--data-root", "hub"), "--data-root does nothing here"),
    (("eval", "testbed-smoke", "--precision", "float32"), "--precision does nothing here"),
    (("eval", "testbed-smoke", "--batch-size", "8"), "--batch-size does nothing here"),
    (("eval", "testbed-smoke", "--chat-template"), "--chat-template does nothing here"),
    (("eval", "--model", "m", "--only", "DPO"), "--only does nothing here: a --model is one model"),
    (("eval", "--model", "m", "--seed", "0"), "--seed does nothing here"),
    (("eval", "--model", "m", "--report-to", "wandb"), "--report-to does nothing here: nothing is trained"),
    (("eval",), "Give a RECIPE or --model, one of them."),
    (("run", "testbed-smoke", "--plan", "--rebuild"), "--rebuild does nothing here: --plan checks no artifact"),
    (("train", "testbed-smoke", "--plan", "--rebuild"), "--rebuild does nothing here"),
    (("eval", "testbed-smoke", "--plan", "--rebuild"), "--rebuild does nothing here"),
    (("compare", "testbed-smoke", "--json", "--format", "md"), "--format does nothing here: --json prints JSON"),
    (("recipes", "--schema", "--json"), "--json does nothing here: a schema is JSON"),
    (("recipes", "--show", "testbed", "--json"), "--json does nothing here: a recipe is YAML"),
    (("recipes", "--to", "mine.yaml"), "--to does nothing here: it names the file of --copy"),
    (("recipes", "--show", "testbed", "--copy", "testbed"), "Give --schema, --show or --copy, one of them."),
    (("inspect", "spans", "a", "b", "--text", "x", "--limit", "3"), "--limit does nothing here: it counts the pairs"),
]


@pytest.mark.parametrize(
    ("args", "text"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_flag_that_does_nothing_is_refused(args: tuple[str, ...], text: str, cli: Cli) -> None:
    outcome = cli(*args)
    assert outcome.code == 2
    assert outcome.out == ""
    assert f"Error: {text}" in outcome.err
    assert "Traceback" not in outcome.err


def test_weights_of_a_key_have_no_runs_to_choose_from(cli: Cli, smoke: SmokeRun) -> None:
    key = next(artifact.key for artifact in Store(smoke.store).artifacts() if artifact.stage == "weights")
    outcome = cli("inspect", "weights", key, "--store", smoke.store, "--only", "DPO")
    assert outcome.code == 2
    assert "--only does nothing here: a KEY is one artifact" in outcome.err


def test_a_hub_model_without_a_revision_is_asked_for_one(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("eval", "--model", "org/name", "--store", tmp_path)
    assert outcome.code == 2
    assert "give `org/name@COMMIT`" in outcome.err
    assert "recipe" not in outcome.err


def test_evaluation_options_of_a_model_reach_the_plan(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    """Each option changes the result, and so the keys; options at their defaults change nothing."""
    import json

    model = shutil.copytree(next(smoke.store.glob("train/*/model")), tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML)
    root = next(smoke.store.glob("world/*/hub"))

    def keys(*options: str) -> list[str]:
        folders = ("--data-root", root, "--store", tmp_path / "store")
        args = ("eval", "--model", model, "--suite", "testbed", *folders, "--plan")
        return [line["key"] for line in json.loads(cli(*args, "--json", *options).out)]

    plain = keys()
    assert keys("--precision", "float32", "--batch-size", "8") == plain
    changed = [keys("--precision", "bfloat16"), keys("--batch-size", "4"), keys("--chat-template")]
    assert len({tuple(found) for found in (plain, *changed)}) == 4


def test_hints_are_commands_for_a_shell() -> None:
    words = ["ctpd", "run", "my recipe.yaml", "--only", "CTPD, k 1", "--store", "big disk"]
    assert shlex.split(command(*words[1:5], store=Path("big disk"))) == words
    assert command("run", "a.yaml", store=Path("runs")) == "ctpd run a.yaml"


def test_rm_and_gc_leave_what_another_process_works_on(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with store.build("train", "a" * 32, identity={}, provenance={}) as folder:
        (folder / "file").write_text("x")
    (store.root / "train" / f"{'b' * 32}.partial").mkdir()
    with store.lock("train", "a" * 32), store.lock("train", "b" * 32):
        removed = cli("store", "rm", "aaa", "--store", store.root)
        collected = cli("store", "gc", "testbed-smoke", "--store", store.root)
    assert (removed.code, collected.code) == (2, 2)
    assert f"another process is working on train/{'a' * 32} and 1 more" in removed.err
    assert "nothing was removed" in collected.err
    assert store.has("train", "a" * 32)
    assert len(store.partials()) == 1
    assert "Removed 1 artifact and 1 partial build," in cli("store", "gc", "testbed-smoke", "--store", store.root).out
    assert not store.artifacts()
    assert not store.partials()


def test_tables_are_plain_without_a_terminal_and_names_are_literal(
    cli: Cli, smoke: SmokeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctpd.recipe import shipped_recipes

    monkeypatch.delenv("COLUMNS", raising=False)
    text = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")
    name = "[red]A[/red]" + "x" * 150
    (tmp_path / "mine.yaml").write_text(text.replace("TIS-DPO", f'"{name}"'), encoding="utf-8")
    for outcome in (
        cli("run", tmp_path / "mine.yaml", "--plan", "--store", smoke.store),
        cli("store", "du", "--store", smoke.store),
        cli("recipes"),
        cli("doctor"),
    ):
        assert outcome.code == 0, outcome.err
        assert "\x1b" not in outcome.out
        assert not any(line.endswith(" ") for line in outcome.out.splitlines())
    plan = cli("run", tmp_path / "mine.yaml", "--plan", "--store", smoke.store).out
    assert f"{name}, seed 0" in plan
    assert "Nothing was run.\n" in plan


def test_an_escape_sequence_in_a_name_does_not_reach_the_terminal(cli: Cli) -> None:
    outcome = cli("train", "testbed-smoke", "--plan", "--only", "\x1b]0;title\x07")
    assert outcome.code == 2
    assert "⟨U+001B⟩]0;title⟨U+0007⟩" in outcome.err
    assert "\x1b" not in outcome.err
