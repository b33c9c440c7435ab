"""The testbed has no short cut: responses alone do not say which of them was chosen."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from transformers import PreTrainedTokenizerFast

from ctpd.testbed import world as w
from ctpd.testbed.config import WorldConfig
from ctpd.testbed.corpus import write_world
from ctpd.testbed.models import train_tokenizer

BOUND = 0.03
"""Largest distance of a classifier's AUROC on held-out pairs from 0.5."""
NUM_PAIRS = 5000
KINDS = {"byte_bpe": 480, "unigram": 400}

Rows = Sequence[Mapping[str, str]]
Features = Callable[[str], np.ndarray]


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive case has the higher score; ties count half."""
    _, ranks, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    num = int(positive.sum())
    return float((mean_ranks[ranks][positive].sum() - num * (num + 1) / 2) / (num * (len(scores) - num)))


def held_out_auroc(rows: Rows, features: Features) -> float:
    """Logistic regression (Newton's method) on the first half of the pairs, its AUROC for chosen responses on the other half."""
    inputs = np.array([features(row[role]) for row in rows for role in ("chosen", "rejected")], dtype=np.float64)
    labels = np.tile([1.0, 0.0], len(rows))
    half = len(rows)  # of 2 * len(rows) responses
    varied = inputs[:, inputs[:half].std(axis=0) > 0]
    inputs = (varied - varied[:half].mean(axis=0)) / varied[:half].std(axis=0)
    train, weights = inputs[:half], np.zeros(inputs.shape[1])
    for _ in range(8):
        p = expit(train @ weights)
        hessian = (train.T * (p * (1 - p))) @ train + np.eye(len(weights))
        weights += np.linalg.solve(hessian, train.T @ (labels[:half] - p) - weights)
    return auroc(inputs[half:] @ weights, labels[half:] == 1)


def bag_of_tokens(tokenizer: PreTrainedTokenizerFast) -> Features:
    return lambda text: np.bincount(tokenizer(text, add_special_tokens=False).input_ids, minlength=len(tokenizer))


def lengths(tokenizer: PreTrainedTokenizerFast) -> Features:
    return lambda text: np.array([len(tokenizer(text).input_ids), len(text), text.count(" ")])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("corpora")
    write_world(folder, WorldConfig(num_pairs=1, num_eval_pairs=1, num_documents=2, teacher_texts=800, student_texts=1))
    texts = [json.loads(line)["text"] for line in (folder / "corpus_teacher.jsonl").read_text().splitlines()]
    return {kind: train_tokenizer(texts, kind=kind, vocab_size=size) for kind, size in KINDS.items()}


def rows_of(folder: Path, skill: w.Skill) -> Rows:
    config = WorldConfig(
        num_pairs=NUM_PAIRS, num_eval_pairs=1, num_documents=2, teacher_texts=1, student_texts=1, pair_skills=(skill,)
    )
    write_world(folder, config)
    return [json.loads(line) for line in (folder / "pairs_train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("skill", w.SKILLS)
def test_responses_alone_do_not_say_which_was_chosen(
    skill: w.Skill, tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """A bag-of-tokens and a length classifier are at chance on held-out pairs, under either tokenizer."""
    rows = rows_of(tmp_path, skill)
    for tokenizer in tokenizers.values():
        for features in (bag_of_tokens(tokenizer), lengths(tokenizer)):
            assert held_out_auroc(rows, features) == pytest.approx(0.5, abs=BOUND)


def test_the_classifiers_find_the_short_cut_of_the_first_world(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """There the popular error was always the right number and one more, so that rejected answers were larger on average."""
    rows = [shifted(row) for row in rows_of(tmp_path, "arithmetic")]
    assert all(held_out_auroc(rows, bag_of_tokens(tokenizer)) > 0.5 + 2 * BOUND for tokenizer in tokenizers.values())


def shifted(row: Mapping[str, str]) -> dict[str, str]:
    """The pair with each wrong number replaced by the right one and one more: the right answers are those to the prompt."""
    sums = [int(number) + int(added) for number, added in zip(*numbers_of(row["prompt"]), strict=True)]
    changed: dict[str, str] = {}
    for role in ("chosen", "rejected"):
        sentences = row[role].rstrip(".").split(". ")
        parts = []
        for sentence, right in zip(sentences, sums, strict=True):
            name, has, number, item = sentence.split(" ")
            parts.append(f"{name} {has} {right if int(number) == right else right + 1} {item}.")
        changed[role] = " ".join(parts)
    return changed


def numbers_of(prompt: str) -> tuple[list[str], list[str]]:
    digits = [word for word in prompt.split(" ") if word.isdigit()]
    return digits[::2], digits[1::2]
