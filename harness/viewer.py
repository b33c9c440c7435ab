"""Answers of all rows to some documents of each column, as the report shows them: right and wrong marked, and counted."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from harness.answers import Answer
from harness.record import Record

MARKS = {"right": "✓", "wrong": "✗", "part": "~"}


class Reply(NamedTuple):
    """One row's answer: how it scores, as a style and as text, and the answer."""

    label: str
    style: str
    mark: str
    text: str


class Document(NamedTuple):
    """A document with the replies of all rows that have one.

    Attributes:
        group: `right`, `wrong` where all rows are; else `differ`.
        wrong: indices of the rows that do not answer it rightly.
        at: its index, in the order of the documents' hashes.
    """

    at: int
    prompt: str
    target: str
    replies: list[Reply]
    group: str
    wrong: tuple[int, ...]


class ColumnAnswers(NamedTuple):
    """The documents of a column, those first on which rows differ most; ``rows`` are those that have answers."""

    number: int
    name: str
    rows: list[str]
    documents: list[Document]
    total: int

    @property
    def counts(self) -> dict[str, int]:
        """Documents of each group."""
        groups = [document.group for document in self.documents]
        return {group: groups.count(group) for group in ("differ", "wrong", "right")}


class Viewer(NamedTuple):
    """What can be looked at; ``lacking`` are rows whose records kept no answers."""

    columns: list[ColumnAnswers]
    lacking: list[str]
    most_rows: int


def viewer(runs: Mapping[str, Sequence[Record]]) -> Viewer:
    """The answers of the first seed of every run, column by column.

    Args:
        runs: the records of each run, in the order shown.
    """
    first = {run: records[0] for run, records in runs.items()}
    names = dict.fromkeys(name for record in first.values() for name in record.evaluation)
    columns = [_column(number, name, first) for number, name in enumerate(names)]
    columns = [column for column in columns if column.documents]
    lacking = [run for run, record in first.items() if any(one.answers is None for one in record.evaluation.values())]
    return Viewer(columns, lacking, max((len(column.rows) for column in columns), default=0))


def _column(number: int, name: str, first: Mapping[str, Record]) -> ColumnAnswers:
    found: dict[str, dict[str, Answer]] = {}
    total = 0
    for record in first.values():
        result = record.evaluation.get(name)
        if result is not None and result.answers is not None:
            found[_title(record)] = {answer.doc_hash: answer for answer in result.answers}
            total = result.protocol.num_docs
    hashes = dict.fromkeys(doc_hash for answers in found.values() for doc_hash in answers)
    documents = [_document(at, doc_hash, found) for at, doc_hash in enumerate(hashes)]
    documents.sort(key=lambda one: (one.group != "differ", abs(2 * len(one.wrong) - len(one.replies)), one.at))
    return ColumnAnswers(number, name, list(found), documents, total)


def _title(record: Record) -> str:
    return record.run if record.seed is None else f"{record.run}, seed {record.seed}"


def _document(at: int, doc_hash: str, found: Mapping[str, Mapping[str, Answer]]) -> Document:
    answers = {label: of_row[doc_hash] for label, of_row in found.items() if doc_hash in of_row}
    replies = [Reply(label, *_marked(answer), answer.answer) for label, answer in answers.items()]
    labels = list(found)
    wrong = tuple(labels.index(reply.label) for reply in replies if reply.style != "right")
    styles = {reply.style for reply in replies}
    group = styles.pop() if len(styles) == 1 else "differ"
    any_answer = next(iter(answers.values()))
    return Document(at, any_answer.prompt, any_answer.target, replies, "differ" if group == "part" else group, wrong)


def _marked(answer: Answer) -> tuple[str, str]:
    """Style and mark: right for a score of 1, wrong for 0, else the score in percent."""
    if answer.score is None:
        return "wrong", f"{MARKS['wrong']} not finite"
    if answer.score in (0, 1):
        style = "right" if answer.score else "wrong"
        return style, f"{MARKS[style]} {style}"
    return "part", f"{MARKS['part']} {100 * answer.score:.0f}\N{NO-BREAK SPACE}%"
