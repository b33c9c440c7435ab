"""Intervals of paired differences: against scipy, against theory, and under the rules for missing seeds."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from harness.statistics import bootstrap_differences, difference_per_document, resampled_means, spread


def test_spread_is_the_sample_standard_deviation_over_seeds() -> None:
    assert spread([0.1, 0.2, 0.3]) == pytest.approx(0.1)
    assert spread([0.5]) is None
    assert spread([]) is None


def test_interval_of_the_average_agrees_with_scipys_stratified_bootstrap() -> None:
    """Documents are resampled within each column and columns independently: scipy's unpaired percentile bootstrap."""
    rng = np.random.default_rng(0)
    columns = {"A": rng.normal(0.1, 0.4, size=(300, 1)), "B": rng.integers(-1, 2, size=(200, 1)).astype(float)}
    (ours,) = bootstrap_differences(columns, draws=20_000).average
    theirs = bootstrap(
        [values[:, 0] for values in columns.values()],
        lambda a, b, axis: (a.mean(axis=axis) + b.mean(axis=axis)) / 2,
        method="percentile",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.value == pytest.approx((columns["A"].mean() + columns["B"].mean()) / 2)
    assert ours.low == pytest.approx(theirs.low, abs=0.002)
    assert ours.high == pytest.approx(theirs.high, abs=0.002)


def test_intervals_of_columns_have_the_width_of_their_standard_error() -> None:
    values = np.random.default_rng(2).normal(0.05, 0.3, size=(500, 2))
    for k, interval in enumerate(bootstrap_differences({"A": values}).columns["A"]):
        half = 1.96 * values[:, k].std() / np.sqrt(500)
        assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


def test_intervals_cover_a_known_difference() -> None:
    """Seeds crossed with documents, no seed effect: about 95 of 100 intervals cover (here 300 draws, 91 to 98 %)."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        differences = {}
        for name in ("A", "B"):
            difficulty = rng.uniform(0.2, 0.7, size=150)
            base = {seed: (rng.random(150) < difficulty).astype(float) for seed in range(3)}
            system = {seed: (rng.random(150) < difficulty + 0.1).astype(float) for seed in range(3)}
            differences[name] = difference_per_document(system, base)[:, None]
        (interval,) = bootstrap_differences(differences, draws=1000).average
        covered += interval.low <= 0.1 <= interval.high
    assert 0.91 <= covered / 300 <= 0.98


def test_draws_are_deterministic_and_depend_on_the_column_only() -> None:
    values = np.random.default_rng(4).normal(size=(50, 3))
    first = resampled_means(values, key="GSM8K")
    np.testing.assert_array_equal(first, resampled_means(values, key="GSM8K"))
    np.testing.assert_allclose(first[:, 1:2], resampled_means(values[:, 1:2], key="GSM8K"), rtol=0, atol=1e-12)
    assert not np.array_equal(first, resampled_means(values, key="ARC"))


def test_blocks_of_draws_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many documents are resampled in blocks, to bound memory: all draws are filled, with the right mean and spread."""
    values = np.random.default_rng(5).normal(size=(9_000, 1))
    means = resampled_means(values, key="MMLU", draws=1000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.002)
    assert means.std() == pytest.approx(values.std() / np.sqrt(9_000), rel=0.1)


def test_only_common_seeds_count_and_a_system_without_seeds_meets_all() -> None:
    system = {0: np.array([1.0, 1.0]), 1: np.array([0.0, 1.0]), 2: np.array([0.0, 0.0])}
    base = {0: np.array([0.0, 1.0]), 1: np.array([0.0, 0.0])}
    np.testing.assert_allclose(difference_per_document(system, base), [0.5, 0.5])
    teacher = {None: np.array([1.0, 1.0])}
    np.testing.assert_allclose(difference_per_document(teacher, base), [1.0, 0.5])
    with pytest.raises(ValueError, match="no seed in common"):
        difference_per_document({3: np.zeros(2)}, base)
