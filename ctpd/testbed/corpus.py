"""The files of a testbed world: preference pairs, pretraining corpora, and evaluation documents."""

from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random

from ctpd.core.errors import UserError
from ctpd.testbed import world as w
from ctpd.testbed.documents import DATASET, draw_documents, most_documents, write_hub, write_lines

PROMPT_QUESTIONS = (1, 2, 3)
"""How many questions a prompt of a pair asks, equally likely."""
POPULAR_SHARE = 0.75
"""Share of the wrong answers, in pairs and in the student's corpus, that are the popular error."""
ERROR_SPREAD = 0.4
"""The student's error rates of the items of a skill lie within this distance of the mean."""
TEXT_QUESTIONS = 3
"""How many questions a text of a corpus answers: all texts are about as long, and little of a batch is padding."""
EXCHANGE_QUESTIONS = (1, 1, 1, 2, 3)
"""How many of them come in one prompt; a short prompt is the more common."""
STATEMENT_SHARE = 0.25
"""Share of the exchanges that are told as plain statements, without a question."""


def write_world(
    directory: Path,
    *,
    seed: int,
    num_topics: int,
    num_pairs: int,
    num_eval_pairs: int,
    num_documents: int,
    teacher_texts: int,
    student_texts: int,
    student_error: float,
    chosen_right: float,
    rejected_right: float,
) -> None:
    """Write one world into `directory`, an existing folder; the arguments are the fields of `WorldConfig`.

    - `pairs_train.jsonl`, `pairs_eval.jsonl`: prompt, chosen, rejected, and for both responses the marks, `[start, end, right]` in
      characters of the response. No prompt occurs twice.
    - `corpus_teacher.jsonl`, `corpus_student.jsonl`: `{"text": ...}`.
    - `hub/ctpd/testbed/`: a data set with a `test` and a `development` split for each skill. Its questions occur in no prompt
      and in no corpus.

    Raises:
        UserError: a size or rate is out of range.
    """
    sizes = {"num_topics": num_topics, "num_pairs": num_pairs, "num_eval_pairs": num_eval_pairs}
    _check_sizes(**sizes, num_documents=num_documents, teacher_texts=teacher_texts, student_texts=student_texts)
    _check_rates(student_error=student_error, chosen_right=chosen_right, rejected_right=rejected_right)
    world = w.build_world(seed=seed, num_topics=num_topics)
    documents = {skill: draw_documents(world, skill, num=num_documents) for skill in w.SKILLS}
    held_out = {q.key for splits in documents.values() for questions in splits.values() for q in questions}
    write_hub(directory / "hub" / DATASET, documents, num=num_documents)
    rates = {"chosen": chosen_right, "rejected": rejected_right}
    pairs = _pairs(world, num=num_pairs + num_eval_pairs, held_out=held_out, rates=rates)
    write_lines(directory / "pairs_train.jsonl", pairs[:num_pairs])
    write_lines(directory / "pairs_eval.jsonl", pairs[num_pairs:])
    for reader, num, error in (("teacher", teacher_texts, None), ("student", student_texts, student_error)):
        rng = Random(f"corpus/{seed}/{reader}")
        texts = ({"text": _text(world, rng, held_out=held_out, error=error)} for _ in range(num))
        write_lines(directory / f"corpus_{reader}.jsonl", texts)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"The testbed needs at least 1, not {size}", where=f"world.{name}")
    most = most_documents(sizes["num_topics"])
    if sizes["num_documents"] > most:
        raise UserError(
            f"A world with {sizes['num_topics']} topics has at most {most} test documents, not {sizes['num_documents']}",
            where="world.num_documents",
            fix="Ask for fewer documents, or for more topics with `num_topics`",
        )


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate <= 1.0:
            raise UserError(f"A rate lies between 0 and 1; {rate} does not", where=f"world.{name}")
    if rates["chosen_right"] == 0.0 or rates["rejected_right"] == 1.0:
        raise UserError(
            "A chosen response can never have more right answers than a rejected one",
            where="world.chosen_right, world.rejected_right",
            fix="Raise `chosen_right` above 0 and lower `rejected_right` below 1",
        )


def _pairs(world: w.World, *, num: int, held_out: Collection[str], rates: dict[str, float]) -> list[dict[str, object]]:
    """`num` pairs with different prompts."""
    rng = Random(f"pairs/{world.seed}")
    pairs: dict[str, dict[str, object]] = {}
    while len(pairs) < num:
        questions = _questions(world, rng, num=rng.choice(PROMPT_QUESTIONS), held_out=held_out)
        prompt = " ".join(question.text for question in questions)
        if prompt not in pairs:
            pairs[prompt] = {"prompt": prompt} | _responses(questions, rng, rates=rates)
    return list(pairs.values())


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


def _questions(world: w.World, rng: Random, *, num: int, held_out: Collection[str]) -> list[w.Question]:
    """`num` questions of any skills about different items."""
    questions: dict[str, w.Question] = {}
    while len(questions) < num:
        question = w.draw_question(world, rng, skill=rng.choice(w.SKILLS), held_out=held_out)
        questions.setdefault(question.item, question)
    return list(questions.values())


def _text(world: w.World, rng: Random, *, held_out: Collection[str], error: float | None) -> str:
    """One text of a corpus: each exchange a line of questions and a line of answers, or a line of statements.

    `error` is the mean rate of wrong answers; without it, everything is right.
    """
    lines: list[str] = []
    left = TEXT_QUESTIONS
    while left:
        num = rng.choice([num for num in EXCHANGE_QUESTIONS if num <= left])
        left -= num
        questions = _questions(world, rng, num=num, held_out=held_out)
        answers = [_corpus_answer(world, rng, question, error=error) for question in questions]
        if rng.random() < STATEMENT_SHARE:
            told = zip(questions, answers, strict=True)
            lines.append(" ".join(f"{question.premise} {answer.text}".strip() for question, answer in told))
        else:
            lines += [" ".join(question.text for question in questions), w.join(answers)[0]]
    return "\n".join(lines)


def _corpus_answer(world: w.World, rng: Random, question: w.Question, *, error: float | None) -> w.Answer:
    rate = 0.0 if error is None else error + ERROR_SPREAD * world.credulity[question.item]
    return question.answer(rng, right=rng.random() >= rate, popular=POPULAR_SHARE)
