"""The answers in the report: right and wrong marked, sorted without a script, and escaped."""

import re
from typing import Any

from harness.answers import Answer
from harness.contents import by_run, contents
from harness.record import Record
from harness.report import report
from harness.sheet import TableSpec
from harness.tables import build_tables
from harness.viewer import viewer
from tests.fixtures.pages import Page
from tests.fixtures.records import record, result

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;\" ' </details>{{ 7*7 }}"


def scored(run: str, scores: dict[str, float | None], seed: int | None = None, **fields: Any) -> Record:
    answers = tuple(Answer(name, score, f"prompt of {name}", "t", f"{run} on {name}") for name, score in scores.items())
    return record(run, seed, result("Column", [1.0], **{"answers": answers, **fields}))


def test_documents_are_grouped_and_sorted_by_how_far_rows_differ() -> None:
    rows = [
        scored("A", {"all": 1, "none": 0, "one": 1, "half": 1, "part": 0.5}),
        scored("B", {"all": 1, "none": 0, "one": 0, "half": 1, "part": 0.5}),
        scored("C", {"all": 1, "none": None, "one": 0, "half": 0, "part": 0.5}),
        scored("D", {"all": 1, "none": 0, "one": 0, "half": 0, "part": 0.5}),
    ]
    (column,) = viewer(by_run(rows)).columns
    assert [(one.prompt, one.group, one.wrong) for one in column.documents] == [
        ("prompt of half", "differ", (2, 3)),
        ("prompt of one", "differ", (1, 2, 3)),
        ("prompt of part", "differ", (0, 1, 2, 3)),
        ("prompt of all", "right", ()),
        ("prompt of none", "wrong", (0, 1, 2, 3)),
    ]
    assert column.counts == {"differ": 3, "wrong": 1, "right": 1}
    marks = {reply.mark for one in column.documents for reply in one.replies}
    assert marks == {"✓ right", "✗ wrong", "✗ not finite", "~ 50\N{NO-BREAK SPACE}%"}


def page(records: list[Record]) -> str:
    spec = TableSpec("main", "Main", tuple((name, name) for name in by_run(records)))
    return report(contents(build_tables(records, [spec]), records), records, title="t", about="a")


def test_hostile_answers_are_text() -> None:
    answers = (Answer("d", 1.0, HOSTILE, HOSTILE, HOSTILE),)
    text = page([scored("A", {}, answers=answers)])
    read = Page(text)
    assert not {tag for tag, _ in read.seen} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in read.seen for name in attributes)
    assert read.text["dd"].count(HOSTILE) == 1  # the parser has undone the escapes
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_every_choice_of_the_viewer_has_a_rule_and_every_rule_a_document() -> None:
    text = page([scored("A", {"x": 1, "y": 0}), scored("B", {"x": 0, "y": 0}, seed=3), scored("B", {"x": 1}, seed=4)])
    inputs = [attributes for tag, attributes in Page(text).seen if tag == "input"]
    assert {attributes["type"] for attributes in inputs} == {"radio"}
    classes = {str(attributes["class"]) for attributes in inputs}
    assert {"row-0", "row-1"} <= classes
    for name in classes - {"show-all", "row-any", "sort-differ"}:  # how the page is without a choice
        assert re.search(rf"\.viewer:has\(\.{name}:checked\)", text), name
    assert 'class="document differ w1" style="--wrong: 1; --at: 0"' in text
    assert 'class="document wrong w0 w1" style="--wrong: 2; --at: 1"' in text
    assert "B, seed 3" in text
    assert "B, seed 4 <span" not in text


def test_rows_without_kept_answers_are_named_with_what_brings_them() -> None:
    text = page([scored("A", {"x": 1}), scored("Old one", {}, answers=None)])
    assert "No answers were kept for Old one: run with --samples DIR --rebuild" in text
    assert "Answers</h2>" not in page([scored("Old one", {}, answers=None)])
