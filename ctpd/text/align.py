"""Aligned span projection: the finest partition of a response that two tokenizations share (docs/method.md#offset-cleaning, docs/method.md#aligned-spans).

Shapes: R rows (responses), T teacher tokens, U student tokens, N tokens of either side, S spans. Ragged arrays are
flat, row r in ``[starts[r], starts[r + 1])``. Offsets are half-open ranges of characters (code points) of the response.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctpd.core.errors import UserError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# U+3000 is the last white space character of Unicode; the last entry stands for all later code points.
_WHITE_SPACE: BoolArray = np.array([chr(point).isspace() for point in range(0x3001)] + [False])


class AlignedSpans(NamedTuple):
    """The spans of one response."""

    boundaries: IntArray  # [S] character end of each span; the last one is the response's length
    teacher_span: IntArray  # [T] span of each teacher token
    student_span: IntArray  # [U] span of each student token


class BatchedSpans(NamedTuple):
    """The spans of R responses, flat; the span ids of a row begin at 0."""

    boundaries: IntArray  # [sum S]
    span_starts: IntArray  # [R + 1]
    teacher_span: IntArray  # [sum T]
    student_span: IntArray  # [sum U]


def align_spans(teacher_offsets: ArrayLike, student_offsets: ArrayLike, length: int) -> AlignedSpans:
    """Project two tokenizations of one response onto the spans that they share (docs/method.md#aligned-spans).

    Args:
        teacher_offsets: cleaned offsets ``[T, 2]`` of the teacher's tokens, in token order, relative to the response
            (`clean_offsets`).
        student_offsets: the same of the student's tokens, ``[U, 2]``.
        length: number of characters of the response.

    Returns:
        Every token of both sides is in exactly one span; spans are contiguous and in order, have at least one token on
        each side, and cannot be split further.

    Raises:
        UserError: a side has no tokens, the response is empty, or an offset lies outside ``[0, length]``.
    """
    ends = [_ends(offsets, side=side) for offsets, side in ((teacher_offsets, "teacher"), (student_offsets, "student"))]
    batch = align_spans_batch(
        ends[0],
        teacher_starts=np.array([0, ends[0].size]),
        student_ends=ends[1],
        student_starts=np.array([0, ends[1].size]),
        lengths=np.array([length]),
    )
    return AlignedSpans(batch.boundaries, batch.teacher_span, batch.student_span)


def align_spans_batch(
    teacher_ends: IntArray,
    *,
    teacher_starts: IntArray,
    student_ends: IntArray,
    student_starts: IntArray,
    lengths: IntArray,
) -> BatchedSpans:
    """`align_spans` of R responses at once, from the ends of the cleaned offsets alone (docs/method.md#aligned-spans, steps 1 to 3).

    Args:
        teacher_ends: ``[sum T]`` end of each teacher token.
        teacher_starts: ``[R + 1]`` where each row's tokens begin in ``teacher_ends``.
        student_ends: ``[sum U]``.
        student_starts: ``[R + 1]``.
        lengths: ``[R]`` characters of each response, each at least 1.

    Raises:
        UserError: as `align_spans`, naming the row.
    """
    _check_rows(teacher_ends, teacher_starts, lengths, side="teacher")
    _check_rows(student_ends, student_starts, lengths, side="student")
    # Row r owns the positions [bases[r], bases[r] + lengths[r]] of one concatenated text, so that all rows are aligned
    # at once.
    bases = row_starts(lengths + 1)
    teacher_at = _positions(teacher_ends, teacher_starts, lengths, bases)
    student_at = _positions(student_ends, student_starts, lengths, bases)
    common = np.zeros(bases[-1], dtype=bool)
    common[teacher_at] = True
    on_student = np.zeros_like(common)
    on_student[student_at] = True
    common &= on_student
    common[bases[:-1]] = False  # a boundary at 0 would close an empty span
    boundaries_at = np.flatnonzero(common)
    # The number of common boundaries before a position is the index of the first one at or after it.
    num_before = np.cumsum(common) - common
    span_starts = np.append(num_before[bases[:-1]], boundaries_at.size)
    return BatchedSpans(
        boundaries=boundaries_at - np.repeat(bases[:-1], np.diff(span_starts)),
        span_starts=span_starts,
        teacher_span=num_before[teacher_at] - np.repeat(span_starts[:-1], np.diff(teacher_starts)),
        student_span=num_before[student_at] - np.repeat(span_starts[:-1], np.diff(student_starts)),
    )


def clean_offsets(offsets: ArrayLike, text: str, *, space_only: ArrayLike | None = None) -> IntArray:
    """Clean the offsets of one response (docs/method.md#offset-cleaning); `clean_ends` says how.

    Args:
        offsets: ``[N, 2]`` a tokenizer's offsets relative to the response ``text``; parts outside of it are clipped.
        text: the response.
        space_only: ``[N]`` whether a token is only the tokenizer's mark for a space; default: none.

    Returns:
        ``[N, 2]`` cleaned offsets.
    """
    pairs = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    marks = np.zeros(len(pairs), dtype=bool) if space_only is None else np.asarray(space_only, dtype=bool)
    starts = np.clip(pairs[:, 0], 0, len(text))
    ends = clean_ends(starts, pairs[:, 1], token_starts=np.array([0, len(pairs)]), texts=[text], space_only=marks)
    return np.stack([np.minimum(starts, ends), ends], axis=1)


def clean_ends(
    starts: IntArray, ends: IntArray, *, token_starts: IntArray, texts: Sequence[str], space_only: BoolArray
) -> IntArray:
    """The cleaned ends of the tokens of R responses (docs/method.md#offset-cleaning).

    The alignment needs no starts, so only ends are returned.

    - Offsets are clipped to the response.
    - A token for a prefix space that the tokenizer inserted ends where it starts. It is a space mark whose characters the
      next token covers too, since tokenizers give the inserted prefix the offset of the character after it.
    - An end moves over the characters that follow it as long as no token of this side covers them and they are not
      white space. Such characters were removed by a normalizer, or composed with the one before (combining marks).

    Args:
        starts: ``[sum N]`` start of each token relative to its response.
        ends: ``[sum N]``.
        token_starts: ``[R + 1]``.
        texts: the R responses.
        space_only: ``[sum N]`` see `clean_offsets`.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    counts = np.diff(token_starts)
    limits, bases = np.repeat(lengths, counts), row_starts(lengths + 1)
    starts, ends = np.clip(starts, 0, limits), np.clip(ends, 0, limits)
    next_starts = np.append(starts[1:], 0)
    next_starts[token_starts[1:][counts > 0] - 1] = np.iinfo(np.int64).max
    ends = np.where(space_only & (next_starts < ends), np.minimum(starts, next_starts), ends)

    # Nearly every end is the start of another token, or before white space. Only rows with other ends need `_extended`.
    at, line = ends + np.repeat(bases[:-1], counts), _code_points(texts)
    begun = np.zeros(line.size, dtype=bool)
    begun[(at - ends + starts)[starts < ends]] = True
    open_ends = np.flatnonzero(~begun[at])
    open_ends = open_ends[~_is_white(line[at[open_ends]])]
    rows = np.unique(np.searchsorted(token_starts, open_ends, side="right") - 1)
    if rows.size:
        chosen = np.zeros(counts.size, dtype=bool)
        chosen[rows] = True
        tokens = np.repeat(chosen, counts)
        ends[tokens] = _extended(starts[tokens], ends[tokens], counts[rows], [texts[row] for row in rows])
    return ends


def _extended(starts: IntArray, ends: IntArray, counts: IntArray, texts: Sequence[str]) -> IntArray:
    """Move each end over characters that no token covers, up to white space; ``counts`` are the rows' numbers of tokens."""
    bases = row_starts(np.array([len(text) + 1 for text in texts]))
    token_bases, size = np.repeat(bases[:-1], counts), int(bases[-1])
    opened = np.bincount(np.minimum(starts, ends) + token_bases, minlength=size)
    covered = np.cumsum(opened - np.bincount(ends + token_bases, minlength=size)) > 0
    stops = covered | _is_white(_code_points(texts))
    positions = np.where(stops, np.arange(size), size)
    next_stop = np.minimum.accumulate(positions[::-1])[::-1]
    extended: IntArray = next_stop[ends + token_bases] - token_bases
    return extended


def row_starts(counts: IntArray) -> IntArray:
    """Where each row begins in a flat array, given the rows' counts: ``[R] -> [R + 1]``."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])


def _code_points(texts: Sequence[str]) -> NDArray[np.uint32]:
    """The code points of all texts, each followed by a line feed, where every end stops."""
    return np.frombuffer("".join(f"{text}\n" for text in texts).encode("utf-32-le"), dtype=np.uint32)


def _is_white(points: NDArray[np.uint32]) -> BoolArray:
    return _WHITE_SPACE[np.minimum(points, _WHITE_SPACE.size - 1)]


def _positions(ends: IntArray, starts: IntArray, lengths: IntArray, bases: IntArray) -> IntArray:
    """Monotone ends, each row's last one moved to the row's length, as positions in the
    concatenated text (docs/method.md#aligned-spans, step 1)."""
    counts = np.diff(starts)
    # The positions of a row are greater than those of the rows before, so maxima do not cross rows.
    positions = np.maximum.accumulate(ends + np.repeat(bases[:-1], counts))
    is_last = positions == np.repeat(positions[starts[1:] - 1], counts)
    return np.where(is_last, np.repeat(bases[:-1] + lengths, counts), positions)


def _ends(offsets: ArrayLike, *, side: str) -> IntArray:
    pairs = np.asarray(offsets)
    if pairs.size and (pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer)):
        raise UserError(
            f"the {side}'s offsets have shape {pairs.shape} and type {pairs.dtype}",
            where="align_spans",
            fix="Give one pair of integers (start, end) for each token",
        )
    return pairs.reshape(-1, 2)[:, 1].astype(np.int64)


def _check_rows(ends: IntArray, starts: IntArray, lengths: IntArray, *, side: str) -> None:
    counts = np.diff(starts)
    outside = (ends < 0) | (ends > np.repeat(lengths, counts))
    has_outside = np.bincount(np.repeat(np.arange(counts.size), counts)[outside], minlength=counts.size) > 0
    for bad, what in (
        (lengths < 1, "the response is empty"),
        (counts < 1, f"the {side}'s tokenizer gives no token"),
        (has_outside, f"an offset of the {side} lies outside of the response"),
    ):
        if bad.any():
            raise UserError(
                what,
                where=f"align_spans, row {int(np.argmax(bad))}",
                fix="Drop such a response, or clean the offsets with `ctpd.text.align.clean_offsets`",
            )
