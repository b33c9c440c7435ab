"""A newcomer's session: own models, own pairs, own task; every hint that is printed on the way is run as printed."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conftest import Cli, Outcome
from tests.fixtures.tokenizers import with_template

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TASK = {
    "task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "test.jsonl"}}, "test_split": "test",
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1.0},
}  # fmt: skip


def write_model(folder: str, kind: str) -> None:
    tokenizer = with_template(kind, CHAT)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, 60 pairs, and a task with its data."""
    monkeypatch.chdir(tmp_path)
    write_model("teacher", "byte_bpe")
    write_model("student", "gemma_bpe")
    rows = [{"prompt": f"Question {i}?", "chosen": f"It is {i}, of course.", "rejected": "No."} for i in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [{"question": f"q{i}", "choices": ["red", "blue"], "label": i % 2} for i in range(6)]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    Path("tasks").mkdir()
    Path("tasks/colours.yaml").write_text(yaml.safe_dump(TASK))
    column = {"name": "Colours", "task": "colours", "metric": "acc,none", "version": 1.0, "folder": "tasks"}
    Path("suite.yaml").write_text(yaml.safe_dump({"name": "own", "columns": [column]}))
    return tmp_path


def hints(outcome: Outcome) -> list[list[str]]:
    """The commands that an output names: in backticks, or at the end of a line."""
    found = re.findall(r"`ctpd ([^`]+)`|(?::|then:) ctpd (.+)$", outcome.out + outcome.err, re.MULTILINE)
    return [shlex.split(first or second) for first, second in found]


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_newcomers_session(cli: Cli, project: Path) -> None:
    made = done(
        cli("init", "--teacher", "teacher", "--student", "student", "--data", "pairs.jsonl", "--to", "my recipe.yaml")
    )
    path = project / "my recipe.yaml"
    text = (
        path.read_text()
        .replace("suite: card", "suite: suite.yaml")
        .replace("precision: bfloat16", "precision: float32")
    )
    path.write_text(text.replace("warmup_ratio: 0.1}", "warmup_ratio: 0.1, lora: {r: 2, alpha: 4}}"))

    (plan,) = hints(made)
    planned = done(cli(*plan))
    assert "can hardly train" not in planned.out
    (shown,) = hints(planned)
    assert done(cli(*shown)).out.count("pair ") == 3

    first = done(cli("run", "my recipe.yaml", "--only", "Teacher"))
    (rest,) = [words for words in hints(first) if words[0] == "run"]
    ran = done(cli(*rest))
    assert "missing" not in ran.out
    notes = [line for line in ran.err.splitlines() if line.startswith("Note: ")]
    assert all("all importance weights are equal" in line for line in notes), "random models, and a small learning rate"
    assert len(notes) == 2
    assert "CTPD: all importance weights are equal" in ran.out
    assert hints(done(cli("compare", "my recipe.yaml"))) == []
    assert done(cli(*rest)).err.startswith("0 stages built")

    trained = done(cli("train", "my recipe.yaml"))
    (export,) = hints(trained)
    keys = {row["run"]: row["key"] for row in json.loads(done(cli("train", "my recipe.yaml", "--json", "--quiet")).out)}
    done(cli(*[{"KEY": keys["CTPD"], "DIR": "out"}.get(word, word) for word in export], "--merge"))
    tokenizer = AutoTokenizer.from_pretrained("out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Question 3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]
