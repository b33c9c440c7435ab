"""Uncertainty of scores and of differences between systems that answered the same documents: `docs/statistics.md`.

Two sources are kept apart: the documents (a bootstrap over them) and the training seeds (their spread next to it, and
with five or more a t-interval). The bootstrap is conditional on the trained seeds: it says how the difference between
*these* models would move with other documents, not how it would move with other seeds.

Shape legend: S seeds, D documents, K comparisons, N draws.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats holds the same functions, and takes seconds to import

CONFIDENCE = 0.95
DRAWS = 5000
"""The end of a 95 % interval moves by about 1/40 of the interval's width from one set of so many draws to another."""

LEAST_P = 2 / (DRAWS + 1)
"""The smallest p-value that so many draws can show; the true one may be smaller."""

MIN_SEEDS = 5
"""So many seeds make a t-interval over seed means; with fewer it is too wide to say anything (t is 4.3 with three)."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


class Differences(NamedTuple):
    """Differences of K systems to one base: of each column, and of the unweighted mean of the columns.

    ``p_values`` are of the mean, two-sided and not corrected.
    """

    average: tuple[Interval, ...]
    columns: Mapping[str, tuple[Interval, ...]]
    p_values: tuple[float, ...]


class McNemar(NamedTuple):
    """Documents that one system alone has right, those that the base alone has, and the exact p-value of a tie."""

    only_system: int
    only_base: int
    p_value: float


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
    return np.asarray(np.mean(mine, axis=0) - np.mean(theirs, axis=0), dtype=np.float64)


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

    Raises:
        ValueError: a difference is not finite: draws that are NaN would count as none beyond zero.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6, 13 and 15.
    """
    for name, values_DK in differences.items():
        if not np.isfinite(values_DK).all():
            raise ValueError(f"a difference of column '{name}' is not finite")
    means = {name: resampled_means(values_DK, key=name, draws=draws) for name, values_DK in differences.items()}
    values = {name: values_DK.mean(axis=0) for name, values_DK in differences.items()}
    average_NK = _mean(means)
    return Differences(
        average=_intervals(_mean(values), average_NK, confidence),
        columns={name: _intervals(values[name], means[name], confidence) for name in differences},
        p_values=_p_values(average_NK),
    )


def t_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval | None:
    """Student's interval of the mean of one value a seed, or None below ``MIN_SEEDS`` values.

    Reference: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    if len(values) < MIN_SEEDS:
        return None
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = error * float(special.stdtrit(len(values) - 1, (1 + confidence) / 2))
    return Interval(mean, mean - half, mean + half)


def mcnemar(system_D: Floats, base_D: Floats) -> McNemar | None:
    """Exact two-sided McNemar test on the same documents; None unless every score is 0 or 1.

    Of the documents on which the two differ, each has as many as the other in expectation: a binomial test.

    Reference: McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12
    (1947).
    """
    if not all(np.isin(scores, (0.0, 1.0)).all() for scores in (system_D, base_D)):
        return None
    only_system, only_base = int((system_D > base_D).sum()), int((system_D < base_D).sum())
    tail = float(special.bdtr(min(only_system, only_base), only_system + only_base, 0.5))
    return McNemar(only_system, only_base, min(1.0, 2 * tail))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the order given: each may be compared with the level itself.

    Reference: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979).
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _mean(by_column: Mapping[str, Floats]) -> Floats:
    return np.asarray(np.mean(list(by_column.values()), axis=0), dtype=np.float64)


def _intervals(value_K: Floats, draws_NK: Floats, confidence: float) -> tuple[Interval, ...]:
    tail = (1 - confidence) / 2
    low_K, high_K = np.quantile(draws_NK, [tail, 1 - tail], axis=0)
    return tuple(Interval(*map(float, ends)) for ends in zip(value_K, low_K, high_K, strict=True))


def _p_values(draws_NK: Floats) -> tuple[float, ...]:
    """Two-sided: twice the share of draws on the other side of zero, never below what so many draws can show."""
    num_draws = draws_NK.shape[0]
    tails_K = np.minimum((draws_NK <= 0).sum(axis=0), (draws_NK >= 0).sum(axis=0))
    return tuple(min(1.0, float(p)) for p in 2 * (1 + tails_K) / (1 + num_draws))
