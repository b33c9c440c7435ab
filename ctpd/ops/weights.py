"""Importance weights of units: every strategy of docs/method.md#weight-strategies, over the flat units of many responses.

Rows alternate: row 2i is the chosen, row 2i + 1 the rejected response of pair i. Everything is computed in float64.

Shape legend: R rows, U units of all rows one after another, `starts` is R + 1, `_` a length that is checked by hand.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from ctpd.core.config import Config, Tunable, nearest
from ctpd.core.errors import UserError
from ctpd.core.roles import Phase, Role


class Signal(StrEnum):
    """A frozen model whose log-probabilities of the responses' tokens a strategy or an objective reads.

    Attributes:
        role: the teacher or the student.
        phase: after supervised fine-tuning (the reference), or one of the contrastive pair.
    """

    role: Role
    phase: Phase

    TEACHER_POSITIVE = "teacher_positive", "teacher", "positive"
    TEACHER_NEGATIVE = "teacher_negative", "teacher", "negative"
    TEACHER_REFERENCE = "teacher_reference", "teacher", "reference"
    STUDENT_POSITIVE = "student_positive", "student", "positive"
    STUDENT_NEGATIVE = "student_negative", "student", "negative"

    def __new__(cls, value: str, role: Role, phase: Phase) -> "Signal":
        """Attach role and phase to the text."""
        member = str.__new__(cls, value)
        member._value_, member.role, member.phase = value, role, phase
        return member

    @property
    def long_name(self) -> str:
        """For people: `teacher SFT`, `student positive`."""
        return f"{self.role} {'SFT' if self.phase == 'reference' else self.phase}"


class WeightParameters(Config):
    """The parameters of ``w = k exp(mu clamp(d, lower, upper))``."""

    k: Annotated[float, Field(gt=0)] = 1.0
    """Factor of every weight."""
    mu: Annotated[float, Tunable((0.5, 1.0, 2.0))] = 1.0
    """Factor of the exponent in chosen responses; rejected ones take its negative."""
    lower: float = -0.5
    """Lower clamp of the log ratio, in nats."""
    upper: float = 1.5
    """Upper clamp of the log ratio, in nats."""
    round_decimals: Annotated[int, Field(ge=0)] | None = None
    """Round the log ratio to so many decimals first; the authors' code rounds to 2."""
    mean_one: bool = False
    """Divide the weights of each response by their mean, so that no response as a whole weighs more than another."""

    @model_validator(mode="after")
    def _ordered(self) -> "WeightParameters":
        if self.lower > self.upper:
            raise ValueError(f"the lower clamp {self.lower:g} of the weights lies above the upper one {self.upper:g}")
        return self


def weight_formula(log_ratio: Tensor, sign: Tensor | float, parameters: WeightParameters) -> Tensor:
    """``w = k exp(sign mu clamp(d, lower, upper))``.

    Args:
        log_ratio: ``d``, in nats.
        sign: +1 in chosen, -1 in rejected responses.
        parameters: of the formula.
    """
    p = parameters
    return p.k * torch.exp(p.mu * sign * log_ratio.clamp(p.lower, p.upper))


def clamp_weights(parameters: WeightParameters, *, is_chosen: bool) -> tuple[float, float]:
    """The weights of a log ratio at or below the lower clamp, and at or above the upper one."""
    ends = torch.tensor([parameters.lower, parameters.upper], dtype=torch.float64)
    low, high = weight_formula(ends, 1.0 if is_chosen else -1.0, parameters).tolist()
    return low, high


class UnitLayout(NamedTuple):
    """The units of many responses, one after another; rows alternate chosen and rejected.

    Attributes:
        starts: where each row begins, and the total.
        is_end: which units are end units.
    """

    starts: Int[Tensor, " starts"]
    is_end: Bool[Tensor, " _"]


class WeightsResult(NamedTuple):
    """Weights of all units, the log ratio behind them (before clamping; None where the strategy has none), and the
    fractions of the units (end units left out) whose log ratio lies below ``lower`` and above ``upper``."""

    weights: Float[Tensor, " U"]
    log_ratio: Float[Tensor, " U"] | None
    clamped_low: float
    clamped_high: float


class _Weighted(NamedTuple):
    weights: Tensor
    log_ratio: Tensor | None


class _Units(NamedTuple):
    """The units of all rows, as the strategies see them."""

    signals: Mapping[Signal, Tensor]  # float64 [U] each
    marks: Tensor | None  # float64 [U]
    starts: Tensor  # int64 [R + 1]
    row: Tensor  # int64 [U]: the row of each unit
    is_end: Tensor  # bool [U]
    sign: Tensor  # float64 [U]: +1 in chosen, -1 in rejected rows
    parameters: WeightParameters
    seed: int

    def exponential(self, log_ratio_U: Tensor) -> Tensor:
        """``w = k exp(mu clamp(d, L, U))``, mu negated in rejected rows."""
        return weight_formula(log_ratio_U, self.sign, self.parameters)

    def weighted(self, log_ratio_U: Tensor) -> _Weighted:
        """The weights of a log ratio, rounded first where asked."""
        if self.parameters.round_decimals is not None:
            log_ratio_U = log_ratio_U.round(decimals=self.parameters.round_decimals)
        return _Weighted(self.exponential(log_ratio_U), log_ratio_U)

    def means(self, values_U: Tensor) -> Tensor:
        """For each unit, the mean of its response's values without the end unit."""
        inner_U = (~self.is_end).double()
        zeros_R = inner_U.new_zeros(len(self.starts) - 1)
        total_R = zeros_R.index_add(0, self.row, values_U * inner_U)
        return (total_R / zeros_R.index_add(0, self.row, inner_U))[self.row]

    def generators(self) -> Iterator[tuple[np.random.Generator, tuple[Tensor, Tensor]]]:
        """For each pair: its generator, and the indices of its chosen and its rejected units without the end units."""
        inner = (~self.is_end).nonzero().squeeze(1)
        counts = torch.bincount(self.row[inner], minlength=len(self.starts) - 1).tolist()
        rows = torch.split(inner, counts)
        for pair in range(len(rows) // 2):
            yield np.random.default_rng((self.seed, pair)), (rows[2 * pair], rows[2 * pair + 1])


class Strategy(NamedTuple):
    """How one strategy turns units into weights, the signals that it needs, and whether it needs the data's marks."""

    name: str
    needs: frozenset[Signal]
    compute: Callable[[_Units], _Weighted]
    needs_marks: bool = False


def span_weights(
    strategy: str,
    signals: Mapping[Signal, Float[Tensor, " _"]],
    units: UnitLayout,
    parameters: WeightParameters | None = None,
    *,
    seed: int = 0,
    marks: Int[Tensor, " _"] | None = None,
) -> WeightsResult:
    """Importance weights ``w = k exp(mu clamp(d, lower, upper))`` of the units of many pairs (docs/method.md#importance-weights).

    End units have weight exactly 1 and take no part in averages, permutations, pairings and clamped fractions.
    Results are float32 (float64 where a signal is); all of it is computed in float64.

    Args:
        strategy: a name in ``STRATEGIES``.
        signals: log-probabilities of the units, in nats; more than the strategy needs is fine.
        units: where the rows begin, and which units are end units.
        parameters: of the formula; None for the defaults.
        seed: of ``random`` and ``shuffled``, which draw for each pair from (seed, index of the pair).
        marks: of ``oracle``: +1 right, -1 wrong, 0 neutral.

    Raises:
        UserError: unknown strategy, a signal or the marks are missing, arrays of different lengths.
    """
    chosen, parameters = find_strategy(strategy), parameters or WeightParameters()
    _check(chosen, signals, units, marks)
    row_U = torch.repeat_interleave(units.starts.long().diff())
    seen = _Units(
        signals={name: signals[name].double() for name in chosen.needs},
        marks=None if marks is None else marks.double(),
        starts=units.starts.long(),
        row=row_U,
        is_end=units.is_end,
        sign=1.0 - 2.0 * (row_U % 2).double(),
        parameters=parameters,
        seed=seed,
    )
    weights_U, log_ratio_U = chosen.compute(seen)
    weights_U = weights_U / seen.means(weights_U) if parameters.mean_one else weights_U
    exact = any(signals[name].dtype == torch.float64 for name in chosen.needs)
    dtype = torch.float64 if exact else torch.float32
    weights_U = weights_U.masked_fill(units.is_end, 1.0).to(dtype)
    if log_ratio_U is None or bool(units.is_end.all()):
        return WeightsResult(weights_U, None if log_ratio_U is None else log_ratio_U.to(dtype), 0.0, 0.0)
    outside = log_ratio_U < parameters.lower, log_ratio_U > parameters.upper
    low, high = (out[~units.is_end].double().mean().item() for out in outside)
    return WeightsResult(weights_U, log_ratio_U.to(dtype), low, high)


def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        UserError: there is none.
    """
    if name not in STRATEGIES:
        raise UserError(
            f"there is no weight strategy '{name}'.{nearest(name, STRATEGIES)}",
            fix=f"Use one of: {', '.join(STRATEGIES)}",
        )
    return STRATEGIES[name]


def _check(strategy: Strategy, signals: Mapping[Signal, Tensor], units: UnitLayout, marks: Tensor | None) -> None:
    given = {str(name): len(signals[name]) for name in sorted(strategy.needs & signals.keys())}
    needed = set(map(str, strategy.needs))
    if strategy.needs_marks:
        needed.add("marks")
        given |= {} if marks is None else {"marks": len(marks)}
    if missing := sorted(needed - given.keys()):
        raise UserError(
            f"the weight strategy '{strategy.name}' needs {', '.join(missing)}, which is not there",
            fix="Provide it, or choose another strategy",
        )
    if len(units.starts) % 2 == 0:
        raise UserError(f"{len(units.starts) - 1} rows are no pairs: rows alternate chosen and rejected")
    total = int(units.starts[-1])
    wrong = {name: n for name, n in {"is_end": len(units.is_end), **given}.items() if n != total}
    if wrong:
        raise UserError(f"the rows hold {total} units, but there are {wrong}")


def _ratio(positive: Signal, negative: Signal) -> Callable[[_Units], _Weighted]:
    """``d_i`` is the difference of two models' log-probabilities of the unit."""
    return lambda units: units.weighted(units.signals[positive] - units.signals[negative])


_teacher = _ratio(Signal.TEACHER_POSITIVE, Signal.TEACHER_NEGATIVE)


def _average(units: _Units) -> _Weighted:
    """Every unit of a response gets the mean of its ``teacher`` weights."""
    weights_U, log_ratio_U = _teacher(units)
    return _Weighted(units.means(weights_U), log_ratio_U)


def _shuffled(units: _Units) -> _Weighted:
    """The ``teacher`` weights of a response, permuted: the same histogram, no credit assignment."""
    weights_U, log_ratio_U = _teacher(units)
    shuffled_U = weights_U.clone()
    for generator, rows in units.generators():
        for index in rows:
            shuffled_U[index] = weights_U[index[torch.from_numpy(generator.permutation(len(index)))]]
    return _Weighted(shuffled_U, log_ratio_U)


def _random(units: _Units) -> _Weighted:
    """Uniform in [0.7, 1.3]."""
    weights_U = torch.ones_like(units.sign)
    for generator, rows in units.generators():
        for index in rows:
            weights_U[index] = torch.from_numpy(generator.uniform(0.7, 1.3, len(index)))
    return _Weighted(weights_U, None)


def _uniform(units: _Units) -> _Weighted:
    return _Weighted(torch.ones_like(units.sign), None)


def _lite(units: _Units) -> _Weighted:
    """``s_i``: chosen minus rejected log-probability under one teacher, by index; 0 beyond the shorter one."""
    logps_U = units.signals[Signal.TEACHER_REFERENCE]
    num_units_R = torch.bincount(units.row[~units.is_end], minlength=len(units.starts) - 1)
    position_U = torch.arange(len(units.row)) - units.starts[units.row]
    opposite_U = units.row ^ 1
    paired_U = (position_U < num_units_R[opposite_U]) & ~units.is_end
    index_U = torch.where(paired_U, units.starts[opposite_U] + position_U, 0)
    return units.weighted(torch.where(paired_U, units.sign * (logps_U - logps_U[index_U]), 0.0))


def _oracle(units: _Units) -> _Weighted:
    """The data's marks instead of a log ratio: the upper clamp for right, the lower for wrong, 0 for neutral."""
    assert units.marks is not None
    upper, lower = units.parameters.upper, units.parameters.lower
    log_ratio_U = upper * (units.marks > 0).double() + lower * (units.marks < 0).double()
    return _Weighted(units.exponential(log_ratio_U), log_ratio_U)


_TEACHER_PAIR = (Signal.TEACHER_POSITIVE, Signal.TEACHER_NEGATIVE)


def _strategies() -> dict[str, Strategy]:
    pairs = {
        "teacher": _TEACHER_PAIR,
        "student": (Signal.STUDENT_POSITIVE, Signal.STUDENT_NEGATIVE),
        "teacher_student": (Signal.TEACHER_POSITIVE, Signal.STUDENT_NEGATIVE),
        "positive_only": (Signal.TEACHER_POSITIVE, Signal.TEACHER_REFERENCE),
    }
    ratios = [Strategy(name, frozenset(pair), _ratio(*pair)) for name, pair in pairs.items()]
    others = [
        Strategy("average", frozenset(_TEACHER_PAIR), _average),
        Strategy("random", frozenset(), _random),
        Strategy("shuffled", frozenset(_TEACHER_PAIR), _shuffled),
        Strategy("uniform", frozenset(), _uniform),
        Strategy("lite", frozenset({Signal.TEACHER_REFERENCE}), _lite),
        Strategy("oracle", frozenset(), _oracle, needs_marks=True),
    ]
    return {strategy.name: strategy for strategy in [*ratios, *others]}


STRATEGIES: Mapping[str, Strategy] = _strategies()
