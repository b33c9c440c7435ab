"""Suites: strict files, and the shipped ones are the method's."""

from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from harness.suites import load_suite


def test_suites_are_strict_and_may_bring_their_own_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    file = tmp_path / "suite.yaml"
    column = '{name: A, task: colour_choice, metric: "acc,none", version: 1.0, folder: mine}'
    file.write_text(f"name: own\ncolumns:\n  - {column}\n")
    assert load_suite(file).columns[0].folder == str(folder.resolve())
    assert load_suite(file).columns[0].shots is None
    for text, message in [
        ("name: own\ncolumns: []\n", "no columns"),
        (f"name: own\ncolumns:\n  - {column}\n  - {column}\n", "'A' is taken"),
        (f"name: own\ncolumns:\n  - {column.replace('acc,none', 'acc')}\n", "names no filter"),
        (f"name: own\ncolumns:\n  - {column.replace('version', 'verson')}\n", "Did you mean 'version'"),
        (
            f"name: own\ncolumns:\n  - {column[:-1]}, shots: -1}}\n",
            r"line 3: 'columns\[0\]\.shots' must be a whole number of at least 0",
        ),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_suite(file)
    with pytest.raises(UserError, match="Did you mean 'card'"):
        load_suite("cart")
    with pytest.raises(UserError, match="no suite file"):
        load_suite(tmp_path / "none.yaml")


def test_the_paper_and_card_suites_are_those_of_the_method() -> None:
    """docs/method.md#suites: tasks, shots and metrics."""
    table = {
        "GSM8K": ("gsm8k", 5, "exact_match,strict-match"),
        "TruthfulQA": ("truthfulqa_mc2", 0, "acc,none"),
        "Winogrande": ("winogrande", 5, "acc,none"),
        "ARC": ("arc_challenge", 25, "acc_norm,none"),
        "HellaSwag": ("hellaswag", 10, "acc_norm,none"),
        "MMLU": ("mmlu", 5, "acc,none"),
    }
    paper = {column.name: (column.task, column.shots, column.metric) for column in load_suite("paper").columns}
    card = {column.name: (column.task, column.shots, column.metric) for column in load_suite("card").columns}
    assert paper == table
    assert card == {name: table[name] for name in ("GSM8K", "TruthfulQA", "Winogrande")}
