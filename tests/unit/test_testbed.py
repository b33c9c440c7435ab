"""The testbed: answers are marked correctly, and evaluation questions are held out."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from pydantic import ValidationError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ctpd.core.errors import UserError
from ctpd.testbed import world as w
from ctpd.testbed.config import PretrainConfig, WorldConfig
from ctpd.testbed.corpus import ERROR_SPREAD, write_world
from ctpd.testbed.documents import draw_documents, most_documents
from ctpd.testbed.models import new_model, train_tokenizer
from ctpd.testbed.unigram import train_unigram
from ctpd.text.align import align_spans
from harness.evaluate import Documents, evaluate_column, score
from harness.suites import load_suite

DIGEST = "33ce5746ee9d405608036e416a5487d95fe9ebb6bbf910719d72179bbab789d3"
"""Of all files of the world of CONFIG, in the order of their names."""
CONFIG = WorldConfig(
    seed=3, num_topics=8, num_pairs=400, num_eval_pairs=40, num_documents=24, teacher_texts=400, student_texts=400
)
SHAPE: dict[str, Any] = {
    "corpus": "teacher",
    "tokenizer": "byte_bpe",
    "vocab_size": 300,
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "intermediate": 48,
    "max_position": 128,
    "steps": 1,
    "texts_per_step": 1,
    "learning_rate": 1e-3,
}


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    write_world(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.build_world(seed=CONFIG.seed, num_topics=CONFIG.num_topics)


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[dict[str, object]]:
    return rows(folder / "pairs_train.jsonl") + rows(folder / "pairs_eval.jsonl")


@pytest.fixture(scope="module")
def texts(folder: Path) -> dict[str, list[str]]:
    return {
        reader: [str(row["text"]) for row in rows(folder / f"corpus_{reader}.jsonl")]
        for reader in ("teacher", "student")
    }


@pytest.fixture(scope="module")
def tokenizers(texts: dict[str, list[str]]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    teacher = train_tokenizer(texts["teacher"], kind="byte_bpe", vocab_size=512)
    return teacher, train_tokenizer(texts["student"], kind="unigram", vocab_size=256)


def sentence_is_right(world: w.World, prompt: str, sentence: str) -> bool:
    """Whether the sentence is a right answer to some question of the prompt, independently of the generator."""
    if found := re.fullmatch(r"(\w+) has (\d+) (\w+)\.", sentence):
        name, value, item = found.groups()
        asked = re.findall(rf"{name} has (\d+) {item} and \w+ (\d+) more", prompt)
        return any(int(have) + int(more) == int(value) for have, more in asked)
    if found := re.fullmatch(r"The (\w+) of (\w+) is (\w+)\.|In (\w+) the (\w+) is (\w+)\.", sentence):
        attribute, topic, value = found.group(1, 2, 3) if found.group(1) else found.group(5, 4, 6)
        return any(fact[:3] == (topic, attribute, value) for fact in world.facts)
    noun, quality = re.fullmatch(r"(\w+) is (\w+)\.", sentence).groups()
    verbs = re.findall(rf"{noun} (\w+) \w+" if noun in w.HUNTERS else rf"(\w+) {noun}\b", prompt)
    return any(w.RELATIONS[verb][noun in w.QUARRY] == quality for verb in verbs if verb in w.RELATIONS)


# --- files ----------------------------------------------------------------------------------------------------------------------


def test_a_world_is_its_seed(folder: Path, tmp_path: Path) -> None:
    """The same arguments give the same bytes, here and on other machines and Pythons (hence the digest); another seed does not."""
    for name in ("again", "other"):
        (tmp_path / name).mkdir()
    write_world(tmp_path / "again", CONFIG)
    write_world(tmp_path / "other", CONFIG.model_copy(update={"seed": 4}))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 4 + 1 + 3 * 2
    assert all((folder / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)
    assert (folder / "pairs_train.jsonl").read_bytes() != (tmp_path / "other" / "pairs_train.jsonl").read_bytes()
    digest = hashlib.sha256(b"".join((folder / path).read_bytes() for path in files)).hexdigest()
    assert digest == DIGEST, "the world has changed: all results on the testbed with it"


def test_sizes_are_those_asked_for(folder: Path) -> None:
    assert len(rows(folder / "pairs_train.jsonl")) == CONFIG.num_pairs
    assert len(rows(folder / "pairs_eval.jsonl")) == CONFIG.num_eval_pairs
    assert len(rows(folder / "corpus_teacher.jsonl")) == CONFIG.teacher_texts
    for skill in w.SKILLS:
        hub = folder / "hub" / "ctpd" / "testbed" / skill
        assert len(rows(hub / "test.jsonl")) == CONFIG.num_documents
        assert len(rows(hub / "development.jsonl")) == CONFIG.num_documents // 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_pairs": 0}, "num_pairs"),
        ({"num_documents": 65}, "at most 64 test documents"),
        ({"student_error": 1.5}, "student_error"),
        ({"chosen_right": 0.0}, "never have more right answers"),
        ({"rejected_right": 1.0}, "never have more right answers"),
    ],
)
def test_impossible_worlds_are_refused_by_field(changes: Mapping[str, float], problem: str) -> None:
    with pytest.raises((UserError, ValidationError), match=problem):
        WorldConfig(**CONFIG.model_dump() | changes)


def test_the_largest_number_of_documents_can_be_drawn() -> None:
    """Of every skill, for a small world (facts are short) and a large one (relations are)."""
    for num_topics in (2, 128):
        num = most_documents(num_topics)
        world = w.build_world(seed=0, num_topics=num_topics)
        for skill in w.SKILLS:
            drawn = draw_documents(world, skill, num=num)
            per_question = 2 if skill == "resolution" else 1
            assert len(drawn["test"]) * per_question >= num
            assert len(drawn["development"]) * per_question >= num // 2


# --- pairs ----------------------------------------------------------------------------------------------------------------------


def test_marks_are_true_and_cover_the_words_that_decide(world: w.World, pairs: list[dict[str, object]]) -> None:
    """Each sentence has one mark, on its number, value or quality, and it says what an independent reader finds."""
    for pair in pairs:
        for role in ("chosen", "rejected"):
            response = str(pair[role])
            sentences = re.findall(r"[^.]+\.", response)
            marks = pair[f"{role}_marks"]
            assert len(sentences) == len(marks)
            offset = 0
            for sentence, (start, end, right) in zip(sentences, marks, strict=True):
                assert offset < start < end < offset + len(sentence)
                assert re.search(r"(?:has|is) (\w+)", sentence).group(1) == response[start:end]
                assert sentence_is_right(world, str(pair["prompt"]), sentence.strip()) == right
                offset += len(sentence)


def test_chosen_has_more_right_answers_and_both_hold_errors(pairs: list[dict[str, object]]) -> None:
    num_right: dict[str, list[int]] = {"chosen": [], "rejected": []}
    num_sentences = []
    for pair in pairs:
        counts = {role: sum(right for _, _, right in pair[f"{role}_marks"]) for role in num_right}
        assert counts["chosen"] > counts["rejected"]
        assert len(pair["chosen_marks"]) == len(pair["rejected_marks"]) in (1, 2, 3)
        num_sentences.append(len(pair["chosen_marks"]))
        for role, count in counts.items():
            num_right[role].append(count)
    assert set(Counter(num_sentences)) == {1, 2, 3}
    rates = {role: sum(counts) / sum(num_sentences) for role, counts in num_right.items()}
    assert (
        0.85 < rates["chosen"] < 0.97
    )  # above 0.85: pairs whose chosen response was not the better one were drawn again
    assert 0.15 < rates["rejected"] < 0.35


def test_prompts_differ(pairs: list[dict[str, object]]) -> None:
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)


# --- held out -------------------------------------------------------------------------------------------------------------------


def test_no_evaluation_question_occurs_in_training(
    folder: Path, pairs: list[dict[str, object]], texts: dict[str, list[str]]
) -> None:
    """Nor, for resolution, the same two animals with the same relation in any wording; and the splits share nothing."""
    seen = "\n".join([*(str(pair["prompt"]) for pair in pairs), *texts["teacher"], *texts["student"]])
    relation = re.compile(rf"\b({'|'.join(w.HUNTERS)}) ({'|'.join(w.RELATIONS)}) ({'|'.join(w.QUARRY)})\b")
    seen_relations = set(relation.findall(seen))
    assert len(seen_relations) > 300
    for skill in w.SKILLS:
        splits = []
        for split in ("test", "development"):
            questions = [
                str(row["question"]) for row in rows(folder / "hub" / "ctpd" / "testbed" / skill / f"{split}.jsonl")
            ]
            splits.append(set(questions))
            assert not any(question in seen for question in questions)
            if skill == "resolution":
                assert not seen_relations & {relation.search(question).groups() for question in questions}
        assert not splits[0] & splits[1]


def test_what_is_asked_can_be_learned_from_the_pairs(folder: Path, pairs: list[dict[str, object]]) -> None:
    """Topics, relations and sums of the documents recur in the training prompts: preferences can generalise to them."""
    prompts = " ".join(str(pair["prompt"]) for pair in pairs)
    hub = folder / "hub" / "ctpd" / "testbed"
    for row in rows(hub / "facts" / "test.jsonl"):
        topic = re.search(r"(?:of|does|In|^) ?([A-Z][a-z]+)(?:\?| have|,|\.| has)", str(row["question"])).group(1)
        assert topic in prompts
    for row in rows(hub / "arithmetic" / "test.jsonl"):
        have, more = re.search(r"has (\d+) \w+ and \w+ (\d+)", str(row["question"])).groups()
        assert re.search(rf"has {have} \w+ and \w+ {more} more", prompts)


# --- corpora --------------------------------------------------------------------------------------------------------------------


def answers_of(world: w.World, corpus: list[str]) -> dict[str, list[bool]]:
    """For each kind of answer in a corpus, which ones are right."""
    found: dict[str, list[bool]] = {skill: [] for skill in w.SKILLS}
    for text in corpus:
        for sentence in re.findall(r"[^.?\n]+[.?]", text):
            sentence = sentence.strip()
            if re.fullmatch(r"\w+ has \d+ \w+\.", sentence):
                skill = "arithmetic"
            elif re.fullmatch(r"The \w+ of \w+ is \w+\.|In \w+ the \w+ is \w+\.", sentence):
                skill = "facts"
            elif re.fullmatch(r"[A-Z]\w+ is \w+\.", sentence):
                skill = "resolution"
            else:
                continue
            found[skill].append(sentence_is_right(world, text, sentence))
    return found


def test_the_teachers_corpus_is_true_and_the_students_as_wrong_as_asked(
    world: w.World, texts: dict[str, list[str]]
) -> None:
    assert all(all(rights) for rights in answers_of(world, texts["teacher"]).values())
    for rights in answers_of(world, texts["student"]).values():
        assert len(rights) > 300
        assert sum(rights) / len(rights) == pytest.approx(1 - CONFIG.student_error, abs=0.08)


def test_credulity_is_spread_evenly_over_each_skill(world: w.World) -> None:
    """So worlds of different seeds are equally hard: every skill's items have the same mean and span."""
    questions = [w.draw_question(world, Random(i), skill=skill) for skill in w.SKILLS for i in range(600)]
    for skill, part in zip(w.SKILLS, (questions[:600], questions[600:1200], questions[1200:]), strict=True):
        values = [world.credulity[item] for item in sorted({question.item for question in part})]
        assert len(values) == {"arithmetic": 20, "facts": 4 * CONFIG.num_topics, "resolution": 8}[skill]
        assert sum(values) == pytest.approx(0)
        assert max(values) == -min(values) == pytest.approx(1 - 1 / len(values))
    assert 0 < CONFIG.student_error - ERROR_SPREAD < CONFIG.student_error + ERROR_SPREAD <= 1


# --- tokenizers and models ------------------------------------------------------------------------------------------------------


def test_training_a_tokenizer_twice_gives_the_same(texts: dict[str, list[str]]) -> None:
    """The library's own Unigram trainer fails this; the digest holds across processes and platforms."""
    for kind, reader in (("byte_bpe", "teacher"), ("unigram", "student")):
        first, second = (train_tokenizer(texts[reader], kind=kind, vocab_size=330) for _ in range(2))
        assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_tokenizers_keep_every_text_and_no_token_crosses_into_a_response(
    pairs: list[dict[str, object]], tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> None:
    """With the testbed's template, prompt and response separated by a line break; BOS comes first, nothing is added at the end."""
    for tokenizer in tokenizers:
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
    """One or more teacher tokens over one or more student tokens, each in more than one span of a hundred."""
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
        > 0.01
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
    for kind in ("byte_bpe", "unigram"):
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


# --- lm-eval tasks --------------------------------------------------------------------------------------------------------------


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
