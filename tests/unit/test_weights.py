"""Every weight strategy of docs/method.md#weight-strategies against a naive loop over pairs and units."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ctpd.core.errors import UserError
from ctpd.ops.weights import STRATEGIES, Signal, UnitLayout, WeightParameters, WeightsResult, span_weights

# Units of each row, and whether the last is the end unit. The last pair has one row that is nothing but its end.
LENGTHS = [4, 6, 5, 3, 3, 3, 1, 2]
HAS_END = [True, True, False, True, False, False, True, True]
K, MU, LOWER, UPPER = 1.3, 0.8, -0.4, 0.9
PARAMETERS = WeightParameters(k=K, mu=MU, lower=LOWER, upper=UPPER)
Row = list[float]


def layout() -> UnitLayout:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    is_end = torch.zeros(int(starts[-1]), dtype=torch.bool)
    is_end[starts[1:][torch.tensor(HAS_END)] - 1] = True
    return UnitLayout(starts, is_end)


def signals(dtype: torch.dtype = torch.float64) -> dict[Signal, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: -torch.rand(sum(LENGTHS), generator=generator, dtype=dtype) * 3 for name in Signal}


def marks() -> Tensor:
    return torch.tensor([(7 * i) % 3 - 1 for i in range(sum(LENGTHS))], dtype=torch.int8)


def rows(flat: Tensor) -> list[Row]:
    return [row.tolist() for row in flat.split(LENGTHS)]


def inner(row: Sequence[Any], index: int) -> Sequence[Any]:
    return row[:-1] if HAS_END[index] else row


def weight(ratio: float, index: int, *, decimals: int | None = None) -> float:
    if decimals is not None:
        ratio = round(ratio, decimals)
    return K * math.exp((MU if index % 2 == 0 else -MU) * min(max(ratio, LOWER), UPPER))


def ratio_weights(positive: str, negative: str) -> list[Row]:
    pairs = zip(rows(signals()[positive]), rows(signals()[negative]), strict=True)
    return [[weight(p - n, i) for p, n in zip(*pair, strict=True)] for i, pair in enumerate(pairs)]


def naive_teacher() -> list[Row]:
    return ratio_weights("teacher_positive", "teacher_negative")


def naive_average() -> list[Row]:
    means = [sum(inner(row, i)) / max(len(inner(row, i)), 1) for i, row in enumerate(naive_teacher())]
    return [[means[i]] * LENGTHS[i] for i in range(len(LENGTHS))]


def naive_drawn(draw: Callable[[np.random.Generator, Row], Sequence[float]], base: list[Row]) -> list[Row]:
    result = []
    for pair in range(len(LENGTHS) // 2):
        generator = np.random.default_rng((5, pair))
        for i in (2 * pair, 2 * pair + 1):
            result.append([*draw(generator, list(inner(base[i], i))), 1.0][: LENGTHS[i]])
    return result


def naive_lite() -> list[Row]:
    teacher = rows(signals()["teacher_reference"])
    result = []
    for i in range(0, len(LENGTHS), 2):
        chosen, rejected = inner(teacher[i], i), inner(teacher[i + 1], i + 1)
        paired = [c - r for c, r in zip(chosen, rejected, strict=False)]
        for j in (i, i + 1):
            result.append([weight(s, j) for s in [*paired, *[0.0] * LENGTHS[j]][: LENGTHS[j]]])
    return result


NAIVE: dict[str, Callable[[], list[Row]]] = {
    "teacher": naive_teacher,
    "student": lambda: ratio_weights("student_positive", "student_negative"),
    "teacher_student": lambda: ratio_weights("teacher_positive", "student_negative"),
    "positive_only": lambda: ratio_weights("teacher_positive", "teacher_reference"),
    "average": naive_average,
    "random": lambda: naive_drawn(lambda g, row: g.uniform(0.7, 1.3, len(row)), naive_teacher()),
    "shuffled": lambda: naive_drawn(lambda g, row: [row[j] for j in g.permutation(len(row))], naive_teacher()),
    "uniform": lambda: [[1.0] * length for length in LENGTHS],
    "lite": naive_lite,
    "oracle": lambda: [
        [weight({1: UPPER, -1: LOWER, 0: 0.0}[mark], i) for mark in row] for i, row in enumerate(rows(marks()))
    ],
}


def compute(strategy: str, **changes: Any) -> WeightsResult:
    parameters = {name: changes.pop(name) for name in list(changes) if name in WeightParameters.model_fields}
    given = {"signals": signals(), "units": layout(), "marks": marks(), "seed": 5, **changes}
    return span_weights(strategy, parameters=PARAMETERS.model_copy(update=parameters), **given)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_naive_loop(strategy: str) -> None:
    """Weights of every strategy are the formula of docs/method.md#importance-weights, and exactly 1 on end units."""
    result = compute(strategy)
    expected = torch.tensor([w for row in NAIVE[strategy]() for w in row], dtype=torch.float64)
    expected[layout().is_end] = 1.0
    torch.testing.assert_close(
        result.weights.double(), expected, rtol=1e-6 if strategy in ("random", "uniform", "oracle") else 1e-12, atol=0
    )
    assert (result.weights[layout().is_end] == 1.0).all()


def test_every_strategy_of_the_method_is_there() -> None:
    """The table of docs/method.md#weight-strategies, and what each row needs."""
    teacher, student = {"teacher_positive", "teacher_negative"}, {"student_positive", "student_negative"}
    assert {name: set(strategy.needs) for name, strategy in STRATEGIES.items()} == {
        "teacher": teacher,
        "student": student,
        "teacher_student": {"teacher_positive", "student_negative"},
        "average": teacher,
        "random": set(),
        "shuffled": teacher,
        "uniform": set(),
        "lite": {"teacher_reference"},
        "positive_only": {"teacher_positive", "teacher_reference"},
        "oracle": set(),
    }
    assert [name for name, strategy in STRATEGIES.items() if strategy.needs_marks] == ["oracle"]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("random", "uniform", "oracle")])
def test_float32_signals_give_float32_results(strategy: str) -> None:
    """Stored signals are float32, and so are the weights: correctly rounded, since the work is done in float64."""
    given = signals(torch.float32)
    result = compute(strategy, signals=given)
    exact = compute(strategy, signals={name: signal.double() for name, signal in given.items()})
    assert result.weights.dtype == torch.float32
    assert result.log_ratio is not None
    assert torch.equal(result.weights, exact.weights.float())
    assert torch.equal(result.log_ratio, exact.log_ratio.float())


def test_clamped_fractions_leave_out_end_units() -> None:
    """Fractions of the units whose log ratio lies outside the clamp, and the ratio itself unclamped."""
    result = compute("teacher")
    given, is_end = signals(), layout().is_end
    ratio = given["teacher_positive"] - given["teacher_negative"]
    assert torch.equal(result.log_ratio, ratio)
    assert result.clamped_low == pytest.approx(float((ratio[~is_end] < LOWER).double().mean()))
    assert result.clamped_high == pytest.approx(float((ratio[~is_end] > UPPER).double().mean()))
    assert result.clamped_low > 0 < result.clamped_high
    assert compute("random").log_ratio is None
    assert compute("random").clamped_low == 0.0


def test_shuffled_keeps_each_response_its_own_histogram() -> None:
    """Every response keeps its weights in another order."""
    teacher, shuffled = rows(compute("teacher").weights), rows(compute("shuffled").weights)
    assert [sorted(row) for row in teacher] == [sorted(row) for row in shuffled]
    assert teacher != shuffled


@pytest.mark.parametrize("strategy", ["random", "shuffled"])
def test_draws_depend_on_seed_and_pair_alone(strategy: str) -> None:
    """The same seed gives the same weights, another seed others; pairs that come later change nothing."""
    full = compute(strategy).weights
    assert torch.equal(full, compute(strategy).weights)
    assert not torch.equal(full, compute(strategy, seed=6).weights)
    starts = layout().starts[:5]
    end = int(starts[-1])
    cut = compute(
        strategy,
        signals={name: signal[:end] for name, signal in signals().items()},
        marks=marks()[:end],
        units=UnitLayout(starts, layout().is_end[:end]),
    )
    assert torch.equal(cut.weights, full[:end])


def test_rounding_comes_before_the_clamp() -> None:
    """`round_decimals` rounds the log ratio before the clamp, as the authors' code does."""
    given = signals()
    ratios = rows(given["teacher_positive"] - given["teacher_negative"])
    expected = [
        1.0 if e else w
        for e, w in zip(
            layout().is_end.tolist(),
            [weight(ratio, i, decimals=1) for i, row in enumerate(ratios) for ratio in row],
            strict=True,
        )
    ]
    result = compute("teacher", round_decimals=1).weights
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("techer", {}, "Did you mean 'teacher'"),
        ("teacher", {"signals": {}}, "needs teacher_negative, teacher_positive"),
        ("oracle", {"marks": None}, "needs marks"),
        ("oracle", {"marks": torch.zeros(3, dtype=torch.int8)}, "'marks': 3"),
        ("uniform", {"units": layout()._replace(starts=torch.tensor([0, 27]))}, "1 rows are no pairs"),
    ],
)
def test_bad_input_is_refused(strategy: str, changes: dict[str, Any], message: str) -> None:
    """The error says what is wrong and offers the nearest name."""
    with pytest.raises(UserError, match=message):
        compute(strategy, **changes)


@pytest.mark.parametrize(
    "values", [{"lower": 1.0, "upper": 0.5}, {"k": 0.0}, {"k": -1.0}, {"mu": math.nan}, {"round_decimals": -1}]
)
def test_parameters_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WeightParameters(**values)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_mean_one_scales_each_response_to_a_mean_of_one(strategy: str) -> None:
    """Without its end unit, and with the ratios between its units as they were."""
    plain, scaled = (
        span_weights(strategy, signals(), layout(), PARAMETERS.model_copy(update={"mean_one": on}), marks=marks())
        for on in (False, True)
    )
    for index, (before, after) in enumerate(zip(rows(plain.weights), rows(scaled.weights), strict=True)):
        if values := inner(before, index):
            mean = sum(values) / len(values)
            assert inner(after, index) == pytest.approx([value / mean for value in values])
        assert not HAS_END[index] or after[-1] == 1.0
