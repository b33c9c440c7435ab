"""Write the files of a testbed world: preference pairs, pretraining corpora, and evaluation documents."""

from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random

from ctpd.testbed import world as w
from ctpd.testbed.config import WorldConfig
from ctpd.testbed.documents import DATASET, Documents, draw_documents, write_hub, write_lines

PROMPT_QUESTIONS = (1, 2, 3)
"""Numbers of questions in the prompt of a pair, equally likely."""
POPULAR_SHARE = 0.75
"""Share of the wrong answers, in pairs and in the student's corpus, that are the popular error."""
ERROR_SPREAD = 0.4
"""Largest distance of an item's error rate in the student's corpus from the mean rate."""
TEXT_QUESTIONS = 3
"""Number of questions in each text of a corpus; texts have similar lengths, so batches need little padding."""
EXCHANGE_QUESTIONS = (1, 1, 1, 2, 3)
"""Numbers of questions in one prompt of a corpus text, equally likely; 1 is listed more often."""
STATEMENT_SHARE = 0.25
"""Share of the exchanges that are plain statements, without a question."""


def write_world(directory: Path, config: WorldConfig) -> None:
    """Write one world into `directory`, an existing folder.

    - `pairs_train.jsonl`, `pairs_eval.jsonl`: prompt, chosen, rejected, and for both responses the marks, `[start, end, right]` in
      characters of the response. No prompt occurs twice.
    - `corpus_teacher.jsonl`, `corpus_student.jsonl`: `{"text": ...}`.
    - `hub/ctpd/testbed/`: a data set with a `test` and a `development` split for each skill. Its questions occur in no prompt
      and in no corpus.
    """
    world = w.build_world(seed=config.seed, num_topics=config.num_topics)
    documents: dict[w.Skill, Documents] = {
        skill: draw_documents(world, skill, num=config.num_documents) for skill in w.SKILLS
    }
    held_out = {q.key for splits in documents.values() for questions in splits.values() for q in questions}
    write_hub(directory / "hub" / DATASET, documents, num=config.num_documents)
    pairs = _pairs(world, config, held_out=held_out)
    write_lines(directory / "pairs_train.jsonl", pairs[: config.num_pairs])
    write_lines(directory / "pairs_eval.jsonl", pairs[config.num_pairs :])
    readers = (
        ("teacher", config.teacher_texts, config.teacher_error),
        ("student", config.student_texts, config.student_error),
    )
    for reader, num, error in readers:
        rng = Random(f"corpus/{config.seed}/{reader}")
        texts = ({"text": _text(world, rng, held_out=held_out, error=error)} for _ in range(num))
        write_lines(directory / f"corpus_{reader}.jsonl", texts)


def _pairs(world: w.World, config: WorldConfig, *, held_out: Collection[str]) -> list[dict[str, object]]:
    """All pairs, those of the evaluation loss last; no two have the same prompt."""
    rng = Random(f"pairs/{world.seed}")
    rates = {"chosen": config.chosen_right, "rejected": config.rejected_right}
    pairs: dict[str, dict[str, object]] = {}
    while len(pairs) < config.num_pairs + config.num_eval_pairs:
        num = rng.choice(PROMPT_QUESTIONS)
        questions = _questions(world, rng, num=num, skills=config.pair_skills, held_out=held_out)
        prompt = " ".join(question.text for question in questions)
        if prompt not in pairs:
            pairs[prompt] = {"prompt": prompt} | _responses(questions, rng, rates=rates)
    swaps = Random(f"swapped/{world.seed}")
    return [_swapped(pair) if swaps.random() < config.swapped else pair for pair in pairs.values()]


def _swapped(pair: dict[str, object]) -> dict[str, object]:
    """The pair with its responses exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    exchanged = {f"{role}{end}": pair[f"{other[role]}{end}"] for end in ("", "_marks") for role in other}
    return pair | exchanged


def _responses(questions: Sequence[w.Question], rng: Random, *, rates: dict[str, float]) -> dict[str, object]:
    """Two responses and their marks. Which answers are right is drawn again until the chosen one has more of them."""
    while True:
        right = {role: [rng.random() < rate for _ in questions] for role, rate in rates.items()}
        if sum(right["chosen"]) > sum(right["rejected"]):
            break
    columns: dict[str, object] = {}
    marks: dict[str, object] = {}
    for role, claims in right.items():
        drawn = zip(questions, claims, strict=True)
        answers = [question.answer(rng, right=claim, popular=POPULAR_SHARE) for question, claim in drawn]
        columns[role], marks[f"{role}_marks"] = w.join(answers)
    return columns | marks


def _questions(
    world: w.World, rng: Random, *, num: int, skills: Sequence[w.Skill], held_out: Collection[str]
) -> list[w.Question]:
    """`num` questions of some of the skills about different items."""
    questions: dict[str, w.Question] = {}
    while len(questions) < num:
        question = w.draw_question(world, rng, skill=rng.choice(skills), held_out=held_out)
        questions.setdefault(question.item, question)
    return list(questions.values())


def _text(world: w.World, rng: Random, *, held_out: Collection[str], error: float) -> str:
    """One text of a corpus: each exchange a line of questions and a line of answers, or a line of statements.

    `error` is the mean rate of wrong answers; with 0 everything is right.
    """
    lines: list[str] = []
    left = TEXT_QUESTIONS
    while left:
        num = rng.choice([num for num in EXCHANGE_QUESTIONS if num <= left])
        left -= num
        questions = _questions(world, rng, num=num, skills=w.SKILLS, held_out=held_out)
        answers = [_corpus_answer(world, rng, question, error=error) for question in questions]
        if rng.random() < STATEMENT_SHARE:
            stated = zip(questions, answers, strict=True)
            lines.append(" ".join(f"{question.premise} {answer.text}" for question, answer in stated))
        else:
            lines += [" ".join(question.text for question in questions), w.join(answers)[0]]
    return "\n".join(lines)


def _corpus_answer(world: w.World, rng: Random, question: w.Question, *, error: float) -> w.Answer:
    rate = error + ERROR_SPREAD * world.credulity[question.item] if error else 0.0
    return question.answer(rng, right=rng.random() >= rate, popular=POPULAR_SHARE)
