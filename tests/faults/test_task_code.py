"""Tasks that run code are refused before any of it runs, unless a recipe allows them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctpd.app import Experiment
from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.pipeline.graph import Graph
from ctpd.recipe import shipped_recipes
from harness.evaluate import check_code, check_column
from harness.loading import PACKAGED_TASKS
from harness.suites import Column, load_suite
from tests.conftest import Cli


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    folder = tmp_path / "hub/someone/rows"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"question": "Why?", "answer": "So."}\n' * 3)
    card = {"configs": [{"config_name": "main", "data_files": [{"split": "test", "path": "test.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return tmp_path / "hub"


def definition(**changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "task": "mine",
        "dataset_path": "someone/rows",
        "dataset_name": "main",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return own | changes


class Task:
    """A folder with tasks of the user's own; `mark` exists if their code has run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder / "tasks", folder / "ran"
        self.folder.mkdir()
        (self.folder / "code.py").write_text(f"open({str(self.mark)!r}, 'w').close()\ndef same(docs): return docs\n")

    def write(self, text: str = "", name: str = "mine", **changes: Any) -> Column:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(definition(**changes)) + text)
        return Column(
            name="Mine", task="mine", metric="exact_match,none", version=1.0, shots=0, folder=str(self.folder)
        )


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)


def test_a_task_without_code_is_loaded(task: Task, data_root: Path) -> None:
    check_column(task.write(), data_root=data_root)


def test_a_function_is_refused_before_it_runs_and_allowed_by_name(task: Task, data_root: Path) -> None:
    column = task.write("process_docs: !function code.same\n")
    with pytest.raises(UserError, match=r"runs Python of its own .*!function code\.same.* `allow_code: \[mine\]`"):
        check_column(column, data_root=data_root)
    assert not task.mark.exists()
    check_column(column, data_root=data_root, allow_code=True)
    assert task.mark.exists()


@pytest.mark.parametrize("link", ["include", "group", "nested group", "tag"])
def test_a_function_is_found_wherever_the_task_leads(link: str, task: Task, data_root: Path) -> None:
    task.write("process_docs: !function code.same\n", name="other", task="other", tag="tagged")
    group: dict[str, Any] = {"group": "mine", "task": ["tagged" if link == "tag" else "other"]}
    if link == "nested group":
        group["task"] = [{"group": "inner", "task": [{"task": "other", "num_fewshot": 0}]}]
    column = task.write()
    if link == "include":
        (task.folder / "mine.yaml").write_text("include: other.yaml\ntask: mine\n")
    else:
        (task.folder / "mine.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(UserError, match="runs Python of its own"):
        check_column(column, data_root=data_root)
    assert not task.mark.exists()


def test_a_folder_of_lm_evals_that_leads_out_of_it_is_not_trusted(task: Task, data_root: Path) -> None:
    column = task.write("process_docs: !function code.same\n")
    up = "/".join([".."] * len(PACKAGED_TASKS.parts))
    with pytest.raises(UserError, match="runs Python of its own"):
        check_column(column.model_copy(update={"folder": f"{up}{task.folder}"}), data_root=data_root)
    assert not task.mark.exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"unsafe_code": True}, "runs the code that a model generates"),
        ({"metric_list": [{"metric": "code_eval"}]}, "runs the code that a model generates"),
        ({"metric_list": [{"metric": "someone/metric"}]}, r"a metric that lm-eval does not have \('someone/metric'\)"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "a metric that lm-eval does not have"),
    ],
    ids=["unsafe_code", "code_eval", "metric of the hub", "known metric from the hub"],
)
def test_generated_code_and_fetched_programs_are_refused(
    changes: dict[str, Any], text: str, task: Task, data_root: Path
) -> None:
    with pytest.raises(UserError, match=text):
        check_column(task.write(**changes), data_root=data_root)


def test_a_packaged_task_that_runs_generated_code_is_refused() -> None:
    column = Column(name="Code", task="humaneval", metric="pass@1,create_test", version=1.0)
    with pytest.raises(UserError, match=r"runs the code that a model generates.*allow_code: \[humaneval\]"):
        check_code(column)


@pytest.mark.parametrize("suite", ["testbed", "card", "paper"])
def test_shipped_suites_need_no_permission(suite: str) -> None:
    for column in load_suite(suite).columns:
        check_code(column)


def test_a_template_that_reaches_into_python_is_refused(task: Task, data_root: Path) -> None:
    code = f"{{{{ cycler.__init__.__globals__.os.system('touch {task.mark}') }}}}"
    with pytest.raises(UserError, match="a template of the task reaches into Python"):
        check_column(task.write(doc_to_text=code), data_root=data_root)
    assert not task.mark.exists()


def suite_of(task: Task, folder: Path) -> Path:
    column = task.write("process_docs: !function code.same\n")
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "columns": [json.loads(column.model_dump_json())]}))
    return path


def test_a_recipe_allows_a_task_by_name_and_only_then_its_key_changes(task: Task, tmp_path: Path) -> None:
    suite, smoke = suite_of(task, tmp_path), shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")

    def experiment(name: str, allow: str) -> Experiment:
        text = smoke.replace("suite: testbed", f"suite: {suite}{allow}", 1)
        (tmp_path / f"{name}.yaml").write_text(text)
        return Experiment(tmp_path / f"{name}.yaml")

    plain, other = experiment("plain", ""), experiment("other", ", allow_code: [another]")
    allowed = experiment("allowed", ", allow_code: [mine]")
    keys = [{stage.key for stage in Graph(each.records).stages} for each in (plain, other, allowed)]
    assert keys[0] == keys[1] != keys[2]
    for each in (plain, other):
        with pytest.raises(UserError, match="runs Python of its own"):
            each.check_suite(Store(tmp_path / "store"))
    allowed.check_suite(Store(tmp_path / "store"))
    assert not task.mark.exists()


def test_a_model_alone_is_not_evaluated_on_such_a_suite(cli: Cli, task: Task, tmp_path: Path, data_root: Path) -> None:
    from ctpd.models import save_model
    from tests.fixtures.tiny import tiny_model
    from tests.fixtures.tokenizers import tokenizer

    save_model(tiny_model("llama", scorer=False), tmp_path / "model")
    tokenizer("byte_bpe").save_pretrained(str(tmp_path / "model"))
    suite = suite_of(task, tmp_path)
    words = ["--suite", suite, "--data-root", data_root, "--store", tmp_path / "store", "--device", "cpu"]
    outcome = cli("eval", "--model", tmp_path / "model", *words)
    assert outcome.code == 2
    assert "runs Python of its own" in outcome.err
    assert not task.mark.exists()
