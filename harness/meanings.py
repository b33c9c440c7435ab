"""What the rows of a comparison are: where each begins, what it learns from, whose reference, which weights.

It is read from what an objective declared (``harness.record.Design``) and from the frozen models that the row read. No method is
known by its name.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ctpd.core.roles import ROLES, Role
from harness.record import Design, Record

NOTHING = "–"

PREFERENCE, PREFERENCE_DISTILLATION = "preference optimisation", "preference distillation"
DISTILLATION, SUPERVISED = "distillation", "supervised fine-tuning"
FAMILIES: Mapping[str, str] = {
    PREFERENCE: "learns from both responses of a pair, without a teacher",
    PREFERENCE_DISTILLATION: "learns from both responses of a pair, and reads the teacher",
    DISTILLATION: "imitates the teacher, without comparing two responses",
    SUPERVISED: "learns the chosen responses, without a teacher",
}
"""What a method's inputs say of it."""

_TEACHER_PAIR = "from the teacher's contrastive pair"
STRATEGIES: Mapping[str, str] = {
    "teacher": _TEACHER_PAIR,
    "student": "from the student's contrastive pair",
    "teacher_student": "from the teacher's positive and the student's negative model",
    "positive_only": "from the teacher's positive model and its SFT model",
    "average": f"{_TEACHER_PAIR}, averaged over each response",
    "random": "random, between 0.7 and 1.3",
    "shuffled": f"{_TEACHER_PAIR}, shuffled within each response",
    "uniform": "all 1",
    "lite": "from the teacher's SFT model, chosen against rejected",
    "oracle": "from the known truth of the data",
}
"""Where the weights of each strategy of ``ctpd.ops.weights`` come from."""


class Meaning(NamedTuple):
    """A row in words; ``family`` is None for an untrained row, and where an older record does not say."""

    run: str
    family: str | None
    start: str
    learns: str
    reference: str
    weights: str


HEADER = ("", "Kind", "Starts from", "Learns from", "Measured from", "Weights of its units")


def meanings(runs: Mapping[str, Sequence[Record]]) -> list[Meaning]:
    """The meaning of every run, in the order given."""
    return [meaning(records[0]) for records in runs.values()]


def meaning(record: Record) -> Meaning:
    """The row of a record in words."""
    if record.kind != "trained":
        role: Role = "teacher" if record.kind == "untrained teacher" else "student"
        start = "every trained row starts from it" if role == "student" else NOTHING
        return Meaning(record.run, None, start, f"not trained here: {_sft(record, role)}", NOTHING, NOTHING)
    design = design_of(record)
    return Meaning(
        record.run,
        None if design is None else _family(record, design),
        _sft(record, "student"),
        _sources(record, design),
        NOTHING if design is None or design.reference is None else _sft(record, design.reference),
        NOTHING if design is None or design.reference is None else _weights(design),
    )


def line(meaning: Meaning) -> tuple[str, ...]:
    """The cells of a row in the order of ``HEADER``."""
    return (
        meaning.run,
        meaning.family or NOTHING,
        *(meaning.start, meaning.learns, meaning.reference, meaning.weights),
    )


def design_of(record: Record) -> Design | None:
    """The record's design; in an older record what its stored signals and its history show of it, as far as they do."""
    if record.design is not None or record.training is None:
        return record.design
    read = {(signal.role, signal.model) for signal in record.signals if signal.kept == "log probabilities"}
    logged = {name for entry in record.training.history for name in entry.metrics}
    references = [role for role in ROLES if (role, "reference") in read]
    if "rewards/margins" not in logged or len(references) != 1:
        return None
    params = {} if record.method is None else record.method.params
    pairs = [role for role in ROLES if {(role, "positive"), (role, "negative")} <= read]
    return Design(
        sides=("chosen", "rejected"),
        granularity="tokens" if params.get("granularity") == "tokens" or pairs == ["student"] else "spans",
        reference=references[0],
        weights=str(params["weights"]) if "weights" in params else pairs[0] if pairs else None,
    )


def reads_teacher(record: Record) -> bool:
    """Whether anything of the teacher reaches the training of a row."""
    return any(one.role == "teacher" for one in (*record.signals, *record.in_memory))


def _family(record: Record, design: Design) -> str:
    if len(design.sides) == 2:
        return PREFERENCE_DISTILLATION if reads_teacher(record) else PREFERENCE
    return DISTILLATION if reads_teacher(record) else SUPERVISED


def _sft(record: Record, role: Role) -> str:
    """The model of a role that trainings start from and are measured from."""
    settings = record.shared.settings.get(role)
    phase = settings.get("sft") if isinstance(settings, Mapping) else None
    return f"the {role} as given" if phase == "skip" else f"the {role} after SFT"


def _sources(record: Record, design: Design | None) -> str:
    parts = [] if design is None else [" and ".join(design.sides) + " responses"]
    kept = {signal.kept: signal.role for signal in record.signals}
    if "responses" in kept:
        parts.append(f"responses that the {kept['responses']} generated")
    if "distributions" in kept:
        parts.append(f"the {kept['distributions']}'s likeliest tokens (stored)")
    if record.in_memory:
        parts.append(f"the {record.in_memory[0].role}'s whole distributions (in memory)")
    return ", ".join(parts) or NOTHING


def _weights(design: Design) -> str:
    if design.weights is None:
        return STRATEGIES["uniform"]
    words = STRATEGIES.get(design.weights, f"strategy `{design.weights}`")
    return f"{words}, for each {design.granularity.removesuffix('s')}"
