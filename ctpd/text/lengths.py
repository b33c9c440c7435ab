"""Limit lengths: drop or cut prompts, cut responses at a common boundary of both models (docs/method.md#lengths).

Shapes: N pairs; R = 2N rows, alternately the chosen and the rejected response of a pair; S spans of a row.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ctpd.text.align import BatchedSpans, BoolArray, IntArray
from ctpd.text.pairs import Dropped, Message, Pair
from ctpd.text.render import Encoded, TemplatedTokenizer

NEARBY = 16
"""How many longer ends of a prompt are tried beyond the one that a bisection finds."""


class Fitted(NamedTuple):
    """Pairs whose prompts fit, tokenized by both sides."""

    pairs: list[Pair]
    encoded: tuple[Encoded, Encoded]
    num_cut: int  # pairs whose prompt was cut
    dropped: list[Dropped]  # prompts that a template does not render, or that are too long


class Cut(NamedTuple):
    """How much of each row's response is kept."""

    num_spans: IntArray  # [R] kept spans of the response
    has_end: BoolArray  # [R] whether the whole row fits, end token included


def fit_prompts(
    pairs: Sequence[Pair],
    *,
    sides: tuple[TemplatedTokenizer, TemplatedTokenizer],
    max_prompt_tokens: int,
    cut: bool,
    where: str,
) -> Fitted:
    """Tokenize the pairs whose prompt has at most ``max_prompt_tokens`` tokens on both sides.

    With ``cut`` a longer prompt loses characters from the *start* of its last user message, so that the question at its
    end stays: what is left is the longest end that fits and begins at a word, or, if no word fits, the longest that
    fits; it is rendered again for both sides. A prompt that does not fit with one character of that message left, or
    without ``cut`` does not fit, is left out, as is a prompt that one of the templates does not render.
    """
    pairs, dropped = _rendered(pairs, sides=sides, where=where)
    budgets = np.full(len(pairs), max_prompt_tokens)
    current: list[Pair | None] = list(pairs)
    if cut:
        current = _shorten(pairs, budgets, sides=sides, where=where)
    while True:
        index = np.array([i for i, pair in enumerate(current) if pair is not None], dtype=np.int64)
        left = [pair for pair in current if pair is not None]
        encoded = (_encode(sides[0], left, where=where), _encode(sides[1], left, where=where))
        longest = np.maximum(encoded[0].prompt_tokens, encoded[1].prompt_tokens).reshape(-1, 2).max(axis=1, initial=0)
        excess: IntArray = longest - max_prompt_tokens
        if not cut or (excess <= 0).all():
            break
        # Before a response, a prompt may have more tokens than alone. Lower the budget of such pairs and try again.
        budgets[index] -= np.maximum(excess, 0)
        again = index[excess > 0]
        shorter = _shorten([pairs[i] for i in again], budgets[again], sides=sides, where=where)
        for i, pair in zip(again, shorter, strict=True):
            current[i] = pair
    keep = excess <= 0
    rows = np.repeat(keep, 2)
    fitting = set(index[keep].tolist())
    return Fitted(
        pairs=[pair for pair, kept in zip(left, keep, strict=True) if kept],
        encoded=(encoded[0].select(rows), encoded[1].select(rows)),
        num_cut=sum(left[i] is not pairs[index[i]] for i in np.flatnonzero(keep)),
        dropped=[*dropped, *(Dropped(pair.id, "long_prompt") for i, pair in enumerate(pairs) if i not in fitting)],
    )


def cut_responses(encoded: tuple[Encoded, Encoded], spans: BatchedSpans, *, max_tokens: int) -> Cut:
    """Keep rows of at most ``max_tokens`` tokens on both sides whole; cut others after the last span that fits.

    A cut row has no end token, so none is counted. A cut row may have no span left.
    """
    counts = np.diff(spans.span_starts)
    fits = np.ones(spans.boundaries.size, dtype=bool)
    fits_whole = np.ones(counts.size, dtype=bool)
    for side, num_tokens in zip(encoded, tokens_per_span(encoded, spans), strict=True):
        # The tokens of a row up to and including a span: a cumulative sum that restarts in each row.
        up_to = np.cumsum(num_tokens) - np.repeat(side.response_starts[:-1], counts)
        fits &= up_to + np.repeat(side.prompt_tokens, counts) <= max_tokens
        fits_whole &= np.diff(side.row_starts) <= max_tokens
    rows = np.repeat(np.arange(counts.size), counts)
    return Cut(np.where(fits_whole, counts, np.bincount(rows[fits], minlength=counts.size)), fits_whole)


def tokens_per_span(encoded: tuple[Encoded, Encoded], spans: BatchedSpans) -> tuple[IntArray, IntArray]:
    """``[sum S]`` number of tokens of each span, of the teacher and of the student."""
    first, second = (
        np.bincount(span + np.repeat(spans.span_starts[:-1], side.response_tokens), minlength=spans.boundaries.size)
        for side, span in zip(encoded, (spans.teacher_span, spans.student_span), strict=True)
    )
    return first, second


def _rendered(
    pairs: Sequence[Pair], *, sides: tuple[TemplatedTokenizer, TemplatedTokenizer], where: str
) -> tuple[list[Pair], list[Dropped]]:
    """The pairs whose prompts both templates render, and the others with the reason."""
    names, prompts = _names(pairs, where), [pair.prompt for pair in pairs]
    refusals = zip(*(side.refused(prompts, where=names) for side in sides), strict=True)
    found = [next((one for one in both if one is not None), None) for both in refusals]
    kept = [pair for pair, why in zip(pairs, found, strict=True) if why is None]
    return kept, [
        Dropped(pair.id, one.reason, one.why) for pair, one in zip(pairs, found, strict=True) if one is not None
    ]


def _encode(side: TemplatedTokenizer, pairs: Sequence[Pair], *, where: str) -> Encoded:
    names = _names(pairs, where)
    frames = side.frames([pair.prompt for pair in pairs], where=names)
    return side.encode(
        [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)],
        frames=[frame for frame in frames for _ in range(2)],
        where=[name for name in names for _ in range(2)],
    )


def _shorten(
    pairs: Sequence[Pair], budgets: IntArray, *, sides: tuple[TemplatedTokenizer, TemplatedTokenizer], where: str
) -> list[Pair | None]:
    """Each pair with the longest last user message that fits its budget on both sides, or None if none fits.

    Of ends that begin at a word the longest, and only where none fits, of all ends.
    """

    def fit(tried: Sequence[tuple[int, int]]) -> BoolArray:
        """Whether each ``(pair, first character)`` fits."""
        shorter = [_shortened(pairs[i], start) for i, start in tried]
        names = _names(shorter, where)
        prompts = [pair.prompt for pair in shorter]
        num_tokens = np.maximum(*(side.prompt_tokens(side.frames(prompts, where=names)) for side in sides))
        fits: BoolArray = num_tokens <= budgets[[i for i, _ in tried]]
        return fits

    messages = [pair.prompt[-1].content for pair in pairs]
    whole = fit([(i, 0) for i in range(len(pairs))]) if pairs else np.zeros(0, dtype=bool)
    found: list[int | None] = [0 if fits else None for fits in whole]
    for starts in (word_starts, lambda text: list(range(len(text)))):
        left = [i for i, start in enumerate(found) if start is None]
        for i, start in zip(left, _first_fitting([starts(messages[i]) for i in left], left, fit), strict=True):
            found[i] = start
    return [None if start is None else _shortened(pair, start) for pair, start in zip(pairs, found, strict=True)]


def _first_fitting(
    starts: Sequence[Sequence[int]], rows: Sequence[int], fit: Callable[[Sequence[tuple[int, int]]], BoolArray]
) -> list[int | None]:
    """Of each row the first of its ascending starts that fits, or None; for all rows at once.

    A bisection, and then the `NEARBY` starts before what it found: a shorter text may have more tokens, since it is
    cut into others where it begins, but only by a few.
    """
    fitting, too_long = [len(of_row) for of_row in starts], [-1] * len(starts)
    while active := [k for k in range(len(starts)) if fitting[k] - too_long[k] > 1]:
        trial = [(k, (fitting[k] + too_long[k]) // 2) for k in active]
        for (k, i), fits in zip(trial, fit([(rows[k], starts[k][i]) for k, i in trial]), strict=True):
            (fitting if fits else too_long)[k] = i
    nearby = [(k, i) for k in range(len(starts)) for i in range(max(0, fitting[k] - NEARBY), fitting[k])]
    if nearby:
        fit_nearby = fit([(rows[k], starts[k][i]) for k, i in nearby]).tolist()
        for (k, i), fits in zip(reversed(nearby), reversed(fit_nearby), strict=True):  # the longest last
            fitting[k] = i if fits else fitting[k]
    return [of_row[i] if i < len(of_row) else None for of_row, i in zip(starts, fitting, strict=True)]


def word_starts(text: str) -> list[int]:
    """Where an end of the text begins at a word, ascending: at its first character, or at the white space before it.

    Words are parted by white space. Wide characters, as in Chinese and Japanese, which writes none, are words each.
    """
    wide = [unicodedata.east_asian_width(character) in "WF" for character in text]
    begins = [
        not text[i].isspace() and (i == 0 or text[i - 1].isspace() or wide[i] or wide[i - 1]) for i in range(len(text))
    ]
    return [i for i in range(len(text)) if begins[i] or (text[i].isspace() and i + 1 < len(text) and begins[i + 1])]


def _shortened(pair: Pair, start: int) -> Pair:
    """The pair with its last user message from the character ``start`` on."""
    *before, last = pair.prompt
    if start == 0:
        return pair
    return replace(pair, prompt=(*before, Message(last.role, last.content[start:])))


def _names(pairs: Sequence[Pair], where: str) -> list[str]:
    return [f"{where}, pair {pair.id}" for pair in pairs]
