"""What a record keeps of the importance weights: their distribution, how well they tell right from wrong, examples."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpd.ops.weights import WeightsResult
from ctpd.pipeline.rows import end_units
from ctpd.text.prepare import PreparedPairs

NUM_EXAMPLES = 6
NUM_BINS = 40
SIDES = ("chosen", "rejected")


def weight_summary(
    result: WeightsResult,
    prepared: PreparedPairs,
    *,
    unit_starts: NDArray[np.int64],
    marks: NDArray[np.int8] | None,
) -> dict[str, Any]:
    """Mean, histogram and clamped shares of the weights, per side; with marks, the AUROC of the log ratio.

    End spans, whose weight is 1, are left out.
    """
    values, inner = result.weights.numpy(), ~end_units(prepared, unit_starts)
    side_of_unit = np.repeat(np.arange(len(unit_starts) - 1) % 2, np.diff(unit_starts))
    summary: dict[str, Any] = {
        "units": int(inner.sum()),
        "mean": float(values[inner].mean()) if inner.any() else 1.0,
        "clamped_low": result.clamped_low,
        "clamped_high": result.clamped_high,
    }
    for number, side in enumerate(SIDES):
        chosen = values[inner & (side_of_unit == number)]
        counts, edges = np.histogram(chosen, bins=NUM_BINS)
        summary[side] = {
            "mean": float(chosen.mean()) if len(chosen) else 1.0,
            "std": float(chosen.std()) if len(chosen) else 0.0,
            "histogram": {"counts": counts.tolist(), "edges": [round(float(edge), 6) for edge in edges]},
        }
    if marks is not None and result.log_ratio is not None:
        marked = marks != 0
        log_ratio = result.log_ratio.numpy()
        areas = {side: auroc(log_ratio[m], marks[m] > 0) for side, m in _per_side(marked, side_of_unit)}
        summary["auroc"] = {**areas, "pooled": auroc(log_ratio[marked], marks[marked] > 0)}
    return summary


def _per_side(marked: NDArray[np.bool_], side_of_unit: NDArray[np.int64]) -> list[tuple[str, NDArray[np.bool_]]]:
    return [(side, marked & (side_of_unit == number)) for number, side in enumerate(SIDES)]


def auroc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float | None:
    """Probability that a positive's score exceeds a negative's, ties counted half; None where one kind is absent."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mean_rank[inverse][positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def weight_examples(
    prepared: PreparedPairs, weights: NDArray[np.float32], unit_starts: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The first pairs with the text and the weight of every span."""
    examples = []
    for pair in range(min(NUM_EXAMPLES, len(prepared.pair_ids))):
        example: dict[str, Any] = {"prompt": prepared.prompts[pair]}
        for offset, side in enumerate(SIDES):
            row = 2 * pair + offset
            text = (prepared.chosen, prepared.rejected)[offset][pair]
            ends = prepared.boundaries[prepared.boundary_starts[row] : prepared.boundary_starts[row + 1]]
            starts = [0, *ends[:-1]]
            values = weights[unit_starts[row] : unit_starts[row] + len(ends)]
            example[side] = [[text[a:b], round(float(w), 3)] for a, b, w in zip(starts, ends, values, strict=True)]
        examples.append(example)
    return examples
