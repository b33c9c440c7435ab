"""Aligned spans (docs/method.md#offset-cleaning, docs/method.md#aligned-spans): golden cases, invariants on any text, and the batch against a plain loop."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctpd.core.errors import UserError
from ctpd.text.align import AlignedSpans, align_spans, align_spans_batch, clean_ends, clean_offsets, row_starts
from tests.fixtures.tokenizers import KINDS, tokenizer

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "spans.json").read_text(encoding="utf-8"))["cases"]
# Arbitrary Unicode, and text with many characters that tokenizers split differently.
HARD = st.sampled_from(
    [
        *" \n\t\u00a0\u200b\u0301\u0308aeéxﬁ½Ü¨1",
        "🙂",
        "👩\u200d👩\u200d👧",
        "日本",
        "  ",
        "hello",
        " the",
        "İ",
        "ß",
        "नि",
        "\x00",
    ]
)
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.lists(HARD, min_size=1).map("".join))


def cleaned(kind: str, text: str) -> np.ndarray:
    """Cleaned offsets of a text alone."""
    output = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [token in ("▁", "Ġ") for token in tokenizer(kind).convert_ids_to_tokens(output["input_ids"])]
    return clean_offsets(output["offset_mapping"], text, space_only=marks)


def monotone_ends(offsets: list[tuple[int, int]], length: int) -> list[int]:
    """Step 1 of docs/method.md#aligned-spans, token by token."""
    ends: list[int] = []
    for _, end in offsets:
        ends.append(max(end, ends[-1] if ends else 0))
    return [length if end == ends[-1] else end for end in ends]


def loop_align(teacher: list[tuple[int, int]], student: list[tuple[int, int]], length: int) -> tuple[list[int], ...]:
    """docs/method.md#aligned-spans as a plain loop."""
    teacher_ends, student_ends = monotone_ends(teacher, length), monotone_ends(student, length)
    boundaries = sorted(b for b in set(teacher_ends) & set(student_ends) if b > 0)
    spans = [
        [next(i for i, b in enumerate(boundaries) if b >= end) for end in ends] for ends in (teacher_ends, student_ends)
    ]
    return boundaries, spans[0], spans[1]


def loop_clean(offsets: list[tuple[int, int]], text: str, marks: list[bool]) -> list[int]:
    """docs/method.md#offset-cleaning as a plain loop over tokens and characters."""
    clipped = [tuple(min(max(position, 0), len(text)) for position in offset) for offset in offsets]
    ends = []
    for i, (start, end) in enumerate(clipped):
        follows = clipped[i + 1][0] if i + 1 < len(clipped) else len(text) + 1
        ends.append(min(start, follows) if marks[i] and follows < end else end)
    covered = {position for (start, _), end in zip(clipped, ends, strict=True) for position in range(start, end)}
    for i, end in enumerate(ends):
        while end < len(text) and end not in covered and not text[end].isspace():
            end += 1
        ends[i] = end
    return ends


def check_invariants(spans: AlignedSpans, teacher: np.ndarray, student: np.ndarray, length: int) -> None:
    """The properties of docs/method.md#properties-of-spans."""
    boundaries = spans.boundaries
    assert boundaries[-1] == length, "the spans cover the whole response"
    assert (np.diff(boundaries, prepend=0) > 0).all(), "spans are contiguous, in order and not empty"
    for span, offsets in ((spans.teacher_span, teacher), (spans.student_span, student)):
        assert len(span) == len(offsets), "no token is lost"
        assert (np.diff(span) >= 0).all(), "tokens are in order"
        assert sorted(set(span.tolist())) == list(range(len(boundaries))), "every span has a token on each side"
    ends = [set(monotone_ends(offsets.tolist(), length)) for offsets in (teacher, student)]
    assert (ends[0] & ends[1]) - {0} == set(boundaries.tolist()), "no span can be split further"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['teacher']}-{case['student']}")
def test_golden_spans_from_raw_offsets(case: dict) -> None:
    """The published golden cases exactly: raw offsets, cleaned offsets, spans."""
    teacher, student = (clean_offsets(case[f"{side}_offsets_raw"], case["text"]) for side in ("teacher", "student"))
    assert teacher.tolist() == case["teacher_offsets"]
    assert student.tolist() == case["student_offsets"]
    spans = align_spans(teacher, student, len(case["text"]))
    assert spans.boundaries.tolist() == case["boundaries"]
    assert spans.teacher_span.tolist() == case["teacher_span"]
    assert spans.student_span.tolist() == case["student_span"]


def test_all_golden_cases_are_read() -> None:
    assert len(CASES) == 89


@pytest.mark.parametrize("teacher", KINDS)
@given(text=TEXT, student=st.sampled_from(KINDS))
def test_no_token_is_ever_lost(teacher: str, student: str, text: str) -> None:
    """The invariants hold on arbitrary Unicode for every pair of tokenizer kinds."""
    offsets = cleaned(teacher, text), cleaned(student, text)
    assume(all(len(side) for side in offsets))
    check_invariants(align_spans(*offsets, len(text)), *offsets, len(text))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_same_tokenizer_gives_one_token_per_span(kind: str, text: str) -> None:
    """With one tokenizer on both sides only tokens that share an end share a span."""
    offsets = cleaned(kind, text)
    assume(len(offsets))
    spans = align_spans(offsets, offsets, len(text))
    ends = np.array(monotone_ends(offsets.tolist(), len(text)))
    assert (spans.teacher_span == spans.student_span).all()
    # A token with end 0 covers no character of the response: it belongs to the first span.
    ends[ends == 0] = spans.boundaries[0]
    assert len(spans.boundaries) == len(set(ends.tolist()))


OFFSETS = st.integers(1, 12).flatmap(
    lambda length: st.tuples(
        st.just(length),
        *[
            st.lists(st.tuples(st.integers(0, length), st.integers(0, length)), min_size=1, max_size=12)
            for _ in range(2)
        ],
    )
)


@given(rows=st.lists(OFFSETS, min_size=1, max_size=6))
def test_batch_equals_a_plain_loop(rows: list) -> None:
    """The vectorised batch gives what docs/method.md#aligned-spans says, row by row, for any offsets, monotone or not."""
    lengths = np.array([length for length, _, _ in rows])
    sides = [[[end for _, end in row[side]] for row in rows] for side in (1, 2)]
    starts = [row_starts(np.array([len(ends) for ends in side])) for side in sides]
    teacher, student = (np.array([end for ends in side for end in ends]) for side in sides)
    batch = align_spans_batch(
        teacher, teacher_starts=starts[0], student_ends=student, student_starts=starts[1], lengths=lengths
    )
    for r, (length, teacher_offsets, student_offsets) in enumerate(rows):
        expected = loop_align(teacher_offsets, student_offsets, length)
        spans = slice(batch.span_starts[r], batch.span_starts[r + 1])
        assert batch.boundaries[spans].tolist() == expected[0]
        assert batch.teacher_span[starts[0][r] : starts[0][r + 1]].tolist() == expected[1]
        assert batch.student_span[starts[1][r] : starts[1][r + 1]].tolist() == expected[2]
        single = align_spans(teacher_offsets, student_offsets, length)
        assert single.boundaries.tolist() == expected[0]


CLEANING = st.text("ab \n\u0301🙂", min_size=1, max_size=10).flatmap(
    lambda text: st.tuples(
        st.just(text),
        st.lists(
            st.tuples(st.integers(-2, len(text) + 2), st.integers(0, 4), st.booleans()).map(
                lambda token: (token[0], token[0] + token[1], token[2])
            ),
            max_size=8,
        ),
    )
)


@given(rows=st.lists(CLEANING, min_size=1, max_size=5))
def test_batched_cleaning_equals_a_plain_loop(rows: list) -> None:
    """docs/method.md#offset-cleaning over many rows at once, for any offsets, also ones that reach out of the response."""
    flat = [token for _, tokens in rows for token in tokens]
    starts, ends, marks = (np.array([token[i] for token in flat]) for i in range(3))
    token_starts = row_starts(np.array([len(tokens) for _, tokens in rows]))
    result = clean_ends(
        starts.astype(np.int64),
        ends.astype(np.int64),
        token_starts=token_starts,
        texts=[text for text, _ in rows],
        space_only=marks.astype(bool),
    )
    for r, (text, tokens) in enumerate(rows):
        expected = loop_clean([token[:2] for token in tokens], text, [token[2] for token in tokens])
        assert result[token_starts[r] : token_starts[r + 1]].tolist() == expected


def test_an_inserted_prefix_ends_where_it_starts() -> None:
    """The prefix that SentencePiece inserts has the offset of the first character but spells none of it."""
    text = "é x"
    tokens = tokenizer("sentencepiece_bpe").tokenize(text)
    assert tokens[0] == "▁"
    assert cleaned("sentencepiece_bpe", text)[0].tolist() == [0, 0]
    # A space mark that spells a space keeps its character.
    assert [0, 1] in cleaned("gemma_bpe", " é").tolist()


def test_composed_marks_belong_to_the_token_before() -> None:
    """A combining mark that NFC composes away extends the end of the token before it; white space does not."""
    assert clean_offsets([(0, 1), (3, 4)], "e\u0301 x").tolist() == [[0, 2], [3, 4]]
    assert clean_offsets([(0, 1)], "e  ").tolist() == [[0, 1]]


@pytest.mark.parametrize("text", ["Tom has 3 + 4 = 7 apples.", "ok 🙂 then é, ½ and Ü", "  the quick \n brown  fox"])
def test_spans_of_byte_level_bpe_decode_to_the_same_text(text: str) -> None:
    """Without a normalizer both sides of every span spell the same characters.

    Alignment uses only the ends of tokens (docs/method.md#aligned-spans). A token with the last bytes of a character and the
    next character would make spans that split the first one; the tokens of these texts include none.
    """
    sides = [tokenizer("byte_bpe", size) for size in (420, 300)]
    ids = [side(text, add_special_tokens=False)["input_ids"] for side in sides]
    offsets = [side(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"] for side in sides]
    spans = align_spans(*(clean_offsets(side, text) for side in offsets), len(text))
    assert len(ids[0]) != len(ids[1])
    begin = 0
    for s, end in enumerate(spans.boundaries.tolist()):
        for side, tokens, span in zip(sides, ids, (spans.teacher_span, spans.student_span), strict=True):
            assert side.decode([id for id, of in zip(tokens, span, strict=True) if of == s]) == text[begin:end]
        begin = end


@pytest.mark.parametrize(
    ("teacher", "student", "length", "message"),
    [
        ([], [(0, 1)], 1, "the teacher's tokenizer gives no token"),
        ([(0, 1)], [], 1, "the student's tokenizer gives no token"),
        ([(0, 0)], [(0, 0)], 0, "the response is empty"),
        ([(0, 1)], [(0, 5)], 4, "an offset of the student lies outside"),
        ([(0, -1)], [(0, 4)], 4, "an offset of the teacher lies outside"),
        ([0, 1], [(0, 4)], 4, "the teacher's offsets have shape"),
        ([(0.5, 1.5)], [(0, 4)], 4, "the teacher's offsets have shape"),
    ],
)
def test_what_cannot_be_aligned_is_refused(teacher: list, student: list, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        align_spans(teacher, student, length)
