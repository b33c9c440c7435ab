"""Intervals of paired differences: compared with scipy, theory, plain loops and simulated studies; rules for missing seeds."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness import statistics
from harness.statistics import (
    DRAWS,
    FEW_SEEDS,
    LEAST_P,
    Interval,
    Paired,
    crossed_bootstrap,
    crossed_p_values,
    holm,
    mcnemar,
    paired,
    spread,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from interval_coverage import Design, coverage, naive_intervals, simulate, t_intervals


def seedless(columns: dict[str, np.ndarray]) -> list[Paired]:
    """Comparisons of systems without seeds, from differences [D, K] by column."""
    (num,) = {values.shape[1] for values in columns.values()}
    return [Paired((None,), {name: values[None, :, k] for name, values in columns.items()}) for k in range(num)]


def drawn(num_seeds: int, num_docs: int, *, seed: int, columns: tuple[str, ...] = ("A", "B")) -> Paired:
    """Differences of -1, 0 and 1 with effects of seeds and of documents."""
    rng = np.random.default_rng(seed)
    lift = rng.normal(0.0, 0.3, size=(num_seeds, 1))
    values = {
        name: np.clip(
            np.round(lift + rng.normal(0.3, 0.5, size=(1, num_docs)) + rng.normal(0, 0.5, size=(num_seeds, num_docs))),
            -1,
            1,
        )
        for name in columns
    }
    return Paired(tuple(range(num_seeds)), values)


def test_spread_is_the_sample_standard_deviation_over_seeds() -> None:
    assert spread([0.1, 0.2, 0.3]) == pytest.approx(0.1)
    assert spread([0.5]) is None
    assert spread([]) is None


def test_interval_over_documents_agrees_with_scipys_stratified_bootstrap() -> None:
    """Documents are resampled within each column and columns independently: scipy's unpaired percentile bootstrap."""
    rng = np.random.default_rng(0)
    columns = {"A": rng.normal(0.1, 0.4, size=(300, 1)), "B": rng.integers(-1, 2, size=(200, 1)).astype(float)}
    (ours,) = crossed_bootstrap(seedless(columns), draws=20_000).average
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


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_interval_of_seeds_that_differ_alike_on_all_documents_is_students(num_seeds: int) -> None:
    """Without noise and without effects of documents only the seeds are left: one number per seed."""
    means = np.random.default_rng(num_seeds).normal(0.1, 0.05, size=num_seeds)
    pair = Paired(tuple(range(num_seeds)), {"A": np.repeat(means[:, None], 30, axis=1)})
    (found,) = crossed_bootstrap([pair], draws=40_000).average
    low, high = stats.t.interval(0.95, num_seeds - 1, loc=means.mean(), scale=stats.sem(means))
    assert found.value == pytest.approx(means.mean())
    assert found.high - found.low == pytest.approx(high - low, rel=0.04)
    assert (found.low + found.high) / 2 == pytest.approx(means.mean(), abs=0.03 * (high - low))


def test_components_are_those_of_a_two_way_analysis_of_variance_by_plain_loops() -> None:
    values = drawn(3, 7, seed=1).columns["A"]
    found = statistics._components(values)
    mean = sum(values[s, d] for s in range(3) for d in range(7)) / 21
    of_seeds = [sum(values[s, d] for d in range(7)) / 7 for s in range(3)]
    of_docs = [sum(values[s, d] for s in range(3)) / 3 for d in range(7)]
    noise = (
        sum((values[s, d] - of_seeds[s] - of_docs[d] + mean) ** 2 for s in range(3) for d in range(7)) / (2 * 6) / 21
    )
    documents = sum((doc - mean) ** 2 for doc in of_docs) / 6 / 7
    assert documents > noise > 0
    assert found.mean == pytest.approx(mean)
    assert found.noise == pytest.approx(noise)
    assert found.seeds_S == pytest.approx([one - mean for one in of_seeds])
    assert float(np.mean(found.documents_D**2)) / 7 == pytest.approx(
        documents - noise
    )  # what a resampled mean varies by


def test_draws_are_those_of_plain_loops() -> None:
    pair, num_draws = drawn(3, 20, seed=3), 40
    t = stats.t.ppf(0.975, 2)
    parts = {name: statistics._components(values) for name, values in pair.columns.items()}
    normal = [statistics._generator(f"seed {seed}").normal(size=num_draws) for seed in range(3)]
    extra = statistics._generator("seed of the least").normal(size=num_draws)
    chi = np.sqrt(stats.chi2.ppf(1 - statistics._generator("spread of the seeds").random(num_draws), 2) / 2)
    picks = {name: statistics._generator(f"column {name}").integers(20, size=(num_draws, 20)) for name in parts}
    average = []
    for n in range(num_draws):
        documents = np.mean([p.mean + np.mean([p.documents_D[d] for d in picks[name][n]]) for name, p in parts.items()])
        effects = [np.mean([p.seeds_S[s] for p in parts.values()]) for s in range(3)]
        variance = sum(effect**2 for effect in effects) / (3 * 2)
        least = sum(p.noise for p in parts.values()) / 4 / t**2
        seeds = sum(normal[s][n] * effects[s] for s in range(3)) / np.sqrt(6) + extra[n] * np.sqrt(
            max(0, least - variance)
        )
        average.append(documents + seeds / chi[n])
    (found,) = crossed_bootstrap([pair], draws=num_draws).average
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(average, [0.025, 0.975])))


def test_average_is_the_mean_of_the_columns_and_columns_have_their_own_intervals() -> None:
    pair = drawn(5, 60, seed=1)
    found = crossed_bootstrap([pair])
    assert found.average[0].value == pytest.approx(np.mean([found.columns[name][0].value for name in ("A", "B")]))
    alone = crossed_bootstrap([Paired(pair.seeds, {"A": pair.columns["A"]})])
    assert found.columns["A"][0] == pytest.approx(alone.columns["A"][0])
    assert alone.average[0] == pytest.approx(alone.columns["A"][0])


BAND = (0.935, 0.965)
JUDGED = [
    Design(seeds, 100, 2, sd, base_has_seeds)
    for seeds in (FEW_SEEDS, 10)
    for base_has_seeds in (True, False)
    for sd in (0.0, 0.05)
]


@pytest.mark.parametrize(
    ("design", "number"),
    [pytest.param(design, number, id="-".join(map(str, design))) for number, design in enumerate(JUDGED)],
)
def test_intervals_hold_the_truth_in_95_percent_of_simulated_studies(design: Design, number: int) -> None:
    """From five seeds on, whatever trainings differ by, with and without seeds of the base: 95 % within 1.5."""
    pairs = simulate(design, studies=1200, rng=np.random.default_rng(number))
    found = crossed_bootstrap(pairs, draws=2500)
    assert BAND[0] <= coverage(found.average) <= BAND[1]


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_intervals_of_few_seeds_are_wide_and_hold_the_truth(num_seeds: int) -> None:
    rng = np.random.default_rng(num_seeds)
    for sd in (0.0, 0.03):
        pairs = simulate(Design(num_seeds, 100, 2, sd, True), studies=600, rng=rng)
        assert coverage(crossed_bootstrap(pairs, draws=2000).average) >= BAND[0]
        assert coverage(naive_intervals(pairs[:100], rng)) != pytest.approx(0.95, abs=0.015)


def test_intervals_that_leave_a_source_of_chance_out_hold_the_truth_less_often() -> None:
    """Why neither the documents alone nor one number per seed make the headline."""
    trained = simulate(Design(5, 200, 2, 0.04, True), studies=400, rng=np.random.default_rng(1))
    assert coverage(crossed_bootstrap([pair.given_seeds() for pair in trained], draws=1000).average) < 0.85
    seedless_base = simulate(Design(5, 200, 2, 0.0, False), studies=400, rng=np.random.default_rng(2))
    assert coverage(t_intervals(seedless_base)) < 0.85


def test_p_values_are_below_the_level_where_the_interval_leaves_out_zero_and_seldom_without_a_difference() -> None:
    pairs = simulate(Design(5, 100, 2, 0.02, True), studies=1000, rng=np.random.default_rng(4))
    centred = [
        Paired(pair.seeds, {name: values - 0.05 for name, values in pair.columns.items()}) for pair in pairs
    ]  # the truth is 0.05
    found = crossed_bootstrap(centred, draws=2000)
    p_values = np.array(found.p_values)
    outside = np.array([interval.low > 0 or interval.high < 0 for interval in found.average])
    clear = np.abs(p_values - 0.05) > 0.005
    np.testing.assert_array_equal((p_values < 0.05)[clear], outside[clear])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean(p_values < 0.5) == pytest.approx(0.5, abs=0.05)


def test_p_values_of_many_comparisons_are_those_of_the_intervals() -> None:
    pairs = [drawn(4, 30, seed=seed) for seed in range(6)]
    values, p_values = crossed_p_values(pairs, draws=1200)
    found = crossed_bootstrap(pairs, draws=1200)
    assert p_values[-1] == pytest.approx(found.p_values)
    assert values[-1] == pytest.approx([interval.value for interval in found.average])
    assert values[:-1] == pytest.approx(np.array([[one.value for one in found.columns[name]] for name in "AB"]))


def test_systems_that_answer_alike_differ_by_nothing() -> None:
    found = crossed_bootstrap([Paired((0, 1, 2), {"A": np.zeros((3, 30))}), Paired((None,), {"A": np.zeros((1, 30))})])
    assert found.p_values == (1.0, 1.0)
    assert found.average == (Interval(0.0, 0.0, 0.0),) * 2


def test_seeds_that_have_the_same_score_by_chance_do_not_make_the_interval_a_point() -> None:
    """Two seeds with other answers and the same sum: no spread, and no effect of documents beyond the noise."""
    values = np.array([[1.0, 0.0] * 20, [0.0, 1.0] * 20])
    (found,) = crossed_bootstrap([Paired((0, 1), {"A": values})]).average
    noise = np.sqrt(statistics._components(values).noise)
    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * noise, rel=0.1)


def test_one_document_leaves_the_seeds_alone() -> None:
    values = np.array([[1.0], [0.0], [1.0], [1.0], [0.0]])
    (found,) = crossed_bootstrap([Paired(tuple(range(5)), {"A": values})], draws=20_000).average
    low, high = stats.t.interval(0.95, 4, loc=0.6, scale=stats.sem(values[:, 0]))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    (single,) = crossed_bootstrap([Paired((0,), {"A": values[:1]})]).average
    assert single == (1.0, 1.0, 1.0)


def test_the_interval_of_one_seed_is_that_given_the_seeds() -> None:
    pair = drawn(1, 50, seed=2)
    assert pair.has_one_training
    assert not pair.given_seeds().has_one_training
    assert crossed_bootstrap([pair]) == crossed_bootstrap([pair.given_seeds()])


def test_a_comparison_is_the_same_whatever_else_is_compared() -> None:
    """Rows of other seeds and other numbers of seeds change neither the draws of documents nor those of seeds."""
    pair, more = drawn(3, 40, seed=1), drawn(5, 40, seed=2)
    one = drawn(1, 40, seed=3)
    alone, beside = crossed_bootstrap([pair]), crossed_bootstrap([more, one, pair])
    assert beside.average[2] == pytest.approx(alone.average[0])
    assert beside.columns["A"][2] == pytest.approx(alone.columns["A"][0])
    assert beside.average[1] == pytest.approx(crossed_bootstrap([one]).average[0])


def test_blocks_of_draws_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are made in blocks, to bound memory: all are filled, whatever the size of a block."""
    pair = drawn(4, 30, seed=6)
    whole = crossed_bootstrap([pair], draws=700)
    monkeypatch.setattr(statistics, "BLOCK", 64)
    assert crossed_bootstrap([pair], draws=700).average[0] == pytest.approx(whole.average[0])


def test_rows_that_share_seeds_are_drawn_together() -> None:
    """The difference of two systems that move alike with the seed is as certain as if neither moved."""
    rng = np.random.default_rng(8)
    lift, noise = rng.normal(0.0, 0.1, size=(5, 1)), rng.normal(0.0, 0.1, size=(5, 50))
    first = {seed: 0.5 + lift[seed] + noise[seed] for seed in range(5)}
    second = {seed: 0.4 + lift[seed] + noise[seed] for seed in range(5)}
    pair = paired({"A": first}, {"A": second})
    assert pair is not None
    (found,) = crossed_bootstrap([pair]).average
    assert found == pytest.approx((0.1, 0.1, 0.1))


def test_what_is_not_finite_is_refused() -> None:
    for values in (np.array([[0.5, np.nan]]), np.array([[0.5, np.inf]])):
        with pytest.raises(ValueError, match="column 'A' is not finite"):
            crossed_bootstrap([Paired((None,), {"A": values})])


def test_the_least_p_value_is_what_the_draws_can_show() -> None:
    (p_value,) = crossed_bootstrap([Paired((None,), {"A": np.ones((1, 20))})]).p_values
    assert p_value == LEAST_P == 2 / (DRAWS + 1)


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


def test_only_common_seeds_count_and_a_system_without_seeds_is_compared_with_all() -> None:
    system = {"A": {0: np.array([1.0, 1.0]), 1: np.array([0.0, 1.0]), 2: np.array([0.0, 0.0])}}
    base = {"A": {0: np.array([0.0, 1.0]), 1: np.array([0.0, 0.0])}}
    found = paired(system, base)
    assert found is not None
    assert found.seeds == (0, 1)
    np.testing.assert_array_equal(found.columns["A"], [[1.0, 0.0], [0.0, 1.0]])
    teacher = {"A": {None: np.array([1.0, 1.0])}}
    found, turned = paired(teacher, base), paired(base, teacher)
    assert found is not None
    assert turned is not None
    assert found.seeds == turned.seeds == (0, 1)
    np.testing.assert_array_equal(found.columns["A"], [[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(found.columns["A"], -turned.columns["A"])
    both = paired(teacher, teacher)
    assert both is not None
    assert both.seeds == (None,)
    assert paired({"A": {3: np.zeros(2)}}, base) is None


def test_seeds_that_lack_a_column_do_not_count() -> None:
    one = np.zeros(2)
    found = paired({"A": {0: one, 1: one}, "B": {0: one}}, {"A": {0: one, 1: one}, "B": {0: one, 1: one}})
    assert found is not None
    assert found.seeds == (0,)
    assert paired({"A": {0: one}, "B": {}}, {"A": {0: one}, "B": {0: one}}) is None
