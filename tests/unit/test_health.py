"""Health of generated answers: the measures, what is judged unhealthy, and where tables and the report say so."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ctpd.core.errors import UserError
from harness.answers import Health
from harness.contents import by_run, contents
from harness.formats import FORMATS, frame
from harness.health import faults, health_table, matches, measure, repeated
from harness.record import Record
from harness.report import report
from harness.sheet import Table, TableSpec
from harness.suites import load_suite
from harness.tables import build_tables
from tests.fixtures.records import record, result

GOOD: dict[str, Any] = {"answers": 100, "ended": 0.98, "in_form": 0.95, "characters": 20.0, "repeated": 0.02}
ROWS = (("Teacher", "teacher"), ("Student", "student"), ("DPO", "dpo"), ("CTPD", "ctpd"))
SPEC = TableSpec(name="main", caption="Main results", rows=ROWS, base="dpo", unranked=("teacher",))


def row(run: str, seed: int | None = 0, *, kind: str = "trained", score: float = 0.5, **health: Any) -> Record:
    """A record with a column that generates and one that does not."""
    of_answers = Health(**(GOOD | health))
    generated = result("GSM8K", [score, 1 - score, score, 1 - score], health=of_answers)
    return record(run, seed, generated, result("Wino", [1, 0]), kind=kind)


def student(**health: Any) -> Record:
    return row("student", None, kind="untrained student", **health)


def build(records: list[Record], spec: TableSpec = SPEC) -> Table:
    (table,) = build_tables(records, [spec])
    return table


def study(**collapsed: Any) -> list[Record]:
    teacher = row("teacher", None, kind="untrained teacher")
    return [teacher, student(), *(row("dpo", seed, **collapsed) for seed in (0, 1)), row("ctpd", 0), row("ctpd", 1)]


@pytest.mark.parametrize(
    "text", ["", "one", "a b c", "a b c d", "a b c d a b c d", "no no no no no no", "7. 7. 7. 7.", "!!!!!!"]
)
def test_repeated_4_grams_are_those_of_a_plain_count(text: str) -> None:
    words: list[str] = []
    for piece in text.replace(".", " . ").replace("!", " ! ").split():
        words.append(piece)
    seen: list[tuple[str, ...]] = []
    again = 0
    for i in range(len(words) - 3):
        gram = tuple(words[i : i + 4])
        again += gram in seen
        seen.append(gram)
    assert repeated(text) == pytest.approx(again / len(seen) if seen else 0.0)


def test_a_measure_is_a_mean_over_answers_and_none_where_it_is_not_known() -> None:
    texts = ["12", "no no no no no no", ""]
    found = measure(texts, ended=2, in_form=[True, False, False])
    assert found is not None
    assert (found.answers, found.ended, found.in_form, found.characters) == (3, 2 / 3, 1 / 3, 19 / 3)
    assert found.repeated == pytest.approx(repeated(texts[1]) / 3)
    unknown = measure(texts, ended=None, in_form=None)
    assert unknown is not None
    assert (unknown.ended, unknown.in_form) == (None, None)
    assert measure([], ended=0, in_form=[]) is None


def test_a_form_is_matched_by_the_whole_answer_without_white_space_around() -> None:
    assert matches(r"\d+", " 12\n")
    assert not matches(r"\d+", "12 apples")
    assert matches(r".*#### \d+", "Two\nand ten.\n#### 12")


@pytest.mark.parametrize(
    ("start", "trained", "named"),
    [
        ({}, {}, []),
        ({}, {"ended": 0.87}, ["do not end by themselves (87 % on GSM8K, the student's 98 %)"]),
        ({}, {"ended": 0.89}, []),
        ({}, {"in_form": 0.8}, ["not in the expected form (80 % on GSM8K, the student's 95 %)"]),
        ({}, {"repeated": 0.3}, ["repeat themselves (30 % on GSM8K, the student's 2 %)"]),
        ({}, {"characters": 41.0}, ["another length (41.0 characters on GSM8K, the student's 20.0 characters)"]),
        ({}, {"characters": 9.0}, ["another length (9.0 characters"]),
        ({}, {"characters": 39.0}, []),
        ({}, {"ended": 0.0, "characters": 0.0}, ["do not end", "another length"]),
        (
            {"ended": 0.05, "characters": 900.0, "repeated": 0.8},
            {"ended": 0.05, "characters": 900.0, "repeated": 0.8},
            [],
        ),
        (
            {"ended": 0.05, "characters": 900.0, "repeated": 0.8},
            {},
            [],
        ),  # a base that never stops, mended by the method
        ({"ended": None, "in_form": None}, {"characters": 90.0}, []),
        ({"characters": 0.0}, {}, []),
        ({"in_form": 0.1}, {"characters": 90.0}, []),
    ],
)
def test_what_is_unhealthy_is_judged_against_the_start(
    start: dict[str, Any], trained: dict[str, Any], named: list[str]
) -> None:
    found = faults([row("dpo", **trained)], student(**start))
    assert len(found) == len(named)
    assert all(part in text for part, text in zip(named, found, strict=True))


def test_without_a_start_only_what_is_gross_is_unhealthy() -> None:
    assert not faults([row("dpo", ended=0.6, characters=900.0, repeated=0.4)], None)
    (fault,) = faults([row("dpo", ended=0.4)], None)
    assert "no untrained student to compare with" in fault


def test_one_collapsed_seed_of_several_marks_the_row_and_is_the_one_that_is_shown() -> None:
    seeds = [row("dpo", seed) for seed in range(4)] + [row("dpo", 4, ended=0.6)]
    (fault,) = faults(seeds, student())
    assert "60 %" in fault
    assert "1 of 5 seeds" in fault


def test_untrained_models_and_columns_without_answers_are_not_judged() -> None:
    assert not faults([row("teacher", None, kind="untrained teacher", ended=0.0)], student())
    assert not faults([record("dpo", 0, result("Wino", [1, 0]), kind="trained")], student())


def test_an_unhealthy_row_is_marked_in_every_format_and_a_footnote_says_why() -> None:
    table = build(study(ended=0.12))
    assert [bool(one.faults) for one in table.rows] == [False, False, True, False]
    for kind in ("md", "txt", "html"):
        text = FORMATS[kind](table)
        assert "DPO §" in text
        assert "CTPD §" not in text
        assert "§ Unhealthy, whatever the score: DPO: answers do not end by themselves (12 % on GSM8K" in " ".join(
            text.split()
        )
    assert r"DPO \S{}" in FORMATS["tex"](table)
    assert frame(table)["unhealthy"].tolist()[2].startswith("answers do not end")
    for kind in ("md", "txt", "html", "csv"):
        assert "§" not in FORMATS[kind](build(study()))


def test_the_start_counts_though_the_table_does_not_show_it() -> None:
    spec = TableSpec(name="own", caption="Own", rows=ROWS[2:], base="dpo")
    (dpo, _) = build(study(in_form=0.7), spec).rows
    assert "the student's 95 %" in dpo.faults[0]


def test_the_report_always_shows_health_and_says_where_there_is_none() -> None:
    records = study(repeated=0.5)
    page = report(contents([build(records)], records), records, title="t", about="a")
    table = health_table(by_run(records))
    assert [one[:2] for one in table.rows] == [(run, "GSM8K") for _, run in ROWS]
    assert table.rows[2][2:] == ("98 %", "95 %", "20.0 characters (1.00 ×)", "50 %", "unhealthy")
    assert 'id="health"' in page
    assert "20.0 characters (1.00 ×)" in page
    assert "Unhealthy answers: DPO, see below the table." in page
    without = [record("dpo", 0, result("Wino", [1, 0])), record("ctpd", 0, result("Wino", [0, 1]))]
    spec = TableSpec(name="own", caption="Own", rows=ROWS[2:], base="dpo")
    page = report(contents([build(without, spec)], without), without, title="t", about="a")
    assert "No health of answers: no column of the suite generates text" in page


def test_a_record_without_health_still_reads(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    row("dpo").write(path)
    older = json.loads(path.read_text())
    del older["unmeasured"]
    for column in older["evaluation"].values():
        del column["health"]
    path.write_text(json.dumps(older))
    read = Record.read(path)
    assert read.evaluation["GSM8K"].health is None
    assert not faults([read], student())


def unmeasured_study() -> list[Record]:
    """The teacher has a longer context than the students, on whom GSM8K cannot be measured."""
    lost = {"GSM8K": "the model's length of 160 tokens leaves no room"}
    return [
        record("teacher", None, result("GSM8K", [1, 1]), result("Wino", [1, 1, 1, 1])),
        *(
            record(run, seed, result("Wino", scores), kind="trained", unmeasured=lost)
            for run, scores in (("dpo", [1, 0, 0, 0]), ("ctpd", [1, 1, 1, 0]))
            for seed in (0, 1)
        ),
    ]


def test_a_column_that_cannot_be_measured_is_a_dash_and_the_average_of_all_rows_is_without_it() -> None:
    spec = TableSpec(name="main", caption="Main", rows=(ROWS[0], *ROWS[2:]), base="dpo", unranked=("teacher",))
    records = unmeasured_study()
    table = build(records, spec)
    teacher, dpo, ctpd = table.rows
    assert [cell and cell.mean for cell in teacher.cells] == [1.0, 1.0, 1.0]
    assert [cell and cell.mean for cell in dpo.cells] == [None, 0.25, 0.25]
    assert ctpd.difference is not None
    assert ctpd.difference.value == pytest.approx(0.5)
    text = FORMATS["md"](table)
    assert "| DPO | – | 25.00 ± 0.00 |" in text.replace("<ins>", "").replace("</ins>", "")
    assert "Not measured: GSM8K on dpo, ctpd, since the model's length of 160 tokens leaves no room." in text
    assert "Missing" not in text
    assert pd.isna(frame(table)["GSM8K"][1])
    assert "Differences" in report(contents([table], records), records, title="t", about="a")


def test_a_suite_of_which_no_column_can_be_measured_is_all_dashes() -> None:
    lost = [record(run, 0, kind="trained", unmeasured={"GSM8K": "it is too long"}) for run in ("dpo", "ctpd")]
    spec = TableSpec(name="own", caption="Own", rows=ROWS[2:], base="dpo")
    assert "| DPO | – | – |" in FORMATS["md"](build(lost, spec))


@pytest.mark.parametrize("form", ["[0-9", "[[0-9]]", "a{4294967296}", "(" * 2000], ids=lambda form: form[:9])
def test_a_form_that_is_no_regular_expression_is_refused(form: str, tmp_path: Path) -> None:
    """Nor one that Python warns of, since it may be read otherwise one day."""
    suite = tmp_path / "suite.yaml"
    column = 'name: A, task: t, metric: "exact_match,none", version: 1.0'
    suite.write_text(f"name: own\ncolumns:\n  - {{{column}, form: '{form}'}}\n")
    with pytest.raises(UserError, match="the form is no regular expression"):
        load_suite(suite)
    suite.write_text(f"name: own\ncolumns:\n  - {{{column}, form: '[0-9]+'}}\n")
    assert load_suite(suite).columns[0].form == "[0-9]+"
