"""What is recorded of a column besides its scores: what the generated answers are like, or why there are none."""

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
