"""Tokenize, align and cut one block of pairs: the rows that are trained on (docs/method.md#data-step).

Shapes: N pairs; R = 2N rows, alternately the chosen and the rejected response of a pair; S spans of a row. Ragged arrays
are flat.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd.text.align import BatchedSpans, BoolArray, IntArray, align_spans_batch, row_starts
from ctpd.text.lengths import Cut, Fitted, cut_responses, fit_prompts, tokens_per_span
from ctpd.text.pairs import Dropped, Pair
from ctpd.text.render import Encoded, TemplatedTokenizer
from ctpd.text.templates import DIFFERENCES


@dataclass(frozen=True)
class TokenRows:
    """R rows as one model reads them: prompt, response, end token."""

    input_ids: NDArray[np.int32]  # flat
    row_starts: NDArray[np.int64]  # [R + 1]
    # flat: the span of each token; -1 for the prompt and for text between response and end token
    unit: NDArray[np.int32]


class Block(NamedTuple):
    """The usable pairs of a block. Spans are numbered from 0 in each row; an end span is the last of its row."""

    pairs: list[Pair]  # prompts and responses as cut
    teacher: TokenRows
    student: TokenRows
    num_spans: NDArray[np.int32]  # [R] end span included
    has_end: BoolArray  # [R]
    boundaries: NDArray[np.int32]  # flat: character ends of the spans of the response
    boundary_counts: IntArray  # [R]
    marks: NDArray[np.int8]  # one per boundary: +1 right, -1 wrong, 0 neutral
    dropped: list[Dropped]
    report: Counter[str]


def build_block(
    pairs: Sequence[Pair],
    *,
    sides: tuple[TemplatedTokenizer, TemplatedTokenizer],
    max_tokens: int,
    max_prompt_tokens: int,
    cut_prompts: bool,
    where: str,
) -> Block:
    """Tokenize, align and cut pairs with responses that are not empty and not equal.

    Args:
        pairs: some pairs of one split.
        sides: teacher and student.
        max_tokens: longest row on either side, end token included.
        max_prompt_tokens: limit of the tokens before the response.
        cut_prompts: whether longer prompts are cut; they are dropped if not.
        where: names the split in errors.
    """
    fitted = fit_prompts(pairs, sides=sides, max_prompt_tokens=max_prompt_tokens, cut=cut_prompts, where=where)
    pairs, encoded, num_cut, dropped = _with_tokens(fitted)
    spans = _align(pairs, encoded)
    cut = cut_responses(encoded, spans, max_tokens=max_tokens)
    pairs = _cut_texts(pairs, spans, cut)
    is_empty = np.array([not (pair.chosen and pair.rejected) for pair in pairs], dtype=bool)
    # Two responses that differ only in what was cut off are equal now.
    both_cut = ~cut.has_end.reshape(-1, 2).any(axis=1)
    is_equal = both_cut & np.array([pair.chosen == pair.rejected for pair in pairs], dtype=bool) & ~is_empty
    reasons = {"empty": is_empty, "equal": is_equal}
    dropped = [*dropped, *(Dropped(pairs[i].id, name) for name, at in reasons.items() for i in np.flatnonzero(at))]

    keep_pair = ~(is_empty | is_equal)
    keep = np.repeat(keep_pair, 2)
    kept_spans = np.repeat(keep, np.diff(spans.span_starts)) & _leading(np.diff(spans.span_starts), cut.num_spans)
    boundaries, boundary_counts = spans.boundaries[kept_spans].astype(np.int32), cut.num_spans[keep]
    kept_pairs = [pair for pair, kept in zip(pairs, keep_pair, strict=True) if kept]
    teacher, student = (
        _token_rows(side, span, cut=cut, keep=keep)
        for side, span in zip(encoded, (spans.teacher_span, spans.student_span), strict=True)
    )
    report = _report(encoded, spans, cut, keep=keep, kept_spans=kept_spans)
    report.update(cut_prompts=num_cut, teacher_tokens=teacher.input_ids.size, student_tokens=student.input_ids.size)
    return Block(
        pairs=kept_pairs,
        teacher=teacher,
        student=student,
        num_spans=(cut.num_spans + cut.has_end)[keep].astype(np.int32),
        has_end=cut.has_end[keep],
        boundaries=boundaries,
        boundary_counts=boundary_counts,
        marks=_span_marks(kept_pairs, boundaries, row_starts(boundary_counts)),
        dropped=dropped,
        report=report,
    )


def _with_tokens(fitted: Fitted) -> Fitted:
    """The pairs whose responses have tokens on both sides (docs/method.md#offset-cleaning)."""
    first, second = fitted.encoded
    has_tokens = (first.response_tokens > 0) & (second.response_tokens > 0)
    keep = has_tokens[0::2] & has_tokens[1::2]
    rows = np.repeat(keep, 2)
    pairs = [pair for pair, kept in zip(fitted.pairs, keep, strict=True) if kept]
    without = [Dropped(pair.id, "empty") for pair, kept in zip(fitted.pairs, keep, strict=True) if not kept]
    return Fitted(pairs, (first.select(rows), second.select(rows)), fitted.num_cut, [*fitted.dropped, *without])


def _align(pairs: Sequence[Pair], encoded: tuple[Encoded, Encoded]) -> BatchedSpans:
    return align_spans_batch(
        encoded[0].response_ends,
        teacher_starts=encoded[0].response_starts,
        student_ends=encoded[1].response_ends,
        student_starts=encoded[1].response_starts,
        lengths=np.array([len(text) for pair in pairs for text in (pair.chosen, pair.rejected)], dtype=np.int64),
    )


def _cut_texts(pairs: Sequence[Pair], spans: BatchedSpans, cut: Cut) -> list[Pair]:
    stops = np.append(0, spans.boundaries)[np.where(cut.num_spans > 0, spans.span_starts[:-1] + cut.num_spans, 0)]
    return [
        pair if (len(pair.chosen), len(pair.rejected)) == (chosen, rejected) else pair.cut(chosen, rejected)
        for pair, (chosen, rejected) in zip(pairs, stops.reshape(-1, 2).tolist(), strict=True)
    ]


def _token_rows(side: Encoded, span: IntArray, *, cut: Cut, keep: BoolArray) -> TokenRows:
    """The kept tokens of the kept rows with their spans."""
    lengths = np.diff(side.row_starts)
    in_row = np.arange(side.ids.size) - np.repeat(side.row_starts[:-1], lengths)
    in_prompt = in_row < np.repeat(side.prompt_tokens, lengths)
    unit = np.full(side.ids.size, -1, dtype=np.int64)
    unit[~in_prompt & (in_row < np.repeat(side.prompt_tokens + side.response_tokens, lengths))] = span
    kept = in_prompt | ((unit >= 0) & (unit < np.repeat(cut.num_spans, lengths))) | np.repeat(cut.has_end, lengths)
    unit[side.row_starts[1:][cut.has_end] - 1] = cut.num_spans[cut.has_end]
    kept &= np.repeat(keep, lengths)
    counts = np.bincount(np.repeat(np.arange(lengths.size), lengths)[kept], minlength=lengths.size)
    return TokenRows(side.ids[kept], row_starts(counts[keep]), unit[kept].astype(np.int32))


def _leading(counts: IntArray, num_kept: IntArray) -> BoolArray:
    """The first ``num_kept [R]`` of each row's ``counts [R]`` items, flat."""
    return np.arange(counts.sum()) < np.repeat(row_starts(counts)[:-1] + num_kept, counts)


def _span_marks(pairs: Sequence[Pair], boundaries: NDArray[np.int32], starts: IntArray) -> NDArray[np.int8]:
    """The mark of each span: that of the first marked range that it overlaps, or 0 (docs/method.md#marks)."""
    marks = np.zeros(boundaries.size, dtype=np.int8)
    for row, ranges in enumerate(ranges for pair in pairs for ranges in (pair.chosen_marks, pair.rejected_marks)):
        ends, marks_of_row = boundaries[starts[row] : starts[row + 1]], marks[starts[row] : starts[row + 1]]
        for start, stop, right in reversed(ranges):
            first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
            marks_of_row[first : last + 1] = 1 if right else -1
    return marks


def _report(
    encoded: tuple[Encoded, Encoded], spans: BatchedSpans, cut: Cut, *, keep: BoolArray, kept_spans: BoolArray
) -> Counter[str]:
    teacher, student = (num[kept_spans] for num in tokens_per_span(encoded, spans))
    one_teacher, one_student = teacher == 1, student == 1
    counts = {
        "responses_cut": ~cut.has_end & keep,
        "teacher_crossing_tokens": encoded[0].crossing & keep,
        "student_crossing_tokens": encoded[1].crossing & keep,
        "spans": kept_spans,
        "spans_1_1": one_teacher & one_student,
        "spans_1_n": one_teacher & ~one_student,
        "spans_n_1": ~one_teacher & one_student,
        "spans_n_m": ~one_teacher & ~one_student,
    }
    report = Counter({name: int(np.count_nonzero(flags)) for name, flags in counts.items()})
    report.update(teacher_response_tokens=int(teacher.sum()), student_response_tokens=int(student.sum()))
    for name, side in zip(("teacher", "student"), encoded, strict=True):
        kinds = Counter(side.difference[keep & (side.difference >= 0)].tolist())
        report.update({f"{name}_template_{DIFFERENCES[kind]}": number for kind, number in kinds.items()})
    return report
