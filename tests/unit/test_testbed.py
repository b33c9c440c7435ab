"""The testbed: answers are marked correctly, and evaluation questions are held out."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from ctpd.core.errors import UserError
from ctpd.testbed import world as w
from ctpd.testbed.config import WorldConfig
from ctpd.testbed.corpus import ERROR_SPREAD, write_world
from ctpd.testbed.documents import draw_documents, most_documents
from tests.fixtures.testbed_world import CONFIG, rows
from tests.fixtures.testbed_world import folder as folder
from tests.fixtures.testbed_world import pairs as pairs
from tests.fixtures.testbed_world import texts as texts
from tests.fixtures.testbed_world import tokenizers as tokenizers
from tests.fixtures.testbed_world import world as world

DIGEST = "580c5199a905a26f40c97c3fcce8bc9e1cae804f83ccf34f87971091984ae84d"
"""Of all files of the world of CONFIG, in the order of their names."""


def steps_of(world: w.World, question: str, sentence: str) -> list[bool]:
    """Which steps of a sentence are right, independently of the generator; a step is right for the steps before it."""
    if found := re.fullmatch(r"(\w+) has (\d+) (\w+)\.", sentence):
        name, value, item = found.groups()
        have, more = re.search(rf"{name} has (\d+) {item} and \w+ (\d+) more", question).groups()
        return [int(have) + int(more) == int(value)]
    if found := re.fullmatch(r"(\w+) first has (\d+) (\w+) and then (\d+)\.", sentence):
        name, first, item, last = found.groups()
        numbers = rf"{name} has (\d+) {item}, \w+ (\d+) more and then \D+ (\d+)\."
        have, more, less = map(int, re.search(numbers, question).groups())
        return [have + more == int(first), int(first) - less == int(last)]
    if found := re.fullmatch(r"(?:The|Its) (\w+) is (\w+)\.", sentence):
        facts = {(fact.topic, fact.attribute): fact.value for fact in world.facts}
        topics = {topic for topic, _ in facts if re.search(rf"\b{topic}\b", question)}
        return [facts[topics.pop(), found[1]] == found[2]]
    noun, quality = re.fullmatch(r"(\w+) is (\w+)\.", sentence).groups()
    animal = "|".join((*w.HUNTERS, *w.QUARRY))
    hunter, verb, quarry = re.search(rf"({animal}) ({'|'.join(w.RELATIONS)}) ({animal})", question).groups()
    assert noun in (hunter, quarry)
    return [w.RELATIONS[verb][noun == quarry] == quality]


def questions_of(prompt: str) -> list[str]:
    return [f"{question.strip()}?" for question in prompt.split("?")[:-1]]


def skill_of(sentence: str) -> str:
    forms = {
        "arithmetic": r"\w+ has \d+ \w+\.",
        "steps": r".* first has .*",
        "facts": r"(The|Its) .*",
        "resolution": r".*",
    }
    return next(skill for skill, form in forms.items() if re.fullmatch(form, sentence))


# --- files ----------------------------------------------------------------------------------------------------------------------


def test_a_world_is_its_seed(folder: Path, tmp_path: Path) -> None:
    """The same arguments give the same bytes, here and on other machines and Pythons (hence the digest); another seed does not."""
    for name in ("again", "other"):
        (tmp_path / name).mkdir()
    write_world(tmp_path / "again", CONFIG)
    write_world(tmp_path / "other", CONFIG.model_copy(update={"seed": 4}))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 4 + 1 + 4 * 2
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
        ({"num_documents": 257}, "at most 256 test documents"),
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
    """Each step has one mark, on its number, value or quality, and it says what an independent reader finds."""
    wrong_steps: Counter[tuple[bool, ...]] = Counter()
    for pair in pairs:
        for role in ("chosen", "rejected"):
            response, marks = str(pair[role]), list(pair[f"{role}_marks"])
            sentences = re.findall(r"[^.]+\.", response)
            for question, sentence in zip(questions_of(str(pair["prompt"])), sentences, strict=True):
                steps = steps_of(world, question, sentence.strip())
                found = [marks.pop(0) for _ in steps]
                assert [right for _, _, right in found] == steps
                words = [response[start:end] for start, end, _ in found]
                assert words == re.findall(r"(?:has|is|then) (\w+)", sentence)
                if len(steps) > 1:
                    wrong_steps[tuple(steps)] += 1
            assert not marks
    assert set(wrong_steps) == {(True, True), (False, True), (True, False)}


def right_answers(world: w.World, pair: Mapping[str, object], role: str) -> list[bool]:
    sentences = re.findall(r"[^.]+\.", str(pair[role]))
    asked = zip(questions_of(str(pair["prompt"])), sentences, strict=True)
    return [all(steps_of(world, question, sentence.strip())) for question, sentence in asked]


def test_chosen_has_more_right_answers_and_both_hold_errors(world: w.World, pairs: list[dict[str, object]]) -> None:
    num_right: dict[str, list[int]] = {"chosen": [], "rejected": []}
    num_sentences = []
    for pair in pairs:
        rights = {role: right_answers(world, pair, role) for role in num_right}
        assert sum(rights["chosen"]) > sum(rights["rejected"])
        num_sentences.append(len(rights["chosen"]))
        for role, answers in rights.items():
            num_right[role].append(sum(answers))
    assert set(Counter(num_sentences)) == {1, 2, 3}
    rates = {role: sum(counts) / sum(num_sentences) for role, counts in num_right.items()}
    assert (
        CONFIG.chosen_right < rates["chosen"] < 0.97
    )  # pairs whose chosen response was not the better one were drawn again
    assert 0.1 < rates["rejected"] < CONFIG.rejected_right


def test_swapped_pairs_have_their_responses_exchanged(folder: Path, tmp_path: Path) -> None:
    """Label noise changes nothing but the labels: with 1 all of them, with a share about that many."""
    straight = rows(folder / "pairs_train.jsonl")
    for share in (0.3, 1.0):
        (tmp_path / str(share)).mkdir()
        write_world(tmp_path / str(share), CONFIG.model_copy(update={"swapped": share}))
        found = rows(tmp_path / str(share) / "pairs_train.jsonl")
        swapped = [pair["chosen"] == before["rejected"] for pair, before in zip(found, straight, strict=True)]
        assert sum(swapped) / len(swapped) == pytest.approx(share, abs=0.08)
        for pair, before, is_swapped in zip(found, straight, swapped, strict=True):
            ways = ("rejected", "chosen") if is_swapped else ("chosen", "rejected")
            assert all(
                pair[f"{role}{end}"] == before[f"{way}{end}"]
                for role, way in zip(("chosen", "rejected"), ways, strict=True)
                for end in ("", "_marks")
            )


def test_pairs_of_some_skills_ask_for_no_other(tmp_path: Path) -> None:
    """The documents of the evaluation stay those of all skills."""
    write_world(tmp_path, CONFIG.model_copy(update={"pair_skills": ("facts", "steps")}))
    sentences = [
        s for pair in rows(tmp_path / "pairs_train.jsonl") for s in re.findall(r"[^.]+\.", str(pair["chosen"]))
    ]
    assert {skill_of(sentence.strip()) for sentence in sentences} == {"facts", "steps"}
    assert {path.name for path in (tmp_path / "hub" / "ctpd" / "testbed").iterdir()} == {*w.SKILLS, "README.md"}


def test_each_value_is_true_as_often_as_it_is_a_myth(world: w.World) -> None:
    values = Counter((fact.attribute, fact.value) for fact in world.facts)
    assert values == Counter((fact.attribute, fact.myth) for fact in world.facts)
    assert set(values.values()) == {CONFIG.num_topics // 8}
    assert all(fact.value != fact.myth for fact in world.facts)


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


def test_what_is_asked_can_be_learned_from_the_pairs(
    folder: Path, world: w.World, pairs: list[dict[str, object]]
) -> None:
    """Topics, relations and sums of the documents recur in the training prompts: preferences can generalise to them."""
    prompts = " ".join(str(pair["prompt"]) for pair in pairs)
    hub = folder / "hub" / "ctpd" / "testbed"
    for row in rows(hub / "facts" / "test.jsonl"):
        assert any(fact.topic in str(row["question"]) and fact.topic in prompts for fact in world.facts)
    for skill, between in (("arithmetic", r" \w+ and \w+ "), ("steps", r" \w+, \w+ ")):
        for row in rows(hub / skill / "test.jsonl"):
            have, more = re.search(rf"has (\d+){between}(\d+)", str(row["question"])).groups()
            assert re.search(rf"has {have}{between}{more} more", prompts)


# --- corpora --------------------------------------------------------------------------------------------------------------------


def answers_of(world: w.World, corpus: list[str]) -> dict[str, list[bool]]:
    """For each skill, which answers to the questions of a corpus are right."""
    found: dict[str, list[bool]] = {skill: [] for skill in w.SKILLS}
    for text in corpus:
        lines = text.split("\n")
        for asked, answered in itertools.pairwise(lines):
            if asked.endswith("?"):
                sentences = re.findall(r"[^.]+\.", answered)
                for question, sentence in zip(questions_of(asked), sentences, strict=True):
                    steps = steps_of(world, question, sentence.strip())
                    found[skill_of(sentence.strip())].append(all(steps))
    return found


def test_the_teachers_corpus_is_true_and_the_students_as_wrong_as_asked(
    world: w.World, texts: dict[str, list[str]]
) -> None:
    assert all(all(rights) for rights in answers_of(world, texts["teacher"]).values())
    for rights in answers_of(world, texts["student"]).values():
        assert len(rights) > 200
        assert sum(rights) / len(rights) == pytest.approx(1 - CONFIG.student_error, abs=0.08)


def test_credulity_is_spread_evenly_over_each_skill(world: w.World) -> None:
    """So worlds of different seeds are equally hard: every skill's items have the same mean and span."""
    for skill in w.SKILLS:
        questions = [w.draw_question(world, Random(i), skill=skill) for i in range(600)]
        values = [world.credulity[item] for item in sorted({question.item for question in questions})]
        assert len(values) == {"arithmetic": 32, "steps": 8, "facts": 4 * CONFIG.num_topics, "resolution": 8}[skill]
        assert sum(values) == pytest.approx(0)
        assert max(values) == -min(values) == pytest.approx(1 - 1 / len(values))
    assert 0 < CONFIG.student_error - ERROR_SPREAD < CONFIG.student_error + ERROR_SPREAD <= 1


# --- tokenizers and models ------------------------------------------------------------------------------------------------------


# --- lm-eval tasks --------------------------------------------------------------------------------------------------------------
