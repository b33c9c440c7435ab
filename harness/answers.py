"""What is recorded of a column besides its scores: some answers, what the generated ones are like, or why there are none."""

from typing import NamedTuple

from ctpd.core.config import Config


class Health(Config):
    """What the generated answers of a column are like, whatever they score (``harness.health.measure``).

    Attributes:
        answers: their number.
        ended: share that ended by itself, with a stop string or an end token before the task's limit of tokens; None where
            the backend does not say.
        in_form: share in the expected form; None where the column has none.
        characters: mean length, without the stop string.
        repeated: mean share of an answer's 4-grams of words that occurred in it before.
    """

    answers: int
    ended: float | None
    in_form: float | None
    characters: float
    repeated: float


class Unmeasured(Config):
    """A column that a model cannot be measured on, whatever is tried again: why, and what would mend it."""

    reason: str
    fix: str | None


class Answer(NamedTuple):
    """What a model said to one document, as text that long ones are cut of (``harness.samples.answers_of``).

    Attributes:
        doc_hash: of the document; documents of one hash are the same for all models.
        score: a fraction; None where the model's output was not finite.
        prompt: its end, where the document's own question is.
        target: the right answer.
        answer: what was generated, or the option that the model finds likeliest.
    """

    doc_hash: str
    score: float | None
    prompt: str
    target: str
    answer: str
