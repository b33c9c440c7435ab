"""What a task of the user's own reads: the digest moves with each file that it reads, and with no other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctpd.pipeline.stages.evaluate import ColumnTask, Mirror
from harness.suites import Column, load_suite
from harness.task_files import task_files


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))


@pytest.fixture
def column(tmp_path: Path) -> Column:
    """A group of two tasks with an included file, a python module, a data file outside, and a folder as data set."""
    tasks = tmp_path / "tasks"
    write(tasks / "group.yaml", {"group": "mine", "task": ["one", {"task": "two"}]})
    one = {"task": "one", "include": "../common/base.yaml", "dataset_kwargs": {"data_files": {"test": "../one.jsonl"}}}
    write(tasks / "one.yaml", one)
    write(tasks / "sub" / "two.yaml", "task: two\ndataset_path: sets/two\nprocess_docs: !function utils.docs\n")
    write(tasks / "sub" / "utils.py", "def docs(docs): return docs\n")
    write(tasks / "sub" / "words.txt", "a")
    write(tasks / "other.yaml", {"task": "other", "dataset_path": "json"})
    write(tmp_path / "common" / "base.yaml", {"dataset_path": "json", "metadata": {"version": 1.0}})
    write(tmp_path / "one.jsonl", "{}")
    write(tmp_path / "base" / "sets" / "two" / "test.jsonl", "{}")
    write(tmp_path / "base" / ".." / "one.jsonl", "{}")
    return Column(name="Mine", task="mine", metric="acc,none", version=1.0, folder=str(tasks))


@pytest.mark.parametrize(
    "changed",
    ["tasks/group.yaml", "tasks/one.yaml", "tasks/sub/two.yaml", "tasks/sub/utils.py", "tasks/sub/words.txt",
     "common/base.yaml", "one.jsonl", "base/sets/two/test.jsonl"],
)  # fmt: skip
def test_the_digest_moves_with_every_file_that_a_task_reads(tmp_path: Path, column: Column, changed: str) -> None:
    before = task_files(column, base=tmp_path / "base").digest
    path = tmp_path / changed
    path.write_text(path.read_text() + "\n# edited\n")
    assert before is not None
    assert task_files(column, base=tmp_path / "base").digest != before


def test_the_digest_does_not_move_with_another_task_nor_with_the_folder(tmp_path: Path, column: Column) -> None:
    before = task_files(column, base=tmp_path / "base").digest
    write(tmp_path / "tasks" / "other.yaml", {"task": "other", "dataset_path": "csv"})
    write(tmp_path / "tasks" / "notes.md", "later")
    write(tmp_path / "tasks" / "sub" / "__pycache__" / "utils.pyc", "x")
    assert task_files(column, base=tmp_path / "base").digest == before
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    there = column.model_copy(update={"folder": str(moved / "tasks")})
    assert task_files(there, base=moved / "base").digest == before


def test_a_task_that_comes_with_lm_eval_or_ctpd_has_no_digest() -> None:
    for name in ("paper", "card", "testbed"):
        for column in load_suite(name).columns:
            for documents in (None, Mirror(".", {})):
                task = ColumnTask.of(column, documents)
                assert task.files is None
                assert "files" not in task.identity


def test_a_data_set_in_the_working_directory_counts_since_it_is_read_instead_of_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    column = load_suite("card").columns[0]
    write(tmp_path / column.datasets[0] / "test.jsonl", "1")
    before = ColumnTask.of(column, None).files
    write(tmp_path / column.datasets[0] / "test.jsonl", "2")
    assert ColumnTask.of(column, None).files not in (None, before)
    assert ColumnTask.of(column, Mirror(".", {})).files is None, "the mirror's digests stand for it"


def test_an_evaluation_refuses_files_that_changed_since_it_was_planned(tmp_path: Path, column: Column) -> None:
    mirror = Mirror(str(tmp_path / "base"))
    task = ColumnTask.of(column, mirror)
    task.refuse_changes(mirror)
    write(tmp_path / "one.jsonl", json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="have changed since this command was started"):
        task.refuse_changes(mirror)


@pytest.fixture
def own_suite(tmp_path: Path) -> Path:
    """A suite whose task lies beside it, on a local data file."""
    rows = [{"question": f"q{i}", "choices": ["red", "blue"], "label": i % 2} for i in range(8)]
    write(tmp_path / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label", "metadata": {"version": 1.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    write(tmp_path / "mine" / "colours.yaml", task)
    column = {"name": "Colours", "task": "colours", "metric": "acc,none", "version": 1.0, "folder": "mine"}
    write(tmp_path / "suite.yaml", {"name": "own", "columns": [column]})
    return tmp_path / "suite.yaml"


def edit_target(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "colours.yaml"
    path.write_text(path.read_text().replace("doc_to_target: label", "doc_to_target: '{{1 - label}}'"))


def edit_data(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(path.read_text().replace('"label": 0', '"label": 1'))


@pytest.mark.parametrize("edit", [edit_target, edit_data])
def test_an_edited_task_is_evaluated_anew(
    cli: Any, own_suite: Path, tmp_path: Path, tiny_folder: Path, edit: Callable[[Path], None]
) -> None:
    """Issue 12: it was reported as a hit, with the old score."""

    def score(store: str) -> tuple[str, float]:
        outcome = cli("eval", "--model", tiny_folder, "--suite", own_suite, "--store", tmp_path / store, "--json")
        assert outcome.code == 0, outcome.err
        (value,) = next(iter(json.loads(outcome.out).values())).values()
        return outcome.err.splitlines()[-2], value

    score("store")
    edit(tmp_path)
    said, after = score("store")
    assert said.startswith("1 stage built")
    assert after == score("fresh")[1]
    assert score("store")[0].startswith("0 stages built")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A random model with a tokenizer of bytes, in a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=160, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
