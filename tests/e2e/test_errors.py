"""Bad input through the command line: one paragraph that says what is wrong, where, and how to correct it, and exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ctpd.recipe import shipped_recipes
from tests.conftest import Cli, Outcome, SmokeRun

SMOKE = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")
GOOD = {"prompt": "Where is the well of Aro?", "chosen": "The well is in the north.", "rejected": "It is nowhere."}
Edit = Callable[[str], str]


def replacing(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write testbed-smoke with an edit, and optionally its training pairs from given rows."""

    def write(edit: Edit = lambda text: text, rows: list[dict[str, object]] | None = None) -> Path:
        text = edit(SMOKE)
        if rows is not None:
            data = tmp_path / "pairs.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            text = replacing("train: {testbed: train}", f'train: {{path: "{data}"}}')(text)
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One paragraph on stderr after the progress of finished stages, nothing on stdout, exit code 2."""
    message = outcome.err[outcome.err.index("Error: ") :]
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert message.count("\n") == 1
    assert message.endswith("\n")
    for part in parts:
        assert part in message


RECIPES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "unknown key": (replacing("max_tokens:", "max_token:"), ("mine.yaml, line", "max_token'", "'max_tokens'")),
    "duplicate key": (replacing("    max_tokens: 256", "    max_tokens: 256\n    max_tokens: 300"), ("mine.yaml, line", "max_tokens", "twice")),
    "wrong type": (replacing("seeds: [0]", "seeds: [zero]"), ("shared.seeds[0]", "whole number", "'zero'")),
    "missing key": (replacing("    max_tokens: 256\n", ""), ("shared.data.max_tokens", "missing")),
    "no YAML": (replacing("seeds: [0]", "seeds: [0"), ("mine.yaml, line", "not valid YAML")),
    "unknown method": (replacing("method: tis_dpo", "method: tisdpo"), ("run 'TIS-DPO'", "'tis_dpo'")),
    "unknown parameter": (replacing("{method: ctpd, tuned", "{method: ctpd, params: {weight: lite}, tuned"), ("'weights'",)),
    "unknown strategy": (replacing("Random: random", "Random: randum"), ("randum", "'random'")),
    "row of no table": (replacing("base: Origin", "base: Original"), ("tables.weights", "'Origin'")),
    "contradiction": (
        replacing("{method: ctpd, tuned", "{method: ctpd, params: {granularity: tokens}, tuned"), ("granularity: tokens",),
    ),
    "missing contrastive": (
        replacing("    negative: {learning_rate: 1e-3, beta: 0.1, epochs: 1, pairs_per_step: 16}\n", ""),
        ("shared.teacher.negative",),
    ),
    "template without content": (replacing('{user: "{content}\\n"', '{user: "content\\n"'), ("{content}",)),
    "no data file": (replacing("train: {testbed: train}", "train: {path: nowhere.jsonl}"), ("nowhere.jsonl", "does not exist")),
    "no matching file": (replacing("train: {testbed: train}", "train: {path: 'no*.csv'}"), ("no file matches", "no*.csv")),
    "two sources": (replacing("{testbed: train}", "{testbed: train, path: a.jsonl}"), ("shared.data.train", "exactly one")),
    "unknown suite": (replacing("suite: testbed", "suite: testbett"), ("testbett", "testbed")),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe_is_refused(name: str, cli: Cli, recipe: Callable[..., Path], smoke: SmokeRun) -> None:
    edit, parts = RECIPES[name]
    assert_refused(cli("run", recipe(edit), "--store", smoke.store, "--device", "cpu"), *parts)


def test_unknown_recipe_names_the_nearest(cli: Cli) -> None:
    assert_refused(cli("run", "testbed-smok", "--plan"), "testbed-smok", "Did you mean 'testbed-smoke'?")


def test_unknown_run_names_the_nearest(cli: Cli) -> None:
    assert_refused(cli("train", "testbed-smoke", "--plan", "--only", "CTPO"), "Did you mean 'CTPD'?")


def test_unknown_seed_names_the_seeds(cli: Cli) -> None:
    assert_refused(cli("train", "testbed-smoke", "--plan", "--seed", "7"), "no seed 7", "[0]")


def test_missing_model_directory(cli: Cli, recipe: Callable[..., Path], tmp_path: Path) -> None:
    start = SMOKE.index("    pretrain: {corpus: teacher")
    line = SMOKE[start : SMOKE.index("\n", start)]
    edit = replacing(line, "    model: ./no/such/model")
    assert_refused(cli("run", recipe(edit), "--store", tmp_path / "s"), "./no/such/model", "teacher", "does not exist")


ROWS: dict[str, tuple[list[dict[str, object]], tuple[str, ...]]] = {
    "missing column": ([GOOD, {"prompt": "a", "chosen": "b"}], ("row 1", "'rejected'", "missing")),
    "misspelt column": ([{"prompt": "a", "chosen": "b", "rejectet": "c"}], ("Did you mean 'rejectet'?",)),
    "wrong type": ([{**GOOD, "chosen": 3}], ("row 0", "column 'chosen'")),
    "no usable row": ([{**GOOD, "rejected": GOOD["chosen"]}] * 40, ("no usable row",)),
    "more than 5 % dropped": ([GOOD] * 36 + [{**GOOD, "chosen": ""}] * 4, ("4 ", "empty", "max_dropped")),
    "no rows": ([], ("no usable row",)),
    "fewer than a step": ([GOOD] * 3, ("3 training items", "pairs_per_step")),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_pairs_are_refused(name: str, cli: Cli, recipe: Callable[..., Path], smoke: SmokeRun) -> None:
    rows, parts = ROWS[name]
    assert_refused(cli("train", recipe(rows=rows), "--store", smoke.store, "--only", "DPO", "--device", "cpu"), *parts)


def test_pairs_that_are_no_json_are_refused(cli: Cli, recipe: Callable[..., Path], smoke: SmokeRun) -> None:
    path = recipe(rows=[GOOD])
    (path.parent / "pairs.jsonl").write_text('{"prompt": \n')
    assert_refused(cli("train", path, "--store", smoke.store, "--only", "DPO"), "pairs.jsonl, line 1", "not valid JSON")


def test_tokenizer_without_a_chat_template_is_refused(cli: Cli, recipe: Callable[..., Path], smoke: SmokeRun) -> None:
    edit = replacing('template: {user: "{content}\\n", assistant: "{content}\\n"}', "template: chat")
    assert_refused(cli("train", recipe(edit), "--store", smoke.store, "--only", "DPO"), "tokenizer", "chat template")


@pytest.fixture
def damaged(smoke: SmokeRun, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the store in which one record lost a byte."""
    store = tmp_path / "store"
    shutil.copytree(smoke.pristine, store)
    record = sorted(store.glob("record/*/record.json"))[0]
    record.write_bytes(record.read_bytes()[:-1])
    return store, record


def test_damaged_artifact_is_named_and_refused(cli: Cli, damaged: tuple[Path, Path]) -> None:
    store, record = damaged
    outcome = cli("run", "testbed-smoke", "--store", store)
    assert_refused(outcome, str(record.parent), "record.json", "damaged", "--rebuild")


def test_rebuild_makes_only_the_damaged_artifact_anew(cli: Cli, damaged: tuple[Path, Path], smoke: SmokeRun) -> None:
    store, record = damaged
    outcome = cli("run", "testbed-smoke", "--store", store, "--rebuild")
    assert outcome.code == 0, outcome.err
    assert "1 stage built" in outcome.err
    assert outcome.out.replace(str(store), "") == smoke.outcome.out.replace(str(smoke.store), "")
    assert "time" in json.loads(record.read_text())["provenance"]


def test_key_of_nothing_is_refused(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    assert_refused(cli("export", "zzz", "--to", tmp_path / "m", "--store", smoke.store), "'zzz'", "ctpd store du")


def test_ambiguous_key_is_refused(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    assert_refused(cli("export", "train/", "--to", tmp_path / "m", "--store", smoke.store), "artifacts", "'train/'")


def test_artifact_without_a_model_is_not_exported(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    key = next(smoke.store.glob("pairs/*/manifest.json")).parent.name
    assert_refused(cli("export", key, "--to", tmp_path / "m", "--store", smoke.store), "holds no model")


def test_compare_before_any_run_says_what_to_run(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("compare", "testbed-smoke", "--store", tmp_path), "no record", "ctpd run testbed-smoke")


def test_unknown_command_names_the_nearest(cli: Cli) -> None:
    outcome = cli("trian")
    assert outcome.code == 2
    assert "Did you mean 'train'?" in outcome.err


def test_missing_evaluation_data_is_said_before_the_first_stage(
    cli: Cli, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(
        lambda text: text.replace("suite: testbed", "suite: card").replace("data_root: testbed", "data_root: lost")
    )
    outcome = cli("run", str(path), "--store", str(tmp_path / "store"))
    assert_refused(outcome, "column 'GSM8K'", "lost/openai/gsm8k does not exist", "hf download openai/gsm8k")
    assert not (tmp_path / "store").exists()
