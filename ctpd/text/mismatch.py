"""Compare how two tokenizers split the same texts: tokens without a template, aligned spans, span types and tokens per span (docs/method.md#aligned-spans).

Shapes: R texts, N tokens of one side, S spans. Ragged arrays are flat, text r in ``[starts[r], starts[r + 1])``.
The teacher's tokens come first: type ``1:n`` is one teacher token over several student tokens.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd.text.align import BatchedSpans, IntArray, align_spans_batch, clean_ends, row_starts
from ctpd.text.render import space_mark_ids
from ctpd.text.templates import FastTokenizer

SPAN_TYPES = ("1:1", "1:n", "n:1", "n:m")


class Tokenized(NamedTuple):
    """R texts tokenized without template and special tokens."""

    ids: NDArray[np.int64]  # [sum N]
    offsets: IntArray  # [sum N, 2] as the tokenizer gives them
    starts: IntArray  # [R + 1]
    ends: IntArray  # [sum N] cleaned character ends (docs/method.md#offset-cleaning)


class AlignedTexts(NamedTuple):
    """The texts for which both sides have tokens, and their spans."""

    texts: list[str]
    teacher: Tokenized
    student: Tokenized
    spans: BatchedSpans
    num_skipped: int  # texts that are empty, or without tokens on a side

    @property
    def tokens_per_span(self) -> tuple[IntArray, IntArray]:
        """``[sum S]`` number of tokens of each span, of the teacher and of the student."""
        teacher, student = (
            np.bincount(
                span + np.repeat(self.spans.span_starts[:-1], np.diff(side.starts)),
                minlength=self.spans.boundaries.size,
            )
            for side, span in ((self.teacher, self.spans.teacher_span), (self.student, self.spans.student_span))
        )
        return teacher, student

    @property
    def span_types(self) -> NDArray[np.int64]:
        """``[sum S]`` index in `SPAN_TYPES` of each span."""
        return span_types(*self.tokens_per_span)


def span_types(teacher: IntArray, student: IntArray) -> NDArray[np.int64]:
    """``[S]`` index in `SPAN_TYPES`, from the numbers of tokens ``[S]`` of each span on both sides."""
    return 2 * (teacher > 1).astype(np.int64) + (student > 1)


def tokenize_bare(tokenizer: FastTokenizer, texts: Sequence[str]) -> Tokenized:
    """Tokenize texts without template and special tokens, and clean the ends of the offsets.

    Args:
        tokenizer: a fast tokenizer.
        texts: R texts, which may be empty.
    """
    output = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    counts = np.fromiter(map(len, output["input_ids"]), dtype=np.int64, count=len(texts))
    size = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(output["input_ids"]), dtype=np.int64, count=size)
    pairs = chain.from_iterable(chain.from_iterable(output["offset_mapping"]))
    offsets = np.fromiter(pairs, dtype=np.int64, count=2 * size).reshape(size, 2)
    starts = row_starts(counts)
    marks = np.isin(ids, space_mark_ids(tokenizer))
    ends = clean_ends(offsets[:, 0], offsets[:, 1], token_starts=starts, texts=texts, space_only=marks)
    return Tokenized(ids, offsets, starts, ends)


def align_texts(texts: Sequence[str], *, teacher: FastTokenizer, student: FastTokenizer) -> AlignedTexts:
    """Tokenize texts with both sides and project them onto the spans that they share (docs/method.md#aligned-spans)."""
    sides = (tokenize_bare(teacher, texts), tokenize_bare(student, texts))
    keep = (np.diff(sides[0].starts) > 0) & (np.diff(sides[1].starts) > 0)
    kept = [text for text, kept in zip(texts, keep, strict=True) if kept]
    first, second = (_select(side, keep) for side in sides)
    spans = align_spans_batch(
        first.ends,
        teacher_starts=first.starts,
        student_ends=second.ends,
        student_starts=second.starts,
        lengths=np.array([len(text) for text in kept], dtype=np.int64),
    )
    return AlignedTexts(kept, first, second, spans, len(texts) - len(kept))


def span_tokens(side: Tokenized, span: IntArray, span_starts: IntArray) -> list[tuple[int, int]]:
    """The half-open range of each span's tokens in a side's flat arrays, for all spans of all texts.

    Args:
        side: the tokens.
        span: ``[sum N]`` the span of each token, counted from 0 in each text.
        span_starts: ``[R + 1]``.
    """
    in_line = span + np.repeat(span_starts[:-1], np.diff(side.starts))
    return list(pairwise(np.searchsorted(in_line, np.arange(int(span_starts[-1]) + 1)).tolist()))


def mismatch_counts(aligned: AlignedTexts) -> Counter[str]:
    """Counts, which can be added over blocks of texts: texts, characters (of them covered by spans), tokens, spans, span types."""
    lasts = aligned.spans.span_starts[1:] - 1
    types = np.bincount(aligned.span_types, minlength=len(SPAN_TYPES))
    counts = Counter(
        texts=len(aligned.texts),
        skipped=aligned.num_skipped,
        characters=sum(map(len, aligned.texts)),
        covered=int(aligned.spans.boundaries[lasts].sum()),
        spans=aligned.spans.boundaries.size,
        teacher_tokens=aligned.teacher.ids.size,
        student_tokens=aligned.student.ids.size,
    )
    counts.update(dict(zip(SPAN_TYPES, types.tolist(), strict=True)))
    return counts


def span_sizes(aligned: AlignedTexts) -> tuple[Counter[int], Counter[int]]:
    """Number of tokens of a span -> number of spans, of the teacher and of the student."""
    teacher, student = (
        Counter(dict(zip(*(part.tolist() for part in np.unique(sizes, return_counts=True)), strict=True)))
        for sizes in aligned.tokens_per_span
    )
    return teacher, student


def _select(side: Tokenized, keep: NDArray[np.bool_]) -> Tokenized:
    counts = np.diff(side.starts)
    tokens = np.repeat(keep, counts)
    return Tokenized(side.ids[tokens], side.offsets[tokens], row_starts(counts[keep]), side.ends[tokens])
