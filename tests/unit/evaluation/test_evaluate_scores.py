"""Scores of evaluations on tiny random models: those of lm-eval's own model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from harness.backends import SharedContextLM
from harness.evaluate import Documents, evaluate_column
from harness.suites import Column
from tests.fixtures.lm_eval_model import stock


def test_multiple_choice_scores_are_those_of_lm_evals_own_model(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    """Logits of the last positions only, the same requests: same metrics, log-probabilities to float noise."""
    ours = evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    theirs = stock(model, tokenizer, choice, data_root)
    assert ours.value == theirs["results"]["colour_choice"]["acc_norm,none"]
    assert ours.stderr == pytest.approx(theirs["results"]["colour_choice"]["acc_norm_stderr,none"])
    assert ours.also == {"acc,none": theirs["results"]["colour_choice"]["acc,none"]}
    samples = theirs["samples"]["colour_choice"]
    assert ours.documents == tuple((sample["doc_hash"], sample["acc_norm"]) for sample in samples)
    assert 0 < ours.value < 1
    assert ours.value == pytest.approx(np.mean([score for _, score in ours.documents]))


def test_log_probabilities_are_those_of_full_logits(model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Continuations of other lengths, padding, and prompts that end in token 0, lm-eval's padding."""
    from lm_eval.api.instance import Instance

    zero = tokenizer.decode([0])
    pairs = [("A" * 9, "xyz"), ("B" * 30, "x"), ("C", "long answer " * 3), ("D" + zero, zero * 3), ("E" * 12, zero)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours = SharedContextLM(model, tokenizer, batch_size=3, progress=None)
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3)
    assert ours._keeps_last_logits
    for mine, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]


def test_only_as_many_logits_are_computed_as_the_longest_continuation_needs(
    model: LlamaForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    lm = SharedContextLM(model, tokenizer, batch_size=2, progress=None)
    shapes = []
    monkeypatch.setattr(
        model.lm_head,
        "forward",
        lambda h: shapes.append(h.shape) or torch.nn.functional.linear(h, model.lm_head.weight),
    )
    lm.loglikelihood(
        [Instance("loglikelihood", {}, ("A" * 80, "xyz"), 0), Instance("loglikelihood", {}, ("B" * 78, "xy"), 0)]
    )
    assert [tuple(shape[:2]) for shape in shapes] == [(2, 3 + 3)]  # padding 3, continuation 3


def test_a_model_without_logits_to_keep_falls_back_to_full_logits(tokenizer: Any, model: LlamaForCausalLM) -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids)

    plain = Plain(model.config).eval()
    lm = SharedContextLM(plain, tokenizer, batch_size=2, progress=None)
    assert not lm._keeps_last_logits
    assert lm._model_call(torch.ones(1, 7, dtype=torch.long)).shape[:2] == (1, 7)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers' old name
def test_an_adapter_on_a_model_is_evaluated_as_the_merged_model_is(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    """A PEFT model computes only the last logits too, and is left unchanged."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval()
    assert SharedContextLM(adapted, tokenizer, batch_size=2, progress=None)._keeps_last_logits
    ours = evaluate_column(adapted, tokenizer, choice, Documents(data_root), batch_size=5)
    theirs = stock(adapted.merge_and_unload(), tokenizer, choice, data_root)
    assert ours.documents == tuple(
        (sample["doc_hash"], sample["acc_norm"]) for sample in theirs["samples"]["colour_choice"]
    )


def test_generation_scores_are_those_of_lm_evals_own_model(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    ours = evaluate_column(model, tokenizer, words, Documents(data_root), batch_size=5)
    theirs = stock(model, tokenizer, words, data_root)
    assert ours.value == theirs["results"]["colour_words"]["exact_match,whole"]
    assert ours.also == {"exact_match,letter": theirs["results"]["colour_words"]["exact_match,letter"]}
    whole = [sample for sample in theirs["samples"]["colour_words"] if sample["filter"] == "whole"]
    assert ours.documents == tuple((sample["doc_hash"], sample["exact_match"]) for sample in whole)


def test_the_task_hash_is_the_one_that_lm_evals_tracker_reports(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path, tmp_path: Path
) -> None:
    from lm_eval.loggers import EvaluationTracker

    results = stock(model, tokenizer, words, data_root, limit=3)
    EvaluationTracker(output_path=str(tmp_path / "out")).save_results_aggregated(results, results["samples"])
    ours = evaluate_column(model, tokenizer, words, Documents(data_root, limit=3), batch_size=5)
    assert ours.protocol.task_hash == results["task_hashes"]["colour_words"]


MERGES = [("a", "b"), ("ab", "c"), ("x", " ")]
"""Of the tokenizer below, so that `ab`, `abc` and `x ` are one token each."""


@pytest.fixture(scope="module")
def merging() -> Any:
    """A tokenizer that joins the end of some contexts with the continuation."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"abcxyzQ: "})
    vocab = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in MERGES), "<end>"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def test_a_continuation_in_one_token_with_its_context_is_scored_by_itself_and_counted(
    model: LlamaForCausalLM, merging: Any
) -> None:
    """lm-eval issue 1297: its continuation is empty. Others are lm-eval's, partly merged ones too."""
    from lm_eval.api.instance import Instance

    defined = [("Q", "xyz"), ("Q: a", "bx"), ("Q: ab", "cy"), ("Q:", " x"), ("", "xy"), ("Q: ", "z")]
    merged = [("Q: a", "b"), ("Q: ab", "c"), ("a", "bc")]
    ours = SharedContextLM(model, merging, batch_size=2, progress=None)
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(merging), batch_size=2)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(defined)]
    for mine, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])
    assert ours.num_alone == 0

    found = ours.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(merged)])
    assert ours.num_alone == len(merged)
    for (context, answer), (value, _) in zip(merged, found, strict=True):
        context_ids, answer_ids = (merging(text, add_special_tokens=False)["input_ids"] for text in (context, answer))
        logps = model(torch.tensor([context_ids + answer_ids])).logits[0].detach().log_softmax(-1)
        at = range(len(context_ids) - 1, len(context_ids) + len(answer_ids) - 1)
        assert value == pytest.approx(sum(float(logps[i, t]) for i, t in zip(at, answer_ids, strict=True)), abs=1e-4)
        with pytest.raises(AssertionError):
            theirs.loglikelihood([Instance("loglikelihood", {}, (context, answer), 0)], disable_tqdm=True)


def test_a_context_of_spaces_alone_is_the_beginning_of_a_text(model: LlamaForCausalLM, merging: Any) -> None:
    """lm-eval moves the spaces to the continuation, and fails on the context that is left."""
    from lm_eval.api.instance import Instance

    lm = SharedContextLM(model, merging, batch_size=2, progress=None)
    (spaces,), (empty,) = (
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)]) for pair in (("  ", "xy"), ("", "  xy"))
    )
    assert spaces[0] == pytest.approx(empty[0], abs=1e-5)


def test_a_choice_without_text_and_one_longer_than_the_model_are_refused(model: LlamaForCausalLM, merging: Any) -> None:
    from lm_eval.api.instance import Instance

    from ctpd.core.errors import UserError

    lm = SharedContextLM(model, merging, batch_size=2, progress=None)
    with pytest.raises(UserError, match=r"a choice of the task has no text.*'Q: '"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("Q: ", ""), 0)])
    with pytest.raises(UserError, match=r"a continuation of 200 tokens is longer than the model's 160"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("Q: ", "x" * 199), 0)])
