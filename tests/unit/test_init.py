"""The recipe that `ctpd init` writes is sized for the data and fits the models."""

import json
from pathlib import Path
from typing import Any

import pytest

from ctpd.cli.template import write_recipe
from ctpd.core.errors import UserError
from ctpd.objectives.preference import PreferenceParams
from ctpd.pipeline.methods import Method
from ctpd.pipeline.stages.pairs import read_usable_file
from ctpd.recipe import PlainSpec, Recipe, load_recipe
from ctpd.recipe.model import SftPhase, Source
from ctpd.text.config import Columns, Layout
from ctpd.train.config import Steps
from tests.conftest import Cli


def written(tmp_path: Path, pairs: int, *, chat: bool = True) -> Recipe:
    model = tmp_path / "model"
    model.mkdir()
    template = {"chat_template": "{{ messages }}"} if chat else {}
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x", **template}))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * pairs)
    to = tmp_path / "mine.yaml"
    write_recipe(to, teacher=str(model), student=str(model), data=tmp_path / "pairs.jsonl")
    return load_recipe(to)


@pytest.mark.parametrize("pairs", [1, 7, 60, 128, 200, 255, 1000, 5000])
def test_every_training_has_at_least_twenty_steps(tmp_path: Path, pairs: int) -> None:
    shared = written(tmp_path, pairs).shared
    assert isinstance(shared.student.sft, SftPhase)
    for schedule in (shared.train, shared.student.sft, shared.teacher.positive, shared.student.negative):
        assert schedule is not None
        assert not isinstance(schedule, str)
        assert Steps.of(pairs, schedule).total >= 20


def test_with_enough_data_the_sizes_are_the_papers(tmp_path: Path) -> None:
    shared = written(tmp_path, 5000).shared
    assert isinstance(shared.student.sft, SftPhase)
    assert (shared.train.pairs_per_step, shared.student.sft.pairs_per_step) == (16, 128)
    assert (shared.train.epochs, shared.student.sft.epochs) == (1, 1)


def test_it_says_the_weights_of_ctpd_and_whether_requests_are_templated(tmp_path: Path) -> None:
    recipe = written(tmp_path, 60)
    params: dict[str, Any] = dict(recipe.runs["CTPD"].params)
    assert params.keys() == {"k", "mu", "lower", "upper"}
    assert Method.make("ctpd", params, source="x").params == PreferenceParams()
    assert recipe.shared.evaluation.chat_template
    assert "chat_template: true" in (tmp_path / "mine.yaml").read_text()


def test_a_model_without_a_chat_template_has_a_plain_one_and_is_fine_tuned(tmp_path: Path) -> None:
    shared = written(tmp_path, 60, chat=False).shared
    assert isinstance(shared.student.template, PlainSpec)
    assert shared.student.template.user == "{content}\n"
    assert isinstance(shared.teacher.sft, SftPhase)
    assert not shared.evaluation.chat_template


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pair"):
        written(tmp_path, 0)


def for_rows(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[str, Source]:
    """What `init` says of a file, and the data source that it writes."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    to = tmp_path / "mine.yaml"
    said = write_recipe(
        to, teacher=str(tmp_path / "model"), student=str(tmp_path / "model"), data=tmp_path / "data.json", **options
    )
    return said.removeprefix(f"{tmp_path}/"), load_recipe(to).shared.data.train


def test_the_layout_of_the_data_is_written_into_the_recipe_and_said(tmp_path: Path) -> None:
    row = {"in: {": "Why?", "instruction": "Why?", "input": "", "output": ["Yes.", "No."]}
    said, source = for_rows(tmp_path, [row] * 3)
    assert said == (
        "data.json: 3 rows; texts; read: instruction as prompt, input, output as responses; not read: 'in: {'."
    )
    assert source.layout == Layout(columns=Columns(prompt="instruction", input="input", responses="output"))


def test_columns_that_are_not_recognised_are_given_or_nothing_is_written(tmp_path: Path) -> None:
    row = {"in: {": "Why?", "a\u2028b": "Yes.", "b": "No."}
    with pytest.raises(UserError, match=r"the columns are 'in: \{', .*--column prompt=COLUMN"):
        for_rows(tmp_path, [row])
    assert not (tmp_path / "mine.yaml").exists()
    columns = {"prompt": "in: {", "chosen": "a\u2028b", "rejected": "b"}
    said, source = for_rows(tmp_path, [row], columns=columns)
    assert source.layout == Layout(columns=Columns(**columns))
    assert "⟨U+2028⟩" in said
    with pytest.raises(UserError, match="Did you mean 'prompt'"):
        for_rows(tmp_path / "model", [row], columns={"promt": "b"})
    with pytest.raises(UserError, match="the column 'c', which `columns` names as `chosen`, is missing"):
        for_rows(tmp_path / "model", [row], columns={"chosen": "c"})


def test_the_command_says_what_it_found_and_wrote(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "data.jsonl").write_text('{"question": "Why?", "chosen": "Yes.", "rejected": "No."}\n')
    options = ["--teacher", tmp_path / "model", "--student", tmp_path / "model", "--data", tmp_path / "data.jsonl"]
    outcome = cli("init", *options, "--to", tmp_path / "r.yaml", "--column", "prompt=question")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0].endswith(
        "data.jsonl: 1 rows; texts; read: question as prompt, chosen, rejected."
    )
    assert 'columns: {prompt: "question"}}  # 1 pairs' in (tmp_path / "r.yaml").read_text()
    assert cli("init", *options, "--to", tmp_path / "s.yaml", "--column", "question").code == 2


def test_a_pattern_and_an_encoding_are_written_into_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, text in (("a", "Où ?"), ("b", "Ça ?")):
        row = json.dumps({"question": text, "chosen": "Là.", "rejected": "Né."}, ensure_ascii=False)
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n", encoding="cp1252")
    model, data, to = str(tmp_path / "model"), tmp_path / "*.jsonl", tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=r"looks like WINDOWS-1252.*--encoding cp1252"):
        write_recipe(to, teacher=model, student=model, data=data)
    said = write_recipe(to, teacher=model, student=model, data=data, encoding="cp1252")
    assert "2 rows; texts; read: question as prompt" in said
    source = load_recipe(to).shared.data.train
    assert (source.path, source.encoding) == (str(data), "cp1252")
    pairs = read_usable_file(data, encoding=source.encoding, layout=source.layout).pairs
    assert [pair.prompt[0].content for pair in pairs] == ["Où ?", "Ça ?"]


def test_a_column_of_the_conversation_that_is_not_read_is_said_before_a_plan_refuses_it(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "history": [["d", "e"]]}) + "\n")
    said = write_recipe(tmp_path / "mine.yaml", teacher=str(tmp_path), student=str(tmp_path), data=data)
    assert "not read: 'history'" in said
    assert "Before a plan: the column 'history' is filled in row 0 and is not read." in said
    assert "`ignore: [history]`" in said
