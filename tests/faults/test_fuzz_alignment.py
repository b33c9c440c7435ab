"""Fuzzing of the alignment (docs/method.md#aligned-spans): random texts under random cuts, beside oracles that count bytes and characters.

The cuts are those of no tokenizer: between any two bytes, so that a character's bytes fall into several tokens, or the last
bytes of one character and the first of the next into one; with tokens of no bytes; with characters that a normalizer removed.
"""

import itertools
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ctpd.text.align import AlignedSpans, align_spans, align_spans_batch, clean_ends, clean_offsets, row_starts
from tests.fixtures.fuzzing import fuzzed

PIECES = st.sampled_from(
    [*" \n\t\r\u00a0\u3000\u200b\u0301aZ9.é½Üß", "İ", "日", "🙂", "👩\u200d👩\u200d👧", "नि", "  ", "\0", "hello"]
)
TEXTS = st.one_of(
    st.lists(PIECES, min_size=1, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
)


class Tokens(NamedTuple):
    """One side: the offsets in characters, as a tokenizer of bytes gives them, and the range of bytes of each token."""

    offsets: list[tuple[int, int]]
    in_bytes: list[tuple[int, int]]


class Response(NamedTuple):
    """A text, the character of each of its bytes, and two tokenizations."""

    text: str
    char_of: list[int]
    sides: tuple[Tokens, Tokens]


@st.composite
def responses(draw: st.DrawFn) -> Response:
    """A text and two ways to cut its bytes; a position that is cut twice makes a token of no bytes."""
    text = draw(TEXTS)
    char_of = [index for index, char in enumerate(text) for _ in char.encode()]
    sides = []
    for _ in range(2):
        inner = sorted(draw(st.lists(st.integers(0, len(char_of)), max_size=12)))
        cuts = [0, *inner, len(char_of)]
        in_bytes = list(itertools.pairwise(cuts))
        sides.append(Tokens([_characters(begin, end, char_of, len(text)) for begin, end in in_bytes], in_bytes))
    return Response(text, char_of, (sides[0], sides[1]))


def _characters(begin: int, end: int, char_of: list[int], length: int) -> tuple[int, int]:
    """The offset of bytes: all characters that they are a part of; nothing, before the next character, where there are none."""
    start = char_of[begin] if begin < len(char_of) else length
    return (start, start) if begin == end else (start, char_of[end - 1] + 1)


def ends_somewhere(tokens: Tokens, response: Response) -> set[int]:
    """The characters in which a token of this side ends, counted from 1, by its last byte."""
    return {response.char_of[end - 1] + 1 for begin, end in tokens.in_bytes if begin < end}


def is_partition(spans: AlignedSpans, counts: tuple[int, int], length: int) -> None:
    """Every token in exactly one span, spans in order without a gap, each with a token of both sides."""
    boundaries = spans.boundaries.tolist()
    assert boundaries == sorted(set(boundaries))
    assert boundaries[0] > 0
    assert boundaries[-1] == length
    for of_side, count in zip((spans.teacher_span, spans.student_span), counts, strict=True):
        assert len(of_side) == count
        assert of_side.tolist() == sorted(of_side.tolist())
        assert set(of_side.tolist()) == set(range(len(boundaries)))


@fuzzed
@given(responses())
def test_spans_of_cut_bytes(response: Response) -> None:
    """A boundary stands behind each character in which a token of both sides ends, and nowhere else; a span's bytes end there."""
    text, char_of, sides = response
    spans = align_spans(*(clean_offsets(side.offsets, text) for side in sides), len(text))
    is_partition(spans, (len(sides[0].offsets), len(sides[1].offsets)), len(text))
    common = ends_somewhere(sides[0], response) & ends_somewhere(sides[1], response)
    assert set(spans.boundaries.tolist()) == common
    for side, of_side in zip(sides, (spans.teacher_span.tolist(), spans.student_span.tolist()), strict=True):
        crosses = any(
            begin < end and begin > 0 and char_of[begin - 1] == char_of[begin] != char_of[end - 1]
            for begin, end in side.in_bytes
        )
        first, begin = 0, 0
        for span, boundary in enumerate(spans.boundaries.tolist()):
            last = max(end for (_, end), of in zip(side.in_bytes, of_side, strict=True) if of == span)
            assert char_of[last - 1] == boundary - 1, "the bytes of a span end in its last character"
            if not crosses:
                assert text.encode()[first:last] == text[begin:boundary].encode(), "a span's tokens spell its text"
            first, begin = last, boundary


@st.composite
def reduced(draw: st.DrawFn) -> tuple[str, list[list[tuple[int, int]]], list[list[bool]]]:
    """What normalizers do to the offsets of cut bytes: tokens are lost, white space is trimmed, space marks are inserted."""
    response = draw(responses())
    sides, marks = [], []
    for tokens in response.sides:
        offsets: list[tuple[int, int]] = []
        is_mark: list[bool] = []
        for begin, end in tokens.offsets:
            change = draw(st.sampled_from(["none", "none", "none", "lost", "trimmed", "mark"]))
            while change == "trimmed" and begin < end and response.text[begin].isspace():
                begin += 1
            if change == "mark":  # with the offset of the character behind it
                offsets.append((begin, min(begin + 1, len(response.text))))
                is_mark.append(True)
            if change != "lost":
                offsets.append((begin, end))
                is_mark.append(False)
        sides.append(offsets or [(0, len(response.text))])
        marks.append(is_mark or [False])
    return response.text, sides, marks


def cleaned_by_hand(text: str, offsets: list[tuple[int, int]], marks: list[bool]) -> list[int]:
    """docs/method.md#offset-cleaning, a token at a time, by painting characters."""
    ends = [end for _, end in offsets]
    for token in range(len(offsets) - 1):
        if marks[token] and offsets[token + 1][0] < ends[token]:
            ends[token] = min(offsets[token][0], offsets[token + 1][0])
    painted = [any(start <= at < end for (start, _), end in zip(offsets, ends, strict=True)) for at in range(len(text))]
    for token, end in enumerate(ends):
        while end < len(text) and not painted[end] and not text[end].isspace():
            end += 1
        ends[token] = end
    return ends


def can_be_cut(ends: list[int], at: int, length: int) -> bool:
    """Whether tokens from the first to some one reach to ``at`` exactly, the last characters counted as reached by the last ones."""
    reach = [max(ends[: token + 1]) for token in range(len(ends))]
    return at in [length if one == reach[-1] else one for one in reach]


@fuzzed
@given(st.lists(reduced(), min_size=1, max_size=4))
def test_spans_of_normalized_texts(rows: list[tuple[str, list[list[tuple[int, int]]], list[list[bool]]]]) -> None:
    """Whatever is lost, every token is in one span, and texts are cut at all positions that both sides reach, and at no other."""
    lengths = np.array([len(text) for text, _, _ in rows])
    all_ends, all_starts = [], []
    for side in range(2):
        tokens = np.array([token for _, sides, _ in rows for token in sides[side]])
        marks = np.array([mark for _, _, sides in rows for mark in sides[side]])
        token_starts = row_starts(np.array([len(sides[side]) for _, sides, _ in rows]))
        texts = [text for text, _, _ in rows]
        all_ends.append(
            clean_ends(tokens[:, 0], tokens[:, 1], token_starts=token_starts, texts=texts, space_only=marks)
        )
        all_starts.append(token_starts)
    batch = align_spans_batch(
        all_ends[0],
        teacher_starts=all_starts[0],
        student_ends=all_ends[1],
        student_starts=all_starts[1],
        lengths=lengths,
    )
    for row, (text, offsets, marks) in enumerate(rows):
        teacher, student = (slice(*starts[row : row + 2]) for starts in all_starts)
        by_hand = [cleaned_by_hand(text, *side) for side in zip(offsets, marks, strict=True)]
        assert [all_ends[0][teacher].tolist(), all_ends[1][student].tolist()] == by_hand
        spans = AlignedSpans(
            batch.boundaries[slice(*batch.span_starts[row : row + 2])],
            batch.teacher_span[teacher],
            batch.student_span[student],
        )
        is_partition(spans, (len(offsets[0]), len(offsets[1])), len(text))
        cuts = [at for at in range(1, len(text) + 1) if all(can_be_cut(ends, at, len(text)) for ends in by_hand)]
        assert spans.boundaries.tolist() == cuts
        for ends, of_side in zip(by_hand, (spans.teacher_span, spans.student_span), strict=True):
            for token, span in enumerate(of_side.tolist()):
                reach = len(text) if max(ends) == max(ends[: token + 1]) else max(ends[: token + 1])
                assert (cuts[span - 1] if span else 0) <= reach <= cuts[span]
                assert reach > (cuts[span - 1] if span else -1), "a token is in the first span that it fits into"
