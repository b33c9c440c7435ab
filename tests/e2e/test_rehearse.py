"""`ctpd rehearse`: everything that would be run is tried small, and a page says what will run, what will not, and how much."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import Cli
from tests.fixtures.published import published_model
from tests.fixtures.tokenizers import CHATML, with_template

TURNS = {"user": "Q: {content}\n", "assistant": "A: {content}\n"}
SIZES = {"vocab_size": 700, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip


def write_models(folder: Path) -> None:
    """A teacher with its weights, and a student of which only configuration and tokenizer are here."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "teacher")
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).config.save_pretrained(folder / "student")
    for role in ("teacher", "student"):
        with_template("byte_bpe", CHATML).save_pretrained(str(folder / role))


def write_recipe(folder: Path, **shared: Any) -> Path:
    """A run of two ready-made models on a few pairs, evaluated on the testbed's documents."""
    lines = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No, {n} is not."} for n in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models: dict[str, Any] = {
        role: {"model": str(folder / role), "template": dict(TURNS), "sft": "skip"} for role in ("teacher", "student")
    }
    recipe: dict[str, Any] = {
        "name": "own",
        "about": "Two models of one's own.",
        "shared": {
            **models,
            "testbed": {
                "num_topics": 8,
                "num_pairs": 16,
                "num_eval_pairs": 8,
                "num_documents": 12,
                "teacher_texts": 20,
                "student_texts": 20,
            },
            "data": {"train": {"path": str(folder / "pairs.jsonl")}, "max_tokens": 64, "max_prompt_tokens": 32},
            "train": {"pairs_per_step": 8, "epochs": 3},
            "evaluation": {"suite": "testbed", "data_root": "testbed"},
            "seeds": [0, 1],
            **shared,
        },
        "untrained": {"Student": "student"},
        "runs": {"DPO": {"method": "dpo", "tuned": {"learning_rate": 1e-3}}},
        "tables": {"main": {"caption": "Main", "rows": ["Student", "DPO"], "base": "Student"}},
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path)
    return tmp_path


def test_a_recipe_is_rehearsed_through_to_the_report_and_the_page_says_how_much_it_takes(
    cli: Cli, folder: Path
) -> None:
    recipe, kept = write_recipe(folder), folder / "kept"
    outcome = cli("rehearse", recipe, "--device", "cpu", "--keep", kept)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "everything that could be tried will run" in outcome.out
    assert f"weights: {folder / 'student'}: the directory holds configuration and tokenizer alone" in outcome.out
    assert "Pairs: 24 are used" in outcome.out
    assert {path.name for path in (kept / "tables").iterdir()} >= {"main.md", "report.html"}
    small = json.loads((kept / "student" / "model" / "config.json").read_text())
    assert (small["hidden_size"], small["vocab_size"], small["architectures"]) == (32, 700, ["Qwen2ForCausalLM"])

    again = cli("rehearse", recipe, "--device", "cpu", "--keep", kept, "--quiet", "--json")
    found = json.loads(again.out)
    rows = {row["label"]: row for row in found["stages"]}
    assert {row["state"] for row in rows.values()} == {"ran"}
    assert (rows["DPO"]["stages"], rows["evaluate: DPO"]["stages"]) == (2, 8)  # two seeds, four columns
    weights = sum(p.numel() for p in Qwen2ForCausalLM(Qwen2Config(**SIZES)).parameters())
    assert rows["DPO"]["memory"] > 16 * weights  # of the real model: weights, gradients and two moments in float32
    tokens = found["pairs"]["tokens"]["student"]
    products = weights - 700 * 128  # without the input embeddings
    assert rows["DPO"]["operations"] > 2 * 3 * 6 * products * tokens  # seeds, epochs, 6 N a token
    assert rows["DPO"]["operations"] < 2 * 3 * 6 * products * tokens * 1.2


def test_what_will_not_run_is_on_the_page_and_what_does_not_need_it_goes_on(cli: Cli, folder: Path) -> None:
    """A task that is not there, pairs of which too many are refused, a model without one of its weights."""
    columns = [
        {"name": "Facts", "task": "ctpd_testbed_facts", "metric": "acc,none", "version": 2.0},
        {"name": "Other", "task": "no_such_task", "metric": "acc,none", "version": 1.0},
    ]
    (folder / "suite.yaml").write_text(json.dumps({"name": "mine", "columns": columns}))
    evaluation = {"suite": str(folder / "suite.yaml"), "data_root": "testbed"}
    student = {"model": str(folder / "teacher"), "template": dict(TURNS), "sft": "skip"}
    recipe = write_recipe(folder, evaluation=evaluation, student=student)
    with (folder / "pairs.jsonl").open("a") as lines:
        lines.write('{"prompt": "x", "chosen": "y", "rejected": "y"}\n' * 4)
    from safetensors.torch import load_file, save_file

    weights = folder / "teacher" / "model.safetensors"
    left = {name: value for name, value in load_file(weights).items() if name != "lm_head.weight"}
    save_file(left, weights, metadata={"format": "pt"})
    outcome = cli("rehearse", recipe, "--device", "cpu", "--store", folder / "store", "--set", "shared.seeds=[0]")
    assert outcome.code == 2, outcome.out + outcome.err
    problems = outcome.out.partition("Will not run:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split(": ")[0] for line in problems] == ["- evaluate", "- column Other", "- pairs"]
    assert "lacks 1 of the model's weights" in problems[0]
    assert "no_such_task" in problems[1]
    assert "4 of 28 rows are dropped (equal 4)" in problems[2]
    assert "ran " in outcome.out.partition("  DPO\n")[0].splitlines()[-1]
    assert "Traceback" not in outcome.out + outcome.err
    assert not (folder / "store").exists()  # a rehearsal leaves nothing


def test_a_key_that_is_set_is_checked_as_if_it_stood_in_the_recipe(cli: Cli, folder: Path) -> None:
    recipe = write_recipe(folder)
    store = ("--store", folder / "store")
    unknown = cli("rehearse", recipe, *store, "--set", "shared.trian.epochs=2")
    assert unknown.code == 2
    assert f"{recipe} with --set: unknown key 'shared.trian'" in unknown.err
    assert cli("rehearse", recipe, *store, "--set", "shared").code == 2
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").touch()
    refused = cli("rehearse", recipe, "--keep", folder / "full")
    assert refused.code == 2
    assert "something else than an earlier rehearsal" in refused.err


PAPER = (("qwen7b-llama1b", "Qwen2.5-7B", "Llama-3.2-1B"), ("qwen14b-llama8b", "Qwen2.5-14B", "Llama-3.1-8B"))


@pytest.mark.parametrize(("recipe", "teacher", "student"), PAPER, ids=[names[0] for names in PAPER])
def test_a_recipe_of_the_paper_is_rehearsed_with_its_tokenizers(
    cli: Cli, tmp_path: Path, shared_dir: Path, recipe: str, teacher: str, student: str
) -> None:
    """Its configurations without weights, some pairs of the sample, one run and one task; the whole takes minutes."""
    columns = [
        {"name": "Winogrande", "task": "winogrande", "shots": 5, "metric": "acc,none", "version": 1.0,
         "datasets": ["allenai/winogrande"]},
    ]  # fmt: skip
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "one", "columns": columns}))
    sample = shared_dir / "data" / "preference" / "ultrafeedback_binarized_eval200.parquet"
    changes = {
        "shared.teacher.model": published_model(teacher, shared_dir, tmp_path),
        "shared.student.model": published_model(student, shared_dir, tmp_path),
        "shared.teacher.revision": "null",
        "shared.student.revision": "null",
        "shared.data.train": f"{{path: {sample}}}",
        "shared.data.eval": "null",
        "shared.data.limit": 40,
        "shared.student.sft": "skip",
        "shared.evaluation": f"{{suite: {tmp_path / 'suite.yaml'}, data_root: {shared_dir / 'data' / 'hub'}}}",
        "untrained": "{}",
        "runs": "{DPO: {method: dpo, tuned: {learning_rate: 1e-6}}}",
        "ablations": "{}",
        "tables": "{main: {caption: Main, rows: [DPO]}}",
    }
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    outcome = cli("rehearse", recipe, "--device", "cpu", "--store", tmp_path / "store", "--quiet", "--json", *options)
    found = json.loads(outcome.out)
    assert (outcome.code, found["problems"]) == (0, []), outcome.err
    rows = {row["label"]: row for row in found["stages"]}
    assert {row["state"] for row in rows.values()} == {"ran"}
    assert [problem["where"] for problem in found["not_rehearsed"]] == [
        "weights"
    ]  # of the student: no run reads the teacher
    assert found["pairs"]["pairs"] == 40
    assert rows["DPO"]["memory"] > 2 * 1.2e9  # 16 bytes a weight, over 8 processes
