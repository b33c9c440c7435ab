"""Minimum edit distance between tokens: one response's tokens of two models paired, one vocabulary mapped into another.

Pairing is dynamic time warping as in DSKD's MinED (after FuseLLM), the map of vocabularies as in tokenkit
(BASELINES 5). Distances are Levenshtein's, counted in code points of the tokenizers' own spelling.

Shape legend: T teacher tokens, U student tokens, P patterns, C texts or candidates, L code points of the longest text.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BitArray = NDArray[np.uint64]

SPACE_MARKS = ("\u0120", "\u2581")  # of byte-level BPE, of SentencePiece
_WORD = 64  # the longest pattern that one machine word holds
_UNREACHED = np.int64(2**40)
_FILLER = -1


def edit_distance_pairing(student_tokens: Sequence[str], teacher_tokens: Sequence[str]) -> list[int]:
    """The teacher's token for each of the student's: its index where warping gives exactly one, else -1.

    Costs about 2 ms for 100 x 100 tokens: every pair of distinct spellings is compared once, all of them together.
    Space marks are not compared.

    Args:
        student_tokens: spellings of the tokens at the student's predicting positions, in order.
        teacher_tokens: the same of the teacher.
    """
    if not student_tokens or not teacher_tokens:
        return [-1] * len(student_tokens)
    matches = time_warping(token_distances(teacher_tokens, student_tokens))[0]
    partner, num_partners = [-1] * len(student_tokens), [0] * len(student_tokens)
    for teacher, student in matches:
        partner[student] = teacher
        num_partners[student] += 1
    return [found if num == 1 else -1 for found, num in zip(partner, num_partners, strict=True)]


def time_warping(costs_TU: IntArray) -> tuple[list[tuple[int, int]], IntArray]:
    """The cheapest monotone path through a matrix of costs, with the moves diagonal, down and right.

    Among equal ways back, the diagonal comes before one step back in T, and that before one in U.

    Returns:
        The pairs on the path from (0, 0) to the end, and the accumulated costs ``[T, U]``.
    """
    total_TU = np.empty_like(costs_TU)
    before_U = np.full(costs_TU.shape[1] + 1, _UNREACHED)
    before_U[0] = 0
    for row_U, costs_U in zip(total_TU, costs_TU, strict=True):
        # total[u] = cost[u] + min(entry[u], total[u - 1]), with the sums of costs taken out of the recurrence.
        sums_U = np.cumsum(costs_U)
        entry_U = np.minimum(before_U[1:], before_U[:-1])
        row_U[:] = sums_U + np.minimum.accumulate(entry_U - (sums_U - costs_U))
        before_U = np.concatenate([[_UNREACHED], row_U])
    return _way_back(total_TU.tolist()), total_TU


def _way_back(total: list[list[int]]) -> list[tuple[int, int]]:
    t, u = len(total) - 1, len(total[0]) - 1
    path = [(t, u)]
    while t > 0 and u > 0:
        diagonal, up, left = total[t - 1][u - 1], total[t - 1][u], total[t][u - 1]
        least = min(diagonal, up, left)
        if diagonal == least:
            t, u = t - 1, u - 1
        elif up == least:
            t -= 1
        else:
            u -= 1
        path.append((t, u))
    path += [(t - back, u) for back in range(1, t + 1)] + [(t, u - back) for back in range(1, u + 1)]
    path.reverse()
    return path


def token_distances(teacher_tokens: Sequence[str], student_tokens: Sequence[str]) -> IntArray:
    """Levenshtein distances ``[T, U]`` of tokens without their space marks."""
    teacher, teacher_at = _distinct(teacher_tokens)
    student, student_at = _distinct(student_tokens)
    distances: IntArray = _Texts(student).distances(teacher)[np.ix_(teacher_at, student_at)]
    return distances


def nearest_tokens(tokens: Sequence[str], among: Sequence[str]) -> IntArray:
    """The index in ``among`` of each token's nearest spelling; -1 for the token "", and where ``among`` has none.

    An identical spelling is nearest; else the least Levenshtein distance. Among equals, tokenkit's: the first by
    length, from the shortest for a token shorter than the median of ``among``, else from the longest; of one length
    the first, or the last, in the order of ``among``. Equal spellings count once, where they are first.

    Costs a dictionary look-up for a token that both sides have, and 1 to 3 ms for each other one against 100,000
    candidates: one minute from Qwen 3 to Llama 3.1 (42,000 others), ten from Gemma 3 (197,000), on one core.
    """
    first: dict[str, int] = {}
    for index, token in enumerate(among):
        if token:
            first.setdefault(token, index)
    if not first:
        return np.full(len(tokens), -1, dtype=np.int64)
    candidates = _Candidates(sorted(first, key=len))
    nearest: dict[str, int] = {"": -1}
    for token in tokens:
        if token not in nearest:
            nearest[token] = first[token] if token in first else first[candidates.nearest(token)]
    return np.array([nearest[token] for token in tokens], dtype=np.int64)


class _Texts:
    """Strings laid out for comparison with many others at once (Myers 1999, Hyyro 2003: a column in a few operations)."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.lengths = texts, np.array([len(text) for text in texts], dtype=np.int64)
        self._alphabet = {char: code for code, char in enumerate(sorted(set().union(*texts)))}
        width = int(self.lengths.max(initial=0))
        codes = np.fromiter((self._alphabet[char] for text in texts for char in text), dtype=np.int32)
        self._codes_LC = np.full((width, len(texts)), _FILLER, dtype=np.int32)
        row = np.repeat(np.arange(len(texts)), self.lengths)
        place = np.arange(codes.size) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        self._codes_LC[place, row] = codes

    def distances(self, patterns: Sequence[str], rows: IntArray | None = None) -> IntArray:
        """Levenshtein distances ``[P, C]`` to these rows, or to all."""
        lengths_C = self.lengths if rows is None else self.lengths[rows]
        codes_LC = self._codes_LC[: int(lengths_C.max(initial=0))]
        codes_LC = codes_LC if rows is None else codes_LC[:, rows]
        found_PC = np.empty((len(patterns), lengths_C.size), dtype=np.int64)
        fits = np.array([0 < len(pattern) <= _WORD for pattern in patterns], dtype=bool)
        if fits.any():
            found_PC[fits] = self._in_words(
                [p for p, fit in zip(patterns, fits, strict=True) if fit], codes_LC, lengths_C
            )
        for at in np.flatnonzero(~fits).tolist():
            texts = self.texts if rows is None else [self.texts[row] for row in rows]
            found_PC[at] = [levenshtein(patterns[at], text) for text in texts]
        return found_PC

    def _in_words(self, patterns: Sequence[str], codes_LC: NDArray[np.int32], lengths_C: IntArray) -> IntArray:
        # The last column is that of characters that no text has, and of the filler after a text's end.
        equal_PA: BitArray = np.zeros((len(patterns), len(self._alphabet) + 1), dtype=np.uint64)
        for bits_A, pattern in zip(equal_PA, patterns, strict=True):
            for place, char in enumerate(pattern):
                bits_A[self._alphabet.get(char, _FILLER)] |= np.uint64(1 << place)
        equal_PA[:, _FILLER] = 0
        last_P1 = np.array([[1 << (len(pattern) - 1)] for pattern in patterns], dtype=np.uint64)
        score_PC = np.repeat(np.array([[len(pattern)] for pattern in patterns]), lengths_C.size, axis=1)
        one = np.uint64(1)
        plus_PC = np.full(score_PC.shape, ~np.uint64(0))
        minus_PC = np.zeros_like(plus_PC)
        for column, codes_C in enumerate(codes_LC):
            equal_PC = equal_PA[:, codes_C]
            vertical_PC = equal_PC | minus_PC
            horizontal_PC = (((equal_PC & plus_PC) + plus_PC) ^ plus_PC) | equal_PC
            up_PC = minus_PC | ~(horizontal_PC | plus_PC)
            down_PC = plus_PC & horizontal_PC
            step_PC = ((up_PC & last_P1) != 0).astype(np.int64) - ((down_PC & last_P1) != 0)
            score_PC += np.where(column < lengths_C, step_PC, 0)
            up_PC = (up_PC << one) | one
            plus_PC = (down_PC << one) | ~(vertical_PC | up_PC)
            minus_PC = up_PC & vertical_PC
        return score_PC


class _Candidates:
    """A vocabulary by length, searched for the nearest spelling."""

    def __init__(self, by_length: Sequence[str]) -> None:
        self._texts = _Texts(by_length)
        self._median_length = len(by_length[len(by_length) // 2])
        self._lengths_C = self._texts.lengths.astype(np.int32)
        self._marks_C = np.array([_mark(text) for text in by_length], dtype=np.uint64)

    def nearest(self, token: str) -> str:
        mark = np.uint64(_mark(token))
        # Each edit adds or removes at most one kind of character on either side: a lower bound of the distance.
        bound_C = np.maximum(np.bitwise_count(self._marks_C & ~mark), np.bitwise_count(mark & ~self._marks_C))
        bound_C = np.maximum(bound_C, np.minimum(np.abs(self._lengths_C - len(token)), 255).astype(np.uint8))
        best, rows = np.iinfo(np.int64).max, np.zeros(0, dtype=np.int64)
        for bound in range(int(bound_C.max()) + 1):
            if bound > best:
                break
            found = np.flatnonzero(bound_C == bound)
            if found.size:
                distance_C = self._texts.distances([token], found)[0]
                least = int(distance_C.min())
                if least <= best:
                    nearest = found[distance_C == least]
                    best, rows = least, np.concatenate([rows, nearest]) if least == best else nearest
        shortest_first = len(token) < self._median_length
        return self._texts.texts[int(rows.min() if shortest_first else rows.max())]


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements of single code points that make one string of the other; any length."""
    if not a:
        return len(b)
    equal: dict[str, int] = {}
    for place, char in enumerate(a):
        equal[char] = equal.get(char, 0) | 1 << place
    full, last, score = (1 << len(a)) - 1, 1 << (len(a) - 1), len(a)
    plus, minus = full, 0
    for char in b:
        same = equal.get(char, 0)
        vertical = same | minus
        horizontal = (((same & plus) + plus) ^ plus) | same
        up, down = minus | ~(horizontal | plus) & full, plus & horizontal
        score += bool(up & last) - bool(down & last)
        up = up << 1 | 1
        plus = (down << 1 | ~(vertical | up)) & full
        minus = up & vertical & full
    return score


def _distinct(tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different spellings without space marks, and which one each token has."""
    places: dict[str, int] = {}
    at = []
    for token in tokens:
        for mark in SPACE_MARKS:
            token = token.replace(mark, "")
        at.append(places.setdefault(token, len(places)))
    return list(places), at


def _mark(text: str) -> int:
    """One bit for each kind of character modulo 64."""
    bits = 0
    for char in text:
        bits |= 1 << (ord(char) % 64)
    return bits
