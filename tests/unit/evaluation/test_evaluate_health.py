"""Health of the answers that an evaluation generates, beside a plain count over lm-eval's own model."""

import copy
import types
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from ctpd.core.errors import Unmeasurable, UserError
from harness import generations
from harness.answers import Health
from harness.endings import watched_vllm
from harness.evaluate import Documents, evaluate_column
from harness.health import repeated
from harness.suites import Column
from tests.fixtures.lm_eval_model import stock


def counted(model: Any, tokenizer: Any, column: Column, data_root: Path) -> list[str]:
    """The answers of lm-eval's own model."""
    samples = stock(model, tokenizer, column, data_root)["samples"][column.task]
    return [sample["resps"][0][0] for sample in samples if sample["filter"] == column.metric.split(",")[1]]


def health(model: Any, tokenizer: Any, column: Column, data_root: Path) -> Health:
    found = evaluate_column(model, tokenizer, column, Documents(data_root), batch_size=5).health
    assert found is not None
    return found


def steered(model: LlamaForCausalLM, tokenizer: Any, text: str) -> LlamaForCausalLM:
    """A copy that likes the bytes of ``text`` more, so that some of its answers end and some do not."""
    import torch

    other = copy.deepcopy(model)
    head = torch.nn.Linear(other.config.hidden_size, len(tokenizer), bias=True)
    with torch.no_grad():
        head.weight.copy_(other.lm_head.weight)
        head.bias.zero_()
        head.bias[tokenizer(text)["input_ids"]] = 2.5
    other.lm_head = head
    return other.eval()


def test_health_is_a_plain_count_over_the_answers(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    """Some answers end at the stop string, some at the limit of 6 tokens: found by a plain loop."""
    some = steered(model, tokenizer, "\n")
    answers = counted(some, tokenizer, words, data_root)
    found = health(some, tokenizer, words, data_root)
    ended = 0
    for sample in stock(some, tokenizer, words, data_root)["samples"][words.task][:12]:
        prompt = tokenizer(sample["arguments"][0][0], return_tensors="pt")["input_ids"]
        tokens = some.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        ended += "\n" in tokenizer.decode(tokens) or tokenizer.eos_token_id in tokens
    assert 0 < ended < len(answers) == found.answers == 12
    assert found.ended == ended / 12
    assert found.characters == pytest.approx(sum(map(len, answers)) / 12)
    assert found.repeated == pytest.approx(sum(map(repeated, answers)) / 12)
    assert found.in_form is None  # the filter of the metric takes every text


def test_the_filter_of_the_metric_is_the_form_unless_the_suite_says_another(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    letter = words.model_copy(update={"metric": "exact_match,letter", "also": ()})
    answers = counted(model, tokenizer, letter, data_root)
    has_letter = sum(any("a" <= character <= "z" for character in text) for text in answers)
    assert 0 < has_letter < 12
    assert health(model, tokenizer, letter, data_root).in_form == has_letter / 12
    of_suite = letter.model_copy(update={"form": r"[^a-z]*"})
    assert health(model, tokenizer, of_suite, data_root).in_form == pytest.approx(1 - has_letter / 12)


def test_a_model_with_settings_of_its_own_is_counted_alike(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    """A penalty is not plainly greedy, so lm-eval's own loop generates; one of 1 changes no token."""
    some = steered(model, tokenizer, "\n")
    expected = health(some, tokenizer, words, data_root)
    some.generation_config.repetition_penalty = 1.0000001
    assert health(some, tokenizer, words, data_root) == expected


def test_multiple_choice_has_no_health(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    result = evaluate_column(model, tokenizer, choice, Documents(data_root, limit=2), batch_size=5)
    assert result.health is None


class FakeVLLM:
    """What lm-eval's class for vLLM has of interest here."""

    max_length, max_gen_toks = 64, 16

    def __init__(self, reasons: list[str | None]) -> None:
        self.reasons = reasons

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._model_generate(requests=requests, generate=True)
        return ["text"] * len(requests)

    def _model_generate(self, requests: list[Any], generate: bool = False) -> list[Any]:
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(finish_reason=reason)]) for reason in self.reasons]


def asked(max_gen_toks: int, number: int = 3) -> list[Instance]:
    return [
        Instance("generate_until", {}, ("Q", {"until": ["x"], "max_gen_toks": max_gen_toks}), i) for i in range(number)
    ]


@pytest.mark.parametrize(("reasons", "ended"), [(["stop", "length", "stop"], 2), (["stop", None, "stop"], None)])
def test_vllm_says_how_its_answers_ended_or_nothing_is_claimed(reasons: list[str | None], ended: int | None) -> None:
    lm = FakeVLLM(reasons)
    endings = watched_vllm(lm)
    lm._model_generate(requests=["log-probabilities of a choice"])
    assert lm.generate_until(asked(16)) == ["text"] * 3
    assert endings.of(3) == ended


def test_vllm_is_asked_for_no_answer_that_leaves_no_room_for_the_prompt() -> None:
    lm = FakeVLLM([])
    watched_vllm(lm)
    with pytest.raises(Unmeasurable, match="length of 64 tokens leaves no room"):
        lm.generate_until(asked(64))


def test_a_form_that_takes_forever_is_refused(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctpd.text.limited.SECONDS", 0.2)
    monkeypatch.setattr(generations, "matches", lambda form, text: __import__("re").fullmatch(r"(a+)+b", "a" * 60))
    with pytest.raises(UserError, match="form of the column 'Words' takes more than"):
        evaluate_column(
            model, tokenizer, words.model_copy(update={"form": "(a+)+b"}), Documents(data_root, limit=1), batch_size=5
        )


def test_a_context_without_room_for_the_answer_is_told_apart_from_other_errors(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    """The other columns of a suite are evaluated nevertheless."""
    short = LlamaForCausalLM(LlamaConfig(**(model.config.to_dict() | {"max_position_embeddings": 6})))
    with pytest.raises(Unmeasurable, match="leaves no room"):
        evaluate_column(short, tokenizer, words, Documents(data_root, limit=2), batch_size=5)
