"""Which token sequences have common beginnings, and how they become few short trees of tokens: no model is needed here.

Two levels. The requests of one document make one row, a tree: their common beginning occurs once, and each token attends
to the tokens before it on its own branch. Rows with a common beginning (few-shot examples) form a group, whose common
tokens are computed once and kept as keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_ROW = 1024
"""Tokens of a row to which further requests may be added: attention of a row is quadratic, other work is not."""

GRAIN = 32
"""Common beginnings of rows are cut to multiples of this: shorter ones save too little."""

GROUP_COST = 512
"""What a group must save, in tokens: its own forward pass, and batches that are not full."""


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence whose last tokens are scored.

    Attributes:
        tokens: context and continuation. The model reads all but the last.
        scored: length of the continuation; at least 1, less than the whole.
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def head(self) -> int:
        """Number of tokens before the first whose logits are needed."""
        return len(self.tokens) - self.scored - 1


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A tree of T tokens, parents before children, without the prefix of its group.

    Attributes:
        tokens: the T tokens.
        positions: of each in its sequence, the prefix counted.
        branches: ``(start, end, parent)``: tokens ``start:end`` follow each other and the token ``parent``, -1 for none.
        readings: ``(request, nodes)``: the tokens whose logits predict the request's continuation, in order.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[tuple[int, int, int], ...]
    readings: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def kept(self) -> int:
        """Tokens from the first whose logits are needed to the end."""
        return len(self.tokens) - min(nodes[0] for _, nodes in self.readings)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that follow one prefix, longest first; the prefix may be empty."""

    prefix: tuple[int, ...]
    rows: tuple[TokenTree, ...]


def plan(requests: Sequence[Request]) -> list[Group]:
    """All requests as groups of rows; requests of one document are expected to be neighbours."""
    members = list(_documents(requests))
    heads = [_head([requests[index] for index in document]) for document in members]
    groups = []
    for length, rows in _groups(heads):
        made = [pack({index: requests[index] for index in members[row]}, skip=length) for row in rows]
        made.sort(key=lambda row: -len(row.tokens))
        groups.append(Group(heads[rows[0]][:length], tuple(made)))
    return groups


def cost(groups: Sequence[Group]) -> int:
    """Tokens that a plan computes."""
    return sum(len(group.prefix) + sum(len(row.tokens) for row in group.rows) for group in groups)


def plain_cost(requests: Sequence[Request]) -> int:
    """Tokens that lm-eval computes: one sequence for requests that differ in their last token only."""
    return sum(map(len, {request.tokens[:-1] for request in requests}))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    differing = np.array(first[:length]) != np.array(second[:length])
    return int(differing.argmax())


def pack(requests: dict[int, Request], *, skip: int) -> TokenTree:
    """One tree of sequences that have their first ``skip`` tokens in common; these are left out."""
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[tuple[int, int, int]] = []
    readings = []
    path: list[int] = []  # the node of each token of the sequence before
    previous: tuple[int, ...] = ()
    for index, request in sorted(requests.items(), key=lambda item: item[1].tokens[:-1]):
        read = request.tokens[skip:-1]
        shared = common(previous, read)
        start, end = len(tokens), len(tokens) + len(read) - shared
        if end > start:
            branches.append((start, end, path[shared - 1] if shared else -1))
        path = path[:shared] + list(range(start, end))
        tokens += read[shared:]
        positions += range(skip + shared, skip + len(read))
        readings.append((index, tuple(path[-request.scored :])))
        previous = read
    return TokenTree(tuple(tokens), tuple(positions), tuple(branches), tuple(readings))


def _documents(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Neighbours with one context, or with one continuation after contexts that begin alike (Winogrande)."""
    document: list[int] = []
    size = 0
    for index, request in enumerate(requests):
        if document:
            first = requests[document[0]]
            shared = common(first.tokens[:-1], request.tokens[:-1])
            added = len(request.tokens) - 1 - shared
            last = requests[document[-1]]
            same = _context(first) == _context(request) or _continuation(last) == _continuation(request)
            if same and shared and size + added <= max(MAX_ROW, 2 * len(first.tokens)):
                document.append(index)
                size += added
                continue
            yield document
        document, size = [index], len(request.tokens) - 1
    if document:
        yield document


def _context(request: Request) -> tuple[int, ...]:
    return request.tokens[: -request.scored]


def _continuation(request: Request) -> tuple[int, ...]:
    return request.tokens[-request.scored :]


def _head(document: Sequence[Request]) -> tuple[int, ...]:
    """What all of a row's sequences begin with, and no logits are needed of."""
    tokens = document[0].tokens
    length = min(min(request.head, common(tokens, request.tokens)) for request in document)
    return tokens[:length]


def _groups(heads: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, list[int]]]:
    """Length of the prefix and the rows of each group; the rows without a prefix are one group, the last."""
    order = sorted(range(len(heads)), key=heads.__getitem__)
    lengths = [0] + [common(heads[one], heads[two]) // GRAIN * GRAIN for one, two in pairwise(order)]
    alone = []
    for length, low, high in _cut(np.array(lengths), 0, len(order))[1]:
        if length:
            yield length, order[low:high]
        else:
            alone += order[low:high]
    if alone:
        yield 0, alone


def _cut(lengths: np.ndarray, low: int, high: int) -> tuple[int, list[tuple[int, int, int]]]:
    """The best cut of sorted rows into groups: saved tokens, and ``(length of prefix, low, high)`` of each group.

    ``lengths[i]`` is what row ``i`` has in common with the one before.
    """
    if high - low <= 1:
        return 0, [(0, low, high)] if high > low else []
    inner = lengths[low + 1 : high]
    shortest = int(inner.min())
    bounds = [low, *(low + 1 + np.flatnonzero(inner == shortest)).tolist(), high]
    parts = [_cut(lengths, a, b) for a, b in pairwise(bounds)]
    apart = sum(saved for saved, _ in parts)
    together = (high - low - 1) * shortest - GROUP_COST
    if together > apart:
        return together, [(shortest, low, high)]
    return apart, [group for _, groups in parts for group in groups]
