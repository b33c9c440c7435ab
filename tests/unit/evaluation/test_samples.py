"""Answers that an evaluation keeps: the same documents for every model, bounded, and in lm-eval's own format."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from transformers import LlamaForCausalLM

from ctpd.core.printing import printable_lines
from harness import samples
from harness.evaluate import Documents, evaluate_column
from harness.record import DocumentScore
from harness.samples import answers_of, cut, write_samples
from harness.suites import Column
from tests.fixtures.lm_eval_model import stock


def test_answers_are_the_likeliest_option_with_the_score_of_the_document(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    found = evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    scores = dict(found.documents)
    assert found.answers is not None
    assert [one.doc_hash for one in found.answers] == sorted(scores)
    for one in found.answers:
        assert one.score == scores[one.doc_hash]
        assert (one.answer == one.target) == (one.score == 1)
        assert one.prompt.endswith("?\nA:")
        assert {one.answer, one.target} <= {"red", "blue", "green"}


def test_sample_files_are_those_that_lm_eval_writes(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path, tmp_path: Path
) -> None:
    found = evaluate_column(model, tokenizer, words, Documents(data_root, samples=tmp_path / "ours"), batch_size=5)
    (ours,) = (tmp_path / "ours").iterdir()
    theirs = stock(model, tokenizer, words, data_root)["samples"]["colour_words"]
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.date_id = "now"
    tracker.save_results_samples("colour_words", [one for one in theirs if one["filter"] == "whole"])
    (expected,) = (tmp_path / "theirs" / "model").glob("samples_*.jsonl")
    assert read(ours) == read(expected)
    assert found.answers is not None
    generated = {one["doc_hash"]: printable_lines(one["resps"][0][0]) for one in theirs}
    assert {one.doc_hash: one.answer for one in found.answers} == generated


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample(
    doc: str, *requests: tuple[str, str], response: Any = None, target: Any = 0, **fields: Any
) -> dict[str, Any]:
    responses = (
        [[response]] * len(requests) if response is not None else [[(-float(i), False)] for i in range(len(requests))]
    )
    return {
        "doc_id": 0,
        "doc": {"text": doc},
        "target": target,
        "arguments": list(requests),
        "resps": responses,
        "filtered_resps": [one[0] for one in responses],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": doc,
        **fields,
    }


def answer(one: dict[str, Any]) -> Any:
    return answers_of({"t": [one]}, [DocumentScore(one["doc_hash"], 1.0)], "acc")[0]


def test_a_gap_that_is_filled_in_is_shown_as_options() -> None:
    found = answer(
        sample("d", ("The cup fell since the cup", " was full."), ("The cup fell since the tray", " was full."))
    )
    assert found.prompt == "The cup fell since the"
    assert (found.answer, found.target) == ("cup was full.", "cup was full.")


def test_a_single_request_and_a_generated_answer_are_shown_as_they_are() -> None:
    assert answer(sample("d", ("Once upon", " a time"))).answer == " a time"
    assert answer(sample("d", ("How many?", "{}"), response="7.", target="7"))[2:] == ("How many?", "7", "7.")


def test_the_kept_documents_are_the_first_by_hash_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SHOWN", 2)
    monkeypatch.setattr(samples, "KEPT", 3)
    found = {"b": [sample(name, ("p", "c")) for name in "ed"], "a": [sample(name, ("p", "c")) for name in "bca"]}
    scored = [DocumentScore(name, 0.0) for name in "bcaed"]
    assert [one.doc_hash for one in answers_of(found, scored, "acc")] == ["a", "b"]
    first, second = write_samples(found, tmp_path)
    assert [one["doc_hash"] for one in read(first)] == ["b", "c", "a"]
    assert read(second) == []


def test_kept_files_stay_small_whatever_a_document_or_a_model_writes(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    huge = [
        sample(f"{i:03}", *[(long, long)] * 300, response=long, target=long, nested={"deep": [long] * 300})
        for i in range(3)
    ]
    (path,) = write_samples({"t": huge}, tmp_path)
    assert path.stat().st_size < 3 * 300 * 2 * samples.ANY
    assert "[996,000 characters cut]" in path.read_text(encoding="utf-8")
    found = answer(huge[0])
    assert len("".join(found[2:])) < 2000
    assert found.prompt.startswith("[999,300 characters cut] xxx")
    assert found.answer.endswith("xxx [999,600 characters cut]")


def test_what_cannot_be_written_as_text_is_replaced(tmp_path: Path) -> None:
    one = sample("d", ("a\ud800\x1b[31m\u202e\n", "c"), response="b\udfff\x00", target="\ud800")
    (path,) = write_samples({"t": [one]}, tmp_path)
    assert read(path)[0]["target"] == "?"
    found = answer(one)
    assert found.prompt == "a⟨U+D800⟩⟨U+001B⟩[31m⟨U+202E⟩\n"
    assert found.answer == "b⟨U+DFFF⟩⟨U+0000⟩"


def test_cutting_says_how_much_is_missing() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcdef", 2) == "ab [4 characters cut]"
    assert cut("abcdef", 2, end=True) == "[4 characters cut] ef"
