"""Training of a Unigram vocabulary (Kudo 2018, arXiv 1804.10959), the same on every machine.

The trainer of the `tokenizers` library gives a different vocabulary in each process (it sums in the order in which threads
finish), and never considers a word that is part of no other word. This trainer is simple because a testbed corpus has only
a few hundred different words.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

MAX_PIECE = 12
"""Longest piece in characters."""
SEEDS_PER_PIECE = 4
"""Number of initial candidates per wanted piece."""
KEPT = 0.75
"""Share of the pieces that survives a round of pruning."""
NUM_EM = 2
"""Rounds of expectation-maximisation before each pruning."""
DECIMALS = 6
"""Decimals of the scores; rounding hides differences in the last bit of a platform's logarithm."""


def train_unigram(words: Mapping[str, int], *, num_pieces: int, always: str) -> list[tuple[str, float]]:
    """At most `num_pieces` pieces with their log-probabilities, the likeliest first.

    Args:
        words: how often each pre-token occurs.
        num_pieces: how many pieces are wanted; at least the number of different characters.
        always: characters that are pieces whether or not they occur.
    """
    singles = sorted({*always, *(char for word in words for char in word)})
    pieces = _seeds(words, singles, num=SEEDS_PER_PIECE * num_pieces)
    while True:
        for _ in range(NUM_EM):
            counts = _expected_counts(words, pieces)
            total = sum(counts.values())
            pieces = {piece: round(math.log(max(counts[piece], 1e-3) / total), DECIMALS) for piece in pieces}
        ranked = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
        if len(ranked) <= num_pieces:
            return [(piece, pieces[piece]) for piece in ranked]
        longer = [piece for piece in ranked if len(piece) > 1]
        room = max(num_pieces - len(singles), int(KEPT * len(longer)))
        kept = {*singles, *longer[:room]}
        pieces = {piece: score for piece, score in pieces.items() if piece in kept}


def _seeds(words: Mapping[str, int], singles: list[str], *, num: int) -> dict[str, float]:
    """All characters, and the substrings that cover most text, scored by how much they cover."""
    covered: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + MAX_PIECE) + 1):
                covered[word[start:end]] += count * (end - start)
    best = sorted(covered, key=lambda piece: (-covered[piece], piece))[:num]
    total = sum(covered[piece] for piece in best) + len(singles)
    return {piece: math.log((covered[piece] or 1) / total) for piece in (*singles, *best)}


def _expected_counts(words: Mapping[str, int], pieces: Mapping[str, float]) -> Mapping[str, float]:
    """How often each piece is expected over all segmentations of the words (forward-backward)."""
    counts: defaultdict[str, float] = defaultdict(float)
    for word, count in sorted(words.items()):
        n = len(word)
        edges = [
            (start, end, math.exp(pieces[word[start:end]]))
            for start in range(n)
            for end in range(start + 1, min(n, start + MAX_PIECE) + 1)
            if word[start:end] in pieces
        ]
        forward, backward = [1.0] + [0.0] * n, [0.0] * n + [1.0]
        for start, end, p in edges:  # ascending starts: forward[start] is complete
            forward[end] += forward[start] * p
        for start, end, p in reversed(edges):
            backward[start] += backward[end] * p
        for start, end, p in edges:
            counts[word[start:end]] += count * forward[start] * p * backward[end] / forward[n]
    return counts
