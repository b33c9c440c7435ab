"""Intervals of paired differences: compared with scipy and theory, and rules for missing seeds."""

from collections.abc import Iterable

import numpy as np
import pytest
from scipy import stats

from harness.statistics import (
    Interval,
    bootstrap_differences,
    difference_per_document,
    holm,
    mcnemar,
    resampled_means,
    spread,
    t_interval,
)


def test_spread_is_the_sample_standard_deviation_over_seeds() -> None:
    assert spread([0.1, 0.2, 0.3]) == pytest.approx(0.1)
    assert spread([0.5]) is None
    assert spread([]) is None


def test_interval_of_the_average_agrees_with_scipys_stratified_bootstrap() -> None:
    """Documents are resampled within each column and columns independently: scipy's unpaired percentile bootstrap."""
    rng = np.random.default_rng(0)
    columns = {"A": rng.normal(0.1, 0.4, size=(300, 1)), "B": rng.integers(-1, 2, size=(200, 1)).astype(float)}
    (ours,) = bootstrap_differences(columns, draws=20_000).average
    theirs = stats.bootstrap(
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


def simulated(
    num_sets: int, *, gain: float, seed: int, num_seeds: int = 3, effect: float = 0.0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Differences per document of two columns, [D, data sets] each, and of the Average per seed, [S, data sets].

    Each column has 200 documents of 0/1, crossed with seeds; their difficulty is shared by both systems. `effect` is the
    standard deviation of the random effect of a training run.
    """
    rng = np.random.default_rng(seed)
    luck, base_luck = rng.normal(0.0, effect, size=(2, num_seeds, num_sets))
    differences, per_seed = {}, []
    for name in ("A", "B"):
        difficulty = rng.uniform(0.2, 0.7, size=(200, num_sets))
        shape, seeds = difficulty.shape, range(num_seeds)
        base = {s: (rng.random(shape) < difficulty + base_luck[s]).astype(float) for s in seeds}
        system = {s: (rng.random(shape) < difficulty + luck[s] + gain).astype(float) for s in seeds}
        differences[name] = difference_per_document(system, base)
        per_seed.append([(system[s] - base[s]).mean(axis=0) for s in seeds])
    return differences, np.mean(per_seed, axis=0)


def coverage(intervals: Iterable[Interval | None], truth: float) -> float:
    return float(np.mean([interval is not None and interval.low <= truth <= interval.high for interval in intervals]))


def test_intervals_cover_a_known_difference() -> None:
    """Of 1,000 simulated data sets, 93 to 97 % have the true difference inside the 95 % interval of the Average."""
    found = bootstrap_differences(simulated(1000, gain=0.1, seed=10)[0], draws=2000)
    assert 0.93 <= coverage(found.average, 0.1) <= 0.97


def test_intervals_over_documents_leave_the_effect_of_a_training_run_out_and_t_intervals_over_seeds_include_it() -> (
    None
):
    differences, per_seed = simulated(1000, gain=0.1, seed=11, num_seeds=5, effect=0.03)
    over_documents = bootstrap_differences(differences, draws=2000).average
    assert coverage(over_documents, 0.1) < 0.85
    assert 0.93 <= coverage([t_interval(list(column)) for column in per_seed.T], 0.1) <= 0.97


def test_p_values_are_below_the_level_where_the_interval_leaves_out_zero_and_about_uniform_without_a_difference() -> (
    None
):
    found = bootstrap_differences(simulated(1000, gain=0.0, seed=4)[0], draws=2000)
    p_values = np.array(found.p_values)
    outside = np.array([interval.low > 0 or interval.high < 0 for interval in found.average])
    clear = np.abs(p_values - 0.05) > 0.005
    np.testing.assert_array_equal((p_values < 0.05)[clear], outside[clear])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(p_values < 0.5) == pytest.approx(0.5, abs=0.05)


def test_p_value_of_a_system_that_answers_like_the_base_is_one() -> None:
    assert bootstrap_differences({"A": np.zeros((30, 1))}).p_values == (1.0,)


def test_t_interval_is_students_and_needs_five_seeds() -> None:
    values = [0.02, 0.05, 0.01, 0.04, 0.06]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx((np.mean(values), low, high))
    assert t_interval(values[:4]) is None


@pytest.mark.parametrize(("gained", "lost"), [(12, 3), (3, 12), (7, 7), (0, 0), (1, 0), (60, 90)])
def test_mcnemar_is_the_exact_binomial_test_of_the_documents_that_differ(gained: int, lost: int) -> None:
    system = np.array([1.0] * gained + [0.0] * lost + [1.0] * 20 + [0.0] * 10)
    base = np.array([0.0] * gained + [1.0] * lost + [1.0] * 20 + [0.0] * 10)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    test = mcnemar(system, base)
    assert test is not None
    assert test == pytest.approx((gained, lost, expected))


def test_mcnemar_is_refused_where_a_score_is_neither_0_nor_1() -> None:
    assert mcnemar(np.array([1.0, 0.4]), np.array([0.0, 1.0])) is None
    assert mcnemar(np.array([1.0, 0.0]), np.array([0.2, 1.0])) is None


def test_holm_steps_down_and_keeps_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_alarm_at_the_level() -> None:
    p_values = np.random.default_rng(6).uniform(size=(4000, 5))
    assert np.mean([min(p) < 0.05 for p in p_values]) > 0.2
    assert np.mean([min(holm(list(p))) < 0.05 for p in p_values]) == pytest.approx(0.05, abs=0.01)


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


def test_only_common_seeds_count_and_a_system_without_seeds_is_compared_with_all() -> None:
    system = {0: np.array([1.0, 1.0]), 1: np.array([0.0, 1.0]), 2: np.array([0.0, 0.0])}
    base = {0: np.array([0.0, 1.0]), 1: np.array([0.0, 0.0])}
    np.testing.assert_allclose(difference_per_document(system, base), [0.5, 0.5])
    teacher = {None: np.array([1.0, 1.0])}
    np.testing.assert_allclose(difference_per_document(teacher, base), [1.0, 0.5])
    with pytest.raises(ValueError, match="no seed in common"):
        difference_per_document({3: np.zeros(2)}, base)
