"""Uncertainty of scores and of differences between systems that answered the same documents: `docs/statistics.md`.

A difference has two sources of chance, the training seeds and the documents, and its interval covers both: a crossed
bootstrap resamples the documents' effects and draws the seeds' effects, each with the variance that a two-way analysis of
variance finds for it. The same bootstrap without seeds says how the difference between *these* models would move with
other documents.

Shape legend: S seeds, D documents, K comparisons, Q quantities (the columns, and last the Average), N draws.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats holds the same functions, and takes seconds to import

CONFIDENCE = 0.95
DRAWS = 10_000
"""The end of a 95 % interval moves by about 1/50 of the interval's width from one set of so many draws to another."""

LEAST_P = 2 / (DRAWS + 1)
"""The smallest p-value that so many draws can show; the true one may be smaller."""

FEW_SEEDS = 5
"""With fewer seeds an interval is wide because the spread between trainings is hardly known (t is 4.3 with three)."""

BLOCK = 500
"""Draws that are in memory at once: with 15,000 documents their counts take 60 MB."""

Floats = NDArray[np.float64]
Scores = Mapping[str, Mapping[int | None, Floats]]
"""Scores [D] of one system, by column and seed; the seed is None for a system that is not trained per seed."""


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """Differences of one system to another on the same documents: by column [S, D], a line for each of ``seeds``.

    ``seeds`` is (None,) where neither of the two is trained per seed.
    """

    seeds: tuple[int | None, ...]
    columns: Mapping[str, Floats]

    @property
    def has_one_training(self) -> bool:
        """Whether a single training stands for its method: nothing is known of the chance of another one."""
        return len(self.seeds) == 1 and self.seeds[0] is not None

    def given_seeds(self) -> "Paired":
        """The same for these models as trained: averaged over seeds, whose chance is left out."""
        return Paired((None,), {name: values.mean(axis=0, keepdims=True) for name, values in self.columns.items()})


class Differences(NamedTuple):
    """Differences of K comparisons: of each column, and of the unweighted mean of the columns.

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


class _Components(NamedTuple):
    """What a two-way analysis of variance finds in the differences of one comparison in one column.

    Attributes:
        mean: the difference.
        seeds_S: how far each seed's mean lies from it.
        documents_D: how far each document's mean lies from it, scaled to the variance of the documents alone.
        noise: the variance that the difference owes to the answers of single seeds to single documents.
    """

    mean: float
    seeds_S: Floats
    documents_D: Floats
    noise: float


class _Seeds(NamedTuple):
    """What draws the seeds' part of each quantity: see ``_seed_draws``."""

    normal_NS: Floats
    chi_NK: Floats
    weights_QSK: Floats
    least_QK: Floats


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), or None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(system: Scores, base: Scores) -> Paired | None:
    """Differences of two systems on each document, or None where they have no seed with all columns in common.

    A system without seeds meets each of the other's. Scores of a column are of the same documents in the same order.
    """
    left, right = _seeds_of(system), _seeds_of(base)
    common = right if None in left else left if None in right else left & right
    if not common or not left or not right:
        return None
    seeds = sorted(common, key=lambda seed: (seed is not None, seed))

    def rows(scores: Mapping[int | None, Floats]) -> Floats:
        return np.stack([scores[None] if None in scores else scores[seed] for seed in seeds])

    return Paired(tuple(seeds), {name: rows(system[name]) - rows(base[name]) for name in system})


def _seeds_of(scores: Scores) -> set[int | None]:
    return set.intersection(*(set(by_seed) for by_seed in scores.values())) if scores else set()


def crossed_bootstrap(pairs: Sequence[Paired], *, draws: int = DRAWS, confidence: float = CONFIDENCE) -> Differences:
    """Intervals of differences over training seeds and documents, as ``docs/statistics.md#the-interval`` derives them.

    Each draw is the difference plus the mean of resampled document effects, plus the sum of the seeds' effects times
    random weights. All comparisons see the same documents and the same weights of a seed, and what is drawn depends on the
    names of columns and seeds alone: an interval is the same whatever else is computed. Columns are independent in their
    documents, and share the seeds. Of one seed, or none, the interval is over documents alone.

    Args:
        pairs: one per comparison, all with the same columns and documents; columns differ in D.
        draws: number of bootstrap samples.
        confidence: probability that an interval should cover the difference.

    Raises:
        ValueError: a difference is not finite: draws that are NaN would count as none beyond zero.

    Reference: Owen and Eckles, Bootstrapping data arrays of arbitrary order, Annals of Applied Statistics 6 (2012).
    """
    names = list(pairs[0].columns)
    value_QK, blocks = _draws(pairs, names, draws=draws)
    draws_QNK = np.concatenate(list(blocks), axis=1)
    intervals = [
        _intervals(value_K, draws_NK, confidence) for value_K, draws_NK in zip(value_QK, draws_QNK, strict=True)
    ]
    tails_K = np.minimum((draws_QNK[-1] <= 0).sum(axis=0), (draws_QNK[-1] >= 0).sum(axis=0))
    return Differences(
        average=intervals[-1],
        columns=dict(zip(names, intervals[:-1], strict=True)),
        p_values=tuple(map(float, _two_sided(tails_K, draws))),
    )


def crossed_p_values(pairs: Sequence[Paired], *, draws: int = DRAWS) -> tuple[Floats, Floats]:
    """Differences [Q, K] and their p-values [Q, K], two-sided and not corrected, from the draws of ``crossed_bootstrap``.

    For many comparisons: no more than a block of draws is in memory.
    """
    value_QK, blocks = _draws(pairs, list(pairs[0].columns), draws=draws)
    below_QK, above_QK = (np.zeros(value_QK.shape, dtype=np.int64) for _ in range(2))
    for block_QNK in blocks:
        below_QK += (block_QNK <= 0).sum(axis=1)
        above_QK += (block_QNK >= 0).sum(axis=1)
    return value_QK, _two_sided(np.minimum(below_QK, above_QK), draws)


def _draws(pairs: Sequence[Paired], names: Sequence[str], *, draws: int) -> tuple[Floats, Iterator[Floats]]:
    """The differences [Q, K], and their draws in blocks [Q, n, K]."""
    for name in names:
        if not all(np.isfinite(pair.columns[name]).all() for pair in pairs):
            raise ValueError(f"a difference of column '{name}' is not finite")
    found = [[_components(pair.columns[name]) for pair in pairs] for name in names]
    value_QK = _with_mean(np.array([[one.mean for one in column] for column in found]))
    documents = [np.stack([one.documents_D for one in column], axis=1) for column in found]
    seeds = _seeds(pairs, found, draws)
    return value_QK, _blocks(value_QK, dict(zip(names, documents, strict=True)), seeds, draws)


def _blocks(value_QK: Floats, documents_DK: Mapping[str, Floats], seeds: _Seeds | None, draws: int) -> Iterator[Floats]:
    generators = [_generator(f"column {name}") for name in documents_DK]
    for first in range(0, draws, BLOCK):
        size = min(BLOCK, draws - first)
        means = zip(generators, documents_DK.values(), strict=True)
        block_QNK = _with_mean(np.stack([_resampled_means(rng, values_DK, size) for rng, values_DK in means]))
        block_QNK += value_QK[:, None]
        if seeds is not None:
            block_QNK += _seed_draws(seeds, slice(first, first + size))
        yield block_QNK


def _components(values_SD: Floats) -> _Components:
    """The two-way analysis of variance. Of one seed the documents keep all of their variance, noise included."""
    num_seeds, num_docs = values_SD.shape
    mean = values_SD.mean()
    seeds_S, documents_D = values_SD.mean(axis=1) - mean, values_SD.mean(axis=0) - mean
    squares = float(documents_D @ documents_D)
    if num_seeds < 2 or num_docs < 2 or not squares:
        return _Components(float(mean), seeds_S, documents_D, 0.0)
    residuals_SD = values_SD - mean - seeds_S[:, None] - documents_D
    noise = float(np.vdot(residuals_SD, residuals_SD)) / ((num_seeds - 1) * (num_docs - 1)) / values_SD.size
    # Means of documents scatter by what documents do and by the noise; the seeds' means hold the noise already.
    of_documents = max(0.0, squares / (num_docs - 1) / num_docs - noise)
    return _Components(float(mean), seeds_S, documents_D * math.sqrt(of_documents * num_docs**2 / squares), noise)


def _seeds(pairs: Sequence[Paired], found: Sequence[Sequence[_Components]], draws: int) -> _Seeds | None:
    """Weights, random and fixed, of the seeds' part; None if no comparison has two seeds."""
    names = sorted({seed for pair in pairs if len(pair.seeds) > 1 for seed in pair.seeds if seed is not None})
    if not names:
        return None
    position = {seed: number for number, seed in enumerate(names)}
    weights_CSK = np.zeros((len(found), len(names), len(pairs)))
    degrees_K = np.array([len(pair.seeds) - 1 for pair in pairs])
    for k, pair in enumerate(pairs):
        if degrees_K[k]:
            rows = [position[seed] for seed in pair.seeds if seed is not None]
            effects_CS = np.stack([column[k].seeds_S for column in found])
            weights_CSK[:, rows, k] = effects_CS / math.sqrt(len(rows) * degrees_K[k])
    weights_QSK = _with_mean(weights_CSK)
    noise_CK = np.array([[one.noise for one in column] for column in found])
    noise_QK = np.concatenate([noise_CK, noise_CK.sum(axis=0, keepdims=True) / len(found) ** 2])
    t_K = special.stdtrit(np.maximum(degrees_K, 1), (1 + CONFIDENCE) / 2)
    return _Seeds(
        normal_NS=np.stack(
            [_generator(f"seed {seed}").normal(size=draws) for seed in (*names, "of the least")], axis=1
        ),
        chi_NK=_chi(degrees_K, draws),
        weights_QSK=weights_QSK,
        least_QK=np.sqrt(np.maximum(0.0, noise_QK / t_K**2 - (weights_QSK**2).sum(axis=1))),
    )


def _chi(degrees_K: NDArray[np.int64], draws: int) -> Floats:
    """Draws [N, K] of the root of chi-square over its degrees of freedom; 1 where there are none."""
    share_N = 1 - _generator("spread of the seeds").random(draws)
    by_degrees = {
        int(n): np.sqrt(2 * special.gammaincinv(n / 2, share_N) / n) if n else np.ones(draws) for n in set(degrees_K)
    }
    return np.stack([by_degrees[int(n)] for n in degrees_K], axis=1)


def _seed_draws(seeds: _Seeds, rows: slice) -> Floats:
    """The seeds' part of draws [Q, n, K]: Student's t around zero, with the variance of the mean over seeds.

    Normal weights times the seeds' effects are normal with the observed covariance of the comparisons, and division by
    the root of chi-square makes t of it. ``least_QK`` adds what the observed spread lacks to a least one: by chance a few
    seeds can have the same score.
    """
    normal_NS, chi_NK = seeds.normal_NS[rows], seeds.chi_NK[rows]
    drawn_QNK = normal_NS[:, :-1] @ seeds.weights_QSK + normal_NS[:, -1:] * seeds.least_QK[:, None]
    return np.asarray(drawn_QNK / chi_NK, dtype=np.float64)


def _resampled_means(rng: np.random.Generator, values_DK: Floats, size: int) -> Floats:
    """Means over documents [n, K] of so many bootstrap samples of the documents, the same ones for all comparisons."""
    num_docs = values_DK.shape[0]
    picks = rng.integers(num_docs, size=(size, num_docs)) + num_docs * np.arange(size)[:, None]
    counts = np.bincount(picks.ravel(), minlength=size * num_docs).reshape(size, num_docs)
    return np.asarray(counts.astype(np.float64) @ values_DK / num_docs, dtype=np.float64)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _with_mean(values: Floats) -> Floats:
    """The columns' values and, last, their unweighted mean: the Average's."""
    return np.concatenate([values, values.mean(axis=0, keepdims=True)])


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


def _intervals(value_K: Floats, draws_NK: Floats, confidence: float) -> tuple[Interval, ...]:
    tail = (1 - confidence) / 2
    low_K, high_K = np.quantile(draws_NK, [tail, 1 - tail], axis=0)
    return tuple(Interval(*map(float, ends)) for ends in zip(value_K, low_K, high_K, strict=True))


def _two_sided(tails: NDArray[np.int64], draws: int) -> Floats:
    """Twice the share of draws on the other side of zero, never below what so many draws can show."""
    return np.minimum(1.0, 2 * (1 + tails) / (1 + draws))
