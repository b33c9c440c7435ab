"""The evaluation documents of a world, as a data set that lm-eval loads offline.

A `test` and a (half as large) `development` split for each skill; the columns are those of the benchmark that the skill mimics.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

from ctpd.testbed import world as w

DATASET = "ctpd/testbed"
"""The name under which lm-eval loads the documents, with the folder `hub` as working directory."""

NUM_TEST_WORDINGS, NUM_DEVELOPMENT_WORDINGS = 2 * len(w.FACT_OPENINGS), len(w.FACT_OPENINGS)
"""How many wordings of each fact's question are held out for each split: two of the six forms, and one."""
NUM_STRANGERS = 2
"""Wrong choices of a facts document besides the myth in its two wordings."""

Documents = Mapping[str, list[w.Question]]
"""The questions of each split. In `resolution`, one question gives two documents, one for each animal."""


def most_documents(num_topics: int) -> int:
    """The largest number of test documents that a world has of every skill, with half the relations left to train on."""
    relations = len(w.RELATIONS) * len(w.HUNTERS) * len(w.QUARRY)  # n test documents and n/2 others need 3n/4 of them
    return min(num_topics * len(w.ATTRIBUTES) * NUM_TEST_WORDINGS, relations * 2 // 3)


def draw_documents(world: w.World, skill: w.Skill, *, num: int) -> Documents:
    """Questions for `num` test and `num // 2` development documents; no key occurs twice."""
    rng = Random(f"documents/{world.seed}/{skill}")
    if skill == "facts":
        return _fact_questions(world, rng, num=num)
    per_question = 2 if skill == "resolution" else 1
    sizes = {"test": -(-num // per_question), "development": -(-(num // 2) // per_question)}
    questions: dict[str, w.Question] = {}
    while len(questions) < sum(sizes.values()):
        question = w.draw_question(world, rng, skill=skill)
        questions.setdefault(question.key, question)
    drawn = list(questions.values())
    return {"test": drawn[: sizes["test"]], "development": drawn[sizes["test"] :]}


def _fact_questions(world: w.World, rng: Random, *, num: int) -> Documents:
    """Every fact is asked once before any is asked again.

    The forms held out for a split rotate from fact to fact: training texts contain each fact and each form, but not this
    combination.
    """
    rounds = []
    for turn in range(NUM_TEST_WORDINGS + NUM_DEVELOPMENT_WORDINGS):
        questions = [
            w.facts_question(fact, wording=(index * len(w.FACT_OPENINGS) + turn) % len(w.FACT_QUESTIONS))
            for index, fact in enumerate(world.facts)
        ]
        rng.shuffle(questions)
        rounds.append(questions)
    test = [question for questions in rounds[:NUM_TEST_WORDINGS] for question in questions]
    development = [question for questions in rounds[NUM_TEST_WORDINGS:] for question in questions]
    return {"test": test[:num], "development": development[: num // 2]}


def rows(questions: Iterable[w.Question], skill: w.Skill, rng: Random) -> list[dict[str, object]]:
    """The data set's rows for some questions of a skill."""
    make = {"arithmetic": _number_rows, "steps": _number_rows, "facts": _facts_rows, "resolution": _resolution_rows}[
        skill
    ]
    return [row for question in questions for row in make(question, rng)]


def _number_rows(question: w.Question, rng: Random) -> list[dict[str, object]]:
    answer = question.right[0]
    last = answer.marks[-1]
    return [{"question": question.text, "answer": answer.text[last.start : last.end]}]


def _facts_rows(question: w.Question, rng: Random) -> list[dict[str, object]]:
    wrong = (*question.popular, *rng.sample(question.other, NUM_STRANGERS))
    choices = [answer.text for answer in (*question.right, *wrong)]
    labels = [1] * len(question.right) + [0] * len(wrong)
    return [{"question": question.text, "mc2_targets": {"choices": choices, "labels": labels}}]


def _resolution_rows(question: w.Question, rng: Random) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    nouns = [answer.text.split()[0] for answer in question.right]
    for noun, answer in zip(nouns, question.right, strict=True):
        options = rng.sample(nouns, 2)
        found.append(
            {
                "question": question.text,
                "sentence": answer.text.replace(noun, "_"),
                "option1": options[0],
                "option2": options[1],
                "answer": str(options.index(noun) + 1),
            }
        )
    return found


def write_hub(directory: Path, documents: Mapping[w.Skill, Documents], *, num: int) -> None:
    """Write the data set: a card that names splits and files, and a JSON-lines file for each skill and split."""
    lines = ["---", "configs:"]
    for skill, splits in documents.items():
        (directory / skill).mkdir(parents=True)
        lines += [f"- config_name: {skill}", "  data_files:"]
        for split, size in (("test", num), ("development", num // 2)):
            if size:
                documents_of_split = rows(splits[split], skill, Random(f"choices/{skill}/{split}"))[:size]
                write_lines(directory / skill / f"{split}.jsonl", documents_of_split)
                lines += [f"  - split: {split}", f"    path: {skill}/{split}.jsonl"]
    lines += ["---", "The evaluation documents of a testbed world of ctpd.", ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8", newline="\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """JSON lines with Unix line ends, so that the same rows are the same bytes everywhere."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")
