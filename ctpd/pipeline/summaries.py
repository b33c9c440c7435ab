"""Summary of the importance weights for a record: distribution, AUROC against right/wrong marks, examples."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd.ops.weights import WeightParameters, WeightsResult, clamp_weights
from ctpd.pipeline.rows import end_units
from ctpd.text.prepare import PreparedPairs
from harness.weights_summary import Auroc, Histogram, SideWeights, WeightedPair, WeightedSpan, WeightsSummary

NUM_EXAMPLES = 6
NUM_BINS = 40
LEAST_STD = 0.005  # of the weights of a side; below it they are all the same to two digits


class Units(NamedTuple):
    """Where the units of each row begin, and the data's marks of them (None without marks)."""

    starts: NDArray[np.int64]
    marks: NDArray[np.int8] | None


def weight_summary(
    result: WeightsResult,
    prepared: PreparedPairs,
    units: Units,
    *,
    parameters: WeightParameters,
    examples: tuple[WeightedPair, ...],
) -> WeightsSummary:
    """Mean, histogram and clamped shares of the weights, per side; with marks, the AUROC of the log ratio.

    End spans, whose weight is 1, are left out.
    """
    values, inner = result.weights.numpy(), ~end_units(prepared, units.starts)
    side_of_unit = np.repeat(np.arange(len(units.starts) - 1) % 2, np.diff(units.starts))
    chosen, rejected = (
        _side_summary(
            values[inner & (side_of_unit == side)],
            clamps=None if parameters.mean_one else clamp_weights(parameters, is_chosen=side == 0),
        )
        for side in range(2)
    )
    varies = result.log_ratio is not None and parameters.mu != 0 and parameters.lower < parameters.upper
    return WeightsSummary(
        units=int(inner.sum()),
        mean=float(values[inner].mean()) if inner.any() else 1.0,
        clamped_low=result.clamped_low,
        clamped_high=result.clamped_high,
        chosen=chosen,
        rejected=rejected,
        auroc=_log_ratio_auroc(result, units.marks, side_of_unit),
        examples=examples,
        note=_note(chosen, rejected, clamped=result.clamped_low + result.clamped_high) if varies else None,
    )


def _note(chosen: SideWeights, rejected: SideWeights, *, clamped: float) -> str | None:
    """A sentence where the weights do not tell one unit from another."""
    if max(chosen.std, rejected.std) >= LEAST_STD:
        return None
    means = f"{chosen.mean:.3f} in chosen and {rejected.mean:.3f} in rejected responses"
    if clamped > 1 / 2:
        return f"all importance weights are equal ({means}): nearly every log ratio lies outside `lower` and `upper`"
    return (
        f"all importance weights are equal ({means}), so that the method weighs nothing: the two contrastive models give "
        "nearly the same probabilities. Train them with a larger learning rate or for more steps"
    )


def _side_summary(weights: NDArray[np.float32], *, clamps: tuple[float, float] | None) -> SideWeights:
    counts, edges = np.histogram(weights, bins=NUM_BINS)
    return SideWeights(
        mean=float(weights.mean()) if len(weights) else 1.0,
        std=float(weights.std()) if len(weights) else 0.0,
        histogram=Histogram(counts=tuple(counts.tolist()), edges=tuple(round(float(edge), 6) for edge in edges)),
        clamps=clamps,
    )


def _log_ratio_auroc(
    result: WeightsResult, marks: NDArray[np.int8] | None, side_of_unit: NDArray[np.int64]
) -> Auroc | None:
    if marks is None or result.log_ratio is None:
        return None
    log_ratio, marked = result.log_ratio.numpy(), marks != 0
    chosen, rejected = (marked & (side_of_unit == side) for side in range(2))
    return Auroc(
        chosen=auroc(log_ratio[chosen], marks[chosen] > 0),
        rejected=auroc(log_ratio[rejected], marks[rejected] > 0),
        pooled=auroc(log_ratio[marked], marks[marked] > 0),
    )


def auroc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float | None:
    """Probability that a positive's score exceeds a negative's, ties counted half; None if one class is absent."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mean_rank[inverse][positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def weight_examples(
    prepared: PreparedPairs, weights: NDArray[np.float32], unit_starts: NDArray[np.int64]
) -> tuple[WeightedPair, ...]:
    """The first pairs with the text and the weight of every span."""
    return tuple(
        _example(prepared, weights, unit_starts, pair) for pair in range(min(NUM_EXAMPLES, len(prepared.pair_ids)))
    )


def _example(
    prepared: PreparedPairs, weights: NDArray[np.float32], unit_starts: NDArray[np.int64], pair: int
) -> WeightedPair:
    sides = []
    for offset, texts in enumerate((prepared.chosen, prepared.rejected)):
        row, text = 2 * pair + offset, texts[pair]
        ends = prepared.boundaries[prepared.boundary_starts[row] : prepared.boundary_starts[row + 1]].tolist()
        values = weights[unit_starts[row] : unit_starts[row] + len(ends)]
        spans = zip([0, *ends[:-1]], ends, values, strict=True)
        sides.append(tuple(WeightedSpan(text[a:b], round(float(weight), 3)) for a, b, weight in spans))
    return WeightedPair(prompt=prepared.prompts[pair], chosen=sides[0], rejected=sides[1])
