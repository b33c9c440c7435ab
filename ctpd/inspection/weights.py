"""What `ctpd inspect weights` measures: stored importance weights by side, position and span type."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load_file

from ctpd.core.errors import DamagedArtifact, UserError
from ctpd.core.manifests import MANIFEST
from ctpd.core.store import Store
from ctpd.objectives.base import Weighting
from ctpd.ops.weights import clamp_weights
from ctpd.pipeline.rows import end_units, units_of
from ctpd.pipeline.stages.weights import WEIGHTS, WeightsConfig, read_summary
from ctpd.text.mismatch import SPAN_TYPES, span_types
from ctpd.text.prepare import PreparedPairs
from ctpd.text.prepared_files import read_prepared

NUM_POSITIONS = 10
NUM_BINS = 24
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SIDES = ("chosen", "rejected")
_NOT_CLAMPED = ("average", "random", "uniform")  # strategies whose weights are not a clamped exponential of each unit


def inspect_weights(store: Store, key: str) -> dict[str, Any]:
    """The distribution of a stored weights artifact: overall, by side, by position and by span type.

    End spans are left out: their weight is always 1. `clamped_low` and `clamped_high` are the shares of units whose
    weight is the one at a clamp; None for strategies whose weights are not a clamped exponential.

    Args:
        store: holds the artifact and the pairs that it was made from.
        key: the artifact's whole key.

    Raises:
        UserError: the artifact is damaged, or the pairs are not in the store any more.
    """
    folder = store.open("weights", key)
    config, pairs_key = _made_from(store.manifest("weights", key), folder)
    if not store.has("pairs", pairs_key):
        raise UserError(
            "the pairs that the weights were made from are not in the store",
            where=str(folder),
            fix="Run the recipe again, which builds them again",
        )
    prepared = read_prepared(store.open("pairs", pairs_key))
    values = np.asarray(load_file(folder / WEIGHTS)["weights"], dtype=np.float64)
    summary = read_summary(folder)
    _, unit_starts = units_of(prepared, "student", config.granularity)
    inner = ~end_units(prepared, unit_starts)
    row = np.repeat(np.arange(unit_starts.size - 1), np.diff(unit_starts))
    position = _positions(row, inner, unit_starts)
    low, high = _at_clamp(values, row % 2, config.weighting)
    table = _Table(values, row % 2, low, high)
    found: dict[str, Any] = {
        "key": key,
        "settings": {
            "strategy": config.weighting.strategy,
            **config.weighting.parameters.model_dump(),
            "granularity": config.granularity,
            "aggregate": config.aggregate,
        },
        "units": int(inner.sum()),
        "clamped_low": summary.clamped_low,
        "clamped_high": summary.clamped_high,
        "auroc": None if summary.auroc is None else summary.auroc.model_dump(),
        "sides": {side: table.distribution(inner & (row % 2 == i)) for i, side in enumerate(_SIDES)},
        "positions": [table.line(inner & (position == p)) for p in range(NUM_POSITIONS)],
    }
    if config.granularity == "spans":
        types = _types_of(prepared)
        found["types"] = {name: table.line(inner & (types == i)) for i, name in enumerate(SPAN_TYPES)}
    return found


def _made_from(manifest: Mapping[str, Any], folder: Path) -> tuple[WeightsConfig, str]:
    """How weights were computed, and the key of their pairs."""
    try:
        identity = manifest["identity"]
        return WeightsConfig.model_validate_json(json.dumps(identity["config"])), identity["pairs"].partition("/")[2]
    except (LookupError, TypeError, AttributeError, ValidationError) as error:
        raise DamagedArtifact(
            f"the stored artifact is damaged: {MANIFEST} does not say how the weights were computed",
            where=str(folder),
            fix="Run the recipe again with `--rebuild`",
        ) from error


def _positions(row: NDArray[np.int64], inner: NDArray[np.bool_], unit_starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[U]`` the tenth of its response in which the middle of each unit lies, from 0.

    By the middle, so that responses of a few units favour neither the first nor the last tenth.
    """
    index = np.arange(row.size) - unit_starts[row]
    num_inner = np.bincount(row[inner], minlength=unit_starts.size - 1)
    tenth: NDArray[np.int64] = NUM_POSITIONS * (2 * index + 1) // np.maximum(2 * num_inner[row], 1)
    return tenth.clip(max=NUM_POSITIONS - 1)


@dataclass(frozen=True)
class _Table:
    """Weights ``[U]``, the side of each (0 chosen, 1 rejected) and whether it is at a clamp."""

    values: NDArray[np.float64]
    side: NDArray[np.int64]
    low: NDArray[np.bool_] | None
    high: NDArray[np.bool_] | None

    def line(self, selected: NDArray[np.bool_]) -> dict[str, Any]:
        """Number, mean weight of each side, and clamped shares of the units in ``selected`` ``[U]``."""
        return {
            "units": int(selected.sum()),
            **{side: _mean(self.values[selected & (self.side == i)]) for i, side in enumerate(_SIDES)},
            "clamped_low": None if self.low is None else _mean(self.low[selected]),
            "clamped_high": None if self.high is None else _mean(self.high[selected]),
        }

    def distribution(self, selected: NDArray[np.bool_]) -> dict[str, Any]:
        """Mean, standard deviation, quantiles and histogram of the weights in ``selected`` ``[U]``."""
        values = self.values[selected]
        if not values.size:
            return {"units": 0}
        counts, edges = np.histogram(values, bins=NUM_BINS)
        return {
            "units": int(values.size),
            "mean": float(values.mean()),
            "std": float(values.std()),
            "quantiles": {f"{q:g}": float(v) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)},
            "histogram": {"counts": counts.tolist(), "edges": [round(float(edge), 6) for edge in edges]},
            "clamped_low": None if self.low is None else _mean(self.low[selected]),
            "clamped_high": None if self.high is None else _mean(self.high[selected]),
        }


def _at_clamp(
    values: NDArray[np.float64], side: NDArray[np.int64], weighting: Weighting
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """``[U]`` whether each weight is the one at the lower and at the upper clamp."""
    ends = [clamp_weights(weighting.parameters, is_chosen=is_chosen) for is_chosen in (True, False)]
    if weighting.strategy in _NOT_CLAMPED or any(low == high for low, high in ends):
        return None, None
    at_low, at_high = np.array(ends).T
    return (
        np.isclose(values, at_low[side], rtol=1e-6, atol=0),
        np.isclose(values, at_high[side], rtol=1e-6, atol=0),
    )


def _types_of(prepared: PreparedPairs) -> NDArray[np.int64]:
    """``[sum S]`` index in `SPAN_TYPES` of each span of the prepared pairs, end spans included."""
    starts = np.concatenate([[0], np.cumsum(prepared.num_spans)])
    teacher, student = (
        np.bincount(
            (rows.unit + np.repeat(starts[:-1], np.diff(rows.row_starts)))[rows.unit >= 0], minlength=int(starts[-1])
        )
        for rows in (prepared.teacher, prepared.student)
    )
    return span_types(teacher, student)


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if values.size else None
