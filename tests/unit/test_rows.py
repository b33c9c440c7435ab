"""The rows of a training made from prepared pairs: units, end spans, sides, references."""

import numpy as np
import pytest

from ctpd.core.errors import UserError
from ctpd.objectives.base import BOTH_SIDES, Layout
from ctpd.pipeline.rows import Constants, end_units, scored_rows, text_rows, unit_signal, units_of
from ctpd.text.prepare import PreparedPairs
from tests.fixtures.prepared import two_prepared_pairs


@pytest.fixture
def prepared() -> PreparedPairs:
    return two_prepared_pairs()


def rows_of(prepared: PreparedPairs, *, layout: Layout | None = None, split: str = "train", **changes: object):  # type: ignore[no-untyped-def]
    arguments = {"role": "student", "sides": BOTH_SIDES, **changes}
    return scored_rows(prepared, layout=layout or Layout(granularity="spans"), split=split, **arguments)  # type: ignore[arg-type]


def test_spans_are_the_same_units_for_both_models(prepared: PreparedPairs) -> None:
    for role in ("teacher", "student"):
        _, starts = units_of(prepared, role, "spans")
        assert starts.tolist() == [0, 3, 5, 7, 9]


def test_tokens_are_units_of_their_own_numbered_inside_their_row(prepared: PreparedPairs) -> None:
    unit, starts = units_of(prepared, "student", "tokens")
    assert unit.tolist() == [-1, 0, 1, 2, 3, -1, -1, 0, 1, -1, 0, 1, -1, 0, 1, 2]
    assert starts.tolist() == [0, 4, 6, 8, 11]


def test_end_is_the_last_unit_of_every_row_that_was_not_cut(prepared: PreparedPairs) -> None:
    for granularity, ends in (("spans", [2, 4, 8]), ("tokens", [3, 5, 10])):
        _, starts = units_of(prepared, "student", granularity)  # type: ignore[arg-type]
        assert np.flatnonzero(end_units(prepared, starts)).tolist() == ends


def test_signal_of_a_span_is_the_sum_over_the_tokens_that_spell_it(prepared: PreparedPairs) -> None:
    logps = np.arange(17, dtype=np.float32)
    found = unit_signal(prepared, "teacher", logps, granularity="spans", aggregate="sum")
    assert found.tolist() == [1, 2 + 3 + 4, 5, 7, 8, 10 + 11 + 12, 13, 15, 16]
    mean = unit_signal(prepared, "teacher", logps, granularity="spans", aggregate="mean")
    assert mean.tolist() == [1, 3, 5, 7, 8, 11, 13, 15, 16]
    assert found.dtype == np.float32


def test_items_are_the_pairs_of_the_split_chosen_first(prepared: PreparedPairs) -> None:
    assert rows_of(prepared).items.tolist() == [[0, 1]]
    assert rows_of(prepared, split="eval").items.tolist() == [[2, 3]]


def test_swap_exchanges_chosen_and_rejected(prepared: PreparedPairs) -> None:
    assert rows_of(prepared, sides=BOTH_SIDES[::-1]).items.tolist() == [[1, 0]]


def test_one_sided_objective_sees_the_chosen_rows_only(prepared: PreparedPairs) -> None:
    assert rows_of(prepared, sides=("chosen",)).items.tolist() == [[0]]


def test_end_spans_are_counted_or_left_out_as_the_layout_says(prepared: PreparedPairs) -> None:
    assert rows_of(prepared).counted.all()
    left_out = rows_of(prepared, layout=Layout(granularity="spans", end_span=False)).counted
    assert np.flatnonzero(~left_out).tolist() == [2, 4, 8]


def test_teachers_reference_reaches_the_students_spans(prepared: PreparedPairs) -> None:
    rows = rows_of(prepared, constants=Constants(("teacher", np.arange(17, dtype=np.float32))))
    batch = rows.collate([0])
    assert batch.reference.tolist() == [[1, 9, 5], [7, 8, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]


def test_split_without_pairs_is_refused(prepared: PreparedPairs) -> None:
    with pytest.raises(UserError, match="no usable pair in the split 'test'"):
        rows_of(prepared, split="test")


def test_whole_texts_score_every_token_but_the_first() -> None:
    rows = text_rows([[5, 6, 7], [8, 9]])
    rows.check()
    assert rows.unit.tolist() == [-1, 0, 1, -1, 0]
    assert rows.unit_starts.tolist() == [0, 2, 3]
    batch = rows.collate([0, 1])
    assert batch.tokens.targets.tolist() == [6, 7, 9]
    assert batch.mask.sum() == 3
