"""What compares the rows of a table: intervals over seeds and documents, ranks, starts, and tests."""

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from harness.differences import rank_bounds
from harness.formats import (
    FORMATS,
    details,
    frame,
    percent_interval,
    to_latex,
    to_markdown,
)
from harness.record import Record
from harness.sheet import TableSpec
from harness.statistics import LEAST_P, Paired, crossed_p_values
from tests.fixtures.records import build, record, remeasured, result, study

BELOW = TableSpec("t", "T", (("DPO", "bad"), ("KD", "worse"), ("CTPD", "good")))


def many_seeds(num_seeds: int) -> list[Record]:
    """CTPD has one document more than DPO right on every seed, two more on seed 0, and one column of fractions."""
    records = []
    for seed in range(num_seeds):
        dpo, ctpd = [1, 0, 0, 0], [1, 1, int(seed == 0), 0]
        records += [record("dpo", seed, result("GSM8K", dpo), result("Wino", [0.5, 0.0]))]
        records += [record("ctpd", seed, result("GSM8K", ctpd), result("Wino", [0.5, 0.0]))]
    return records


def test_the_interval_holds_seeds_and_documents_and_the_details_that_given_the_seeds() -> None:
    """CTPD's differences are 0.25 on seed 0 and 0.125 on the others: beyond that its documents scatter."""
    table = build(many_seeds(5), seeds=range(5))
    row = table.rows[2]
    assert row.difference is not None
    assert row.given_seeds is not None
    differences = [0.25, 0.125, 0.125, 0.125, 0.125]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(differences), scale=stats.sem(differences))
    assert row.difference.value == row.given_seeds.value == pytest.approx(0.15)
    assert row.difference.high - row.difference.low > high - low
    further = details(table)
    assert further is not None
    assert further.header[-1] == "Average vs. DPO, given the seeds [95 %]"
    assert further.rows[-1][-1] == percent_interval(row.given_seeds)
    assert frame(table)["given the seeds low"].tolist()[2] == 100 * row.given_seeds.low


def test_footnotes_say_what_the_interval_lacks_for_one_seed_and_for_few() -> None:
    one, four, five = (build(many_seeds(n), seeds=range(n)) for n in (1, 4, 5))
    notes = " ".join(one.footnotes)
    assert "One seed (CTPD): the chance of another training is not in this interval" in notes
    assert "crossed bootstrap" not in notes
    assert "Fewer than 5 seeds (CTPD)" in " ".join(four.footnotes)
    assert not [note for note in five.footnotes if "ewer" in note or "One seed" in note]


def test_one_seed_gives_no_p_value_no_rank_and_the_interval_given_the_seed() -> None:
    """What a single training shows is no significance of the method."""
    row = build(many_seeds(1), seeds=(0,)).rows[2]
    assert (row.p_value, row.p_is_bound, row.ranks) == (None, False, ())
    assert row.difference == row.given_seeds is not None


def test_two_models_without_seeds_have_a_p_value_over_documents() -> None:
    """Neither is a training of which there could be another."""
    records = [record(run, None, result("A", [score] * 30)) for run, score in (("a", 0.0), ("b", 1.0))]
    table = build(records, TableSpec("t", "T", (("A", "a"), ("B", "b")), base="a"))
    assert table.rows[1].p_value == LEAST_P
    assert "One seed" not in " ".join(table.footnotes)


def graded(scores: dict[str, float], *, num_seeds: int = 5, num_docs: int = 200) -> list[Record]:
    """Rows whose seeds have so many of the documents right, give or take one percent."""
    records = []
    for number, (run, score) in enumerate(scores.items()):
        rng = np.random.default_rng(number)
        for seed in range(num_seeds):
            right = rng.permutation(num_docs) < num_docs * (score + 0.01 * (seed % 3 - 1))
            records.append(record(run, seed, result("A", right.astype(float).tolist())))
    return records


def test_ranks_are_of_the_trained_rows_with_intervals_that_equal_rows_share() -> None:
    scores = {"low": 0.2, "middle": 0.5, "alike": 0.505, "high": 0.8}
    teacher = record("teacher", None, result("A", [1.0] * 200))
    rows = (("Teacher", "teacher"), *((name.title(), name) for name in scores))
    table = build([teacher, *graded(scores)], TableSpec("t", "T", rows, base="low", unranked=("teacher",)))
    ranks = {row.run: row.ranks and row.ranks[-1] for row in table.rows}
    assert ranks == {"teacher": (), "low": (4, 4, 4), "middle": (3, 2, 3), "alike": (2, 2, 3), "high": (1, 1, 1)}
    assert "| Rank [95 %] |" in to_markdown(table)
    assert "| 3 [2–3] |" in to_markdown(table)
    assert frame(table)["Average rank low"].tolist()[1:] == [4, 2, 2, 1]
    assert frame(table)["A rank"].tolist()[1:] == [4, 3, 2, 1]
    without_base = build([teacher, *graded(scores)], TableSpec("t", "T", rows))
    assert not any(row.ranks for row in without_base.rows)


def test_bounds_of_ranks_count_the_rows_that_are_significantly_better_and_worse() -> None:
    pairs = [(0, 1), (0, 2), (1, 2)]
    values = np.array([0.1, 0.3, 0.2])
    assert rank_bounds(3, pairs, values, np.array([0.001, 0.001, 0.001])) == [(1, 1), (2, 2), (3, 3)]
    assert rank_bounds(3, pairs, values, np.array([0.4, 0.001, 0.001])) == [(1, 2), (1, 2), (3, 3)]
    # Holm: of two comparisons of a row the smaller p must be below 0.025
    assert rank_bounds(3, pairs, values, np.array([0.4, 0.03, 0.4])) == [(1, 3), (1, 3), (1, 3)]
    assert rank_bounds(3, pairs[:1], values[:1], np.array([0.001])) == [(1, 2), (2, 3), (1, 3)]


def test_rank_intervals_of_equal_rows_hold_all_their_places() -> None:
    """A bootstrap of the ranks themselves would often leave out a place that a row, as good as others, may have."""
    rng = np.random.default_rng(0)
    pairs = list(combinations(range(4), 2))
    held = 0
    for _ in range(100):
        scores = (rng.random((4, 5, 60)) < 0.5 + rng.normal(0.0, 0.03, size=(4, 5, 1))).astype(float)
        paired = [Paired(tuple(range(5)), {"A": scores[i] - scores[j]}) for i, j in pairs]
        values, p_values = crossed_p_values(paired, draws=1000)
        held += sum(bounds == (1, 4) for bounds in rank_bounds(4, pairs, values[-1], p_values[-1]))
    assert held >= 0.95 * 400


def started(scores: dict[str, float], start: float, **options: Any) -> list[Record]:
    right = (np.random.default_rng(99).permutation(200) < 200 * start).astype(float).tolist()
    return [record("student", None, result("A", right), kind="untrained student"), *graded(scores, **options)]


def test_a_row_below_the_model_that_it_started_from_is_marked_in_every_format() -> None:
    table = build(started({"bad": 0.48, "worse": 0.2, "good": 0.7}, 0.5), BELOW)
    assert [row.marks for row in table.rows] == [("↓",), ("↓↓",), ()]
    assert [row.start and (row.start.is_below, row.start.is_clear) for row in table.rows] == [
        (True, False), (True, True), (False, False),
    ]  # fmt: skip
    assert table.rows[1].start is not None
    assert table.rows[1].start.difference.value == pytest.approx(0.2 - 0.5, abs=0.01)
    for suffix in ("md", "html", "txt"):
        text = FORMATS[suffix](table)
        assert re.search(r"DPO ↓(?!↓)", text)
        assert "KD ↓↓" in text
        assert "CTPD ↓" not in text
        assert "below that of student, the untrained student that the row started from" in text
    assert r"KD $\downarrow$$\downarrow$" in to_latex(table)
    assert frame(table)["marks"].tolist() == ["↓", "↓↓", ""]


def test_one_seed_below_its_start_is_marked_and_never_called_significant() -> None:
    table = build(started({"bad": 0.48, "worse": 0.1, "good": 0.7}, 0.5, num_seeds=1), BELOW)
    assert [row.marks for row in table.rows] == [("↓",), ("↓",), ()]
    assert "significantly" not in " ".join(table.footnotes)


def test_a_start_without_finite_scores_marks_nothing() -> None:
    student, *others = started({"bad": 0.2, "worse": 0.1, "good": 0.7}, 0.5)
    lost = remeasured(student, "A", value=None)
    assert all(row.start is None and not row.marks for row in build([lost, *others], BELOW).rows)


def test_the_untrained_rows_have_no_start() -> None:
    records = started({"bad": 0.2, "worse": 0.1, "good": 0.7}, 0.5)
    records.append(record("teacher", None, result("A", [0.0] * 200)))
    table = build(records, replace(BELOW, rows=(("S", "student"), ("T", "teacher"), ("DPO", "bad")), base="student"))
    assert [row.start is not None for row in table.rows] == [False, False, True]
    assert table.rows[2].start is not None
    assert table.rows[2].difference == table.rows[2].start.difference


def test_mcnemar_is_given_per_seed_for_columns_of_0_and_1_alone() -> None:
    table = build(many_seeds(2))
    tests = table.rows[2].mcnemar
    assert tests is not None
    assert set(tests) == {"GSM8K"}
    assert [(t.only_system, t.only_base) for t in tests["GSM8K"].values()] == [(2, 0), (1, 0)]
    assert [t.p_value for t in tests["GSM8K"].values()] == [1.0, 1.0]  # 0.5 and 1, each of two tests
    assert frame(table)["GSM8K McNemar p (Holm), seed 0"].tolist()[2] == 1.0


def test_p_values_are_corrected_for_the_comparisons_of_their_table() -> None:
    alone = TableSpec(name="two", caption="Two", rows=(("CTPD", "ctpd"), ("DPO", "dpo")), base="dpo")
    raw, corrected = build(study(), alone).rows[0].p_value, build(study()).rows[2].p_value
    assert raw is not None
    assert corrected == pytest.approx(min(1.0, raw))  # the teacher's is smaller, so CTPD's is the last step
    teacher = build(study()).rows[0].p_value
    assert teacher == pytest.approx(
        2 * build(study(), replace(alone, rows=(("T", "teacher"), ("DPO", "dpo")))).rows[0].p_value
    )
    assert "Holm's correction for the 2 comparisons" in " ".join(build(study()).footnotes)
    assert "Holm" not in " ".join(n for n in build(study(), alone).footnotes if n.startswith("p:"))
