"""Uncertainty of scores and of differences between systems that answered the same documents.

Two sources are kept apart: the documents (a bootstrap over them, here) and the training seeds (their spread, beside
it). The bootstrap is conditional on the trained seeds: it says how the difference between *these* models would move
with other documents, not how it would move with other seeds.

Shape legend: S seeds, D documents, K comparisons, N draws.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 5000
"""The end of a 95 % interval moves by about 1/40 of the interval's width from one set of so many draws to another."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


class Differences(NamedTuple):
    """Differences of K systems to one base: of each column, and of the unweighted mean of the columns."""

    average: tuple[Interval, ...]
    columns: Mapping[str, tuple[Interval, ...]]


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), or None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference_per_document(system_SD: Mapping[int | None, Floats], base_SD: Mapping[int | None, Floats]) -> Floats:
    """Difference of two systems on each document, each averaged over its seeds: [D].

    Args:
        system_SD: scores [D] by seed; None for a system that was not trained per seed.
        base_SD: the base's, on the same documents in the same order.

    Where both have seeds, those that both have count; a system without seeds meets all of the other's.

    Raises:
        ValueError: no common seed, or other numbers of documents.
    """
    common = set(system_SD) & set(base_SD)
    seedless = None in system_SD or None in base_SD
    if not common and not seedless:
        raise ValueError("the two systems have no seed in common")
    mine = [scores for seed, scores in system_SD.items() if seedless or seed in common]
    theirs = [scores for seed, scores in base_SD.items() if seedless or seed in common]
    return np.mean(mine, axis=0) - np.mean(theirs, axis=0)


def resampled_means(values_DK: Floats, *, key: str, draws: int = DRAWS) -> Floats:
    """Means over documents, of ``draws`` bootstrap samples of the documents: [N, K].

    All K comparisons see the same resampled documents. ``key`` seeds the draws, so that a result depends neither on
    the order of calls nor on what else is computed.
    """
    num_docs = values_DK.shape[0]
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    means_NK = np.empty((draws, values_DK.shape[1]))
    block = max(1, 4_000_000 // num_docs)  # counts of one block of draws: 32 MB
    for first in range(0, draws, block):
        rows = min(block, draws - first)
        picks = rng.integers(num_docs, size=(rows, num_docs)) + num_docs * np.arange(rows)[:, None]
        counts = np.bincount(picks.ravel(), minlength=rows * num_docs).reshape(rows, num_docs)
        means_NK[first : first + rows] = counts @ values_DK / num_docs
    return means_NK


def bootstrap_differences(
    differences: Mapping[str, Floats], *, draws: int = DRAWS, confidence: float = CONFIDENCE
) -> Differences:
    """Percentile bootstrap intervals, documents resampled within each column, columns independent of each other.

    Args:
        differences: column name to [D, K], the differences per document of K systems to the base. Columns differ in D.
        draws: number of bootstrap samples.
        confidence: probability that an interval should cover the difference.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
    """
    means = {name: resampled_means(values_DK, key=name, draws=draws) for name, values_DK in differences.items()}
    values = {name: values_DK.mean(axis=0) for name, values_DK in differences.items()}
    return Differences(
        average=_intervals(_mean(values), _mean(means), confidence),
        columns={name: _intervals(values[name], means[name], confidence) for name in differences},
    )


def _mean(by_column: Mapping[str, Floats]) -> Floats:
    return np.mean(list(by_column.values()), axis=0)


def _intervals(value_K: Floats, draws_NK: Floats, confidence: float) -> tuple[Interval, ...]:
    tail = (1 - confidence) / 2
    low_K, high_K = np.quantile(draws_NK, [tail, 1 - tail], axis=0)
    return tuple(Interval(*map(float, ends)) for ends in zip(value_K, low_K, high_K, strict=True))
