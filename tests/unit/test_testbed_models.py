"""Tokenizers, models and lm-eval tasks of the testbed."""

from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from pydantic import ValidationError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ctpd.core.errors import UserError
from ctpd.testbed import world as w
from ctpd.testbed.config import PretrainConfig, TokenizerKind
from ctpd.testbed.documents import draw_documents
from ctpd.testbed.models import new_model, train_tokenizer
from ctpd.testbed.unigram import train_unigram
from ctpd.text.align import align_spans
from harness.evaluate import Documents, evaluate_column, score
from harness.suites import load_suite
from tests.fixtures.testbed_world import CONFIG, SHAPE
from tests.fixtures.testbed_world import folder as folder
from tests.fixtures.testbed_world import pairs as pairs
from tests.fixtures.testbed_world import texts as texts
from tests.fixtures.testbed_world import tokenizers as tokenizers
from tests.fixtures.testbed_world import world as world


def test_training_a_tokenizer_twice_gives_the_same(texts: dict[str, list[str]]) -> None:
    """The library's own Unigram trainer fails this; the digest holds across processes and platforms."""
    for kind in get_args(TokenizerKind):
        first, second = (train_tokenizer(texts["student"], kind=kind, vocab_size=330) for _ in range(2))
        assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", get_args(TokenizerKind))
def test_tokenizers_keep_every_text_and_no_token_crosses_into_a_response(
    pairs: list[dict[str, object]], texts: dict[str, list[str]], kind: TokenizerKind
) -> None:
    """With the testbed's template, prompt and response separated by a line break; BOS comes first, nothing is added at the end."""
    tokenizer = train_tokenizer(texts["student"], kind=kind, vocab_size=330)
    assert tokenizer.unk_token_id not in tokenizer("\n".join((*texts["teacher"], "zebra XYZ 0987"))).input_ids
    for pair in pairs:
        prompt, text = f"{pair['prompt']}\n", f"{pair['prompt']}\n{pair['chosen']}"
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] != tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        head = tokenizer(prompt).input_ids
        assert ids[: len(head)] == head


def test_all_types_of_spans_occur(
    pairs: list[dict[str, object]], tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    """One or more teacher tokens over one or more student tokens, each in at least three spans of a hundred."""
    types: Counter[tuple[bool, bool]] = Counter()
    for pair in pairs:
        text = str(pair["chosen"])
        offsets = [
            tok(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping for tok in tokenizers
        ]
        spans = align_spans(*offsets, len(text))
        teacher, student = Counter(spans.teacher_span.tolist()), Counter(spans.student_span.tolist())
        types.update((teacher[span] > 1, student[span] > 1) for span in teacher)
    assert (
        min(types[several] / types.total() for several in ((False, False), (False, True), (True, False), (True, True)))
        >= 0.03
    )


def test_unigram_pieces_are_the_likely_ones() -> None:
    """Frequent words become pieces, scores are log-probabilities, and characters are always there."""
    pieces = dict(train_unigram({"abc": 100, "abd": 3, "zabc": 1}, num_pieces=9, always="q"))
    assert set("abcdzq") <= pieces.keys()
    assert len(pieces) <= 9
    assert max(pieces, key=pieces.__getitem__) == "abc"
    assert all(score <= 0 for score in pieces.values())


def test_bad_tokenizers_and_models_are_refused(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    with pytest.raises(UserError, match="Did you mean 'unigram'"):
        train_tokenizer(["a"], kind="unigrams", vocab_size=300)
    for kind in ("byte_bpe", "unigram", "wordpiece", "characters"):
        with pytest.raises(UserError, match=r"pretrain\.vocab_size"):
            train_tokenizer(["a"], kind=kind, vocab_size=40)
    with pytest.raises(ValidationError, match="3 heads cannot share"):
        PretrainConfig(**SHAPE | {"heads": 3})


def test_a_model_is_its_seed_and_leaves_the_global_one_alone(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    state = torch.get_rng_state()
    first, second, third = (
        new_model(tokenizers[0], PretrainConfig(**SHAPE, seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


class Oracle(LM):
    """Answers rightly, or always wrongly; the tasks must score it 1 or 0."""

    def __init__(self, world: w.World, *, wrong: bool) -> None:
        super().__init__()
        drawn = [draw_documents(world, skill, num=CONFIG.num_documents)["test"] for skill in w.SKILLS]
        self.answers = {
            question.text: [answer.text for answer in (question.popular if wrong else question.right)]
            for questions in drawn
            for question in questions
        }

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        spoken = ["".join(request.args).split("\n") for request in requests]
        return [(-1.0 if answer in self.answers[question] else -50.0, False) for question, answer in spoken]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        prompts = [request.args[0].removesuffix("\n") for request in requests]
        return [self.answers[prompt][0] for prompt in prompts]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


@pytest.mark.parametrize("wrong", [False, True])
def test_tasks_score_right_answers_1_and_popular_errors_0(folder: Path, world: w.World, *, wrong: bool) -> None:
    for column in load_suite("testbed").columns:
        result = score(Oracle(world, wrong=wrong), column, Documents(folder / "hub"))
        assert result.value == pytest.approx(0.0 if wrong else 1.0, abs=1e-9), column.name
        assert result.num_docs == result.num_total == CONFIG.num_documents


def test_tasks_run_on_a_model_of_the_testbed(
    folder: Path, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    """An untrained model scores near chance, which for facts follows from the number of wordings; no prompt is truncated."""
    model: LlamaForCausalLM = new_model(tokenizers[1], PretrainConfig(**SHAPE))
    for column in load_suite("testbed").columns:
        result = evaluate_column(model, tokenizers[1], column, Documents(folder / "hub"), batch_size=8)
        assert 0.0 <= result.value < 0.8
        assert result.truncated == 0
