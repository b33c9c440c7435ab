"""Importance weights of every unit, from the signals of a contrastive pair of models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ctpd.core.config import Config
from ctpd.core.errors import NotFinite, listed
from ctpd.objectives.base import Aggregate, Granularity, Weighting
from ctpd.ops.weights import Signal, find_strategy
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.pipeline.stages.signals import SignalsStage
from harness.weights_summary import WeightsSummary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ctpd.ops.weights import WeightsResult
    from ctpd.text.prepare import PreparedPairs

WEIGHTS, SUMMARY = "weights.safetensors", "summary.json"


class WeightsConfig(Config):
    """Which weights, of which units."""

    weighting: Weighting
    """The strategy and its parameters."""
    granularity: Granularity
    """Units that are weighted: spans or tokens."""
    aggregate: Aggregate
    """How the log-probabilities of a unit's tokens are aggregated: sum or mean."""
    seed: int
    """Seed of the random strategies."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightsStage(Stage):
    """One weight per unit, with a summary and examples for the record."""

    kind = "weights"

    config: WeightsConfig
    pairs: PairsStage
    signals: Mapping[Signal, SignalsStage] = field(default_factory=dict)

    def build(self, work: Work) -> None:
        """Compute the weights."""
        import numpy as np
        from safetensors.numpy import save_file

        from ctpd.pipeline.rows import units_of
        from ctpd.pipeline.summaries import Units, weight_examples, weight_summary

        prepared = self.pairs.read(work)
        _, unit_starts = units_of(prepared, "student", self.config.granularity)
        marks = self._marks(prepared, unit_starts)
        result = self._result(work, prepared, unit_starts, marks)
        values = np.asarray(result.weights.numpy(), dtype=np.float32)
        refuse_non_finite_weights(values, prepared.pair_ids, unit_starts)
        save_file({"weights": values}, work.folder / WEIGHTS)
        summary = weight_summary(
            result,
            prepared,
            Units(unit_starts, marks),
            parameters=self.config.weighting.parameters,
            examples=weight_examples(prepared, values, unit_starts) if self.config.granularity == "spans" else (),
        )
        if summary.note is not None:
            work.remark(summary.note)
        (work.folder / SUMMARY).write_text(summary.model_dump_json(), encoding="utf-8")

    def values(self, work: Work) -> "NDArray[np.float32]":
        """One weight per unit, the units of all rows one after another."""
        import numpy as np
        from safetensors.numpy import load_file

        return np.asarray(load_file(work.path(self) / WEIGHTS)["weights"], dtype=np.float32)

    def summary(self, work: Work) -> WeightsSummary:
        """The distribution of the weights, per side, and examples."""
        return read_summary(work.path(self))

    def _result(
        self, work: Work, prepared: "PreparedPairs", unit_starts: "NDArray[np.int64]", marks: "NDArray[np.int8] | None"
    ) -> "WeightsResult":
        import torch

        from ctpd.ops.weights import UnitLayout, span_weights
        from ctpd.pipeline.rows import end_units, unit_signal

        config = self.config
        signals = {
            name: torch.from_numpy(
                unit_signal(
                    prepared, name.role, stage.logps(work), granularity=config.granularity, aggregate=config.aggregate
                )
            )
            for name, stage in self.signals.items()
        }
        units = UnitLayout(torch.from_numpy(unit_starts), torch.from_numpy(end_units(prepared, unit_starts)))
        return span_weights(
            config.weighting.strategy,
            signals,
            units,
            config.weighting.parameters,
            seed=config.seed,
            marks=None if marks is None else torch.from_numpy(marks),
        )

    def _marks(self, prepared: "PreparedPairs", unit_starts: "NDArray[np.int64]") -> "NDArray[np.int8] | None":
        """The data's marks per unit, 0 on end spans; None for units that are tokens, which have no character ranges."""
        import numpy as np

        from ctpd.pipeline.rows import end_units

        if prepared.marks is None or self.config.granularity != "spans":
            return None
        marks = np.zeros(int(unit_starts[-1]), dtype=np.int8)
        marks[~end_units(prepared, unit_starts)] = prepared.marks
        return marks


def refuse_non_finite_weights(
    values: "NDArray[np.float32]", pair_ids: Sequence[str], unit_starts: "NDArray[np.int64]"
) -> None:
    """Refuse weights that are NaN or infinite, by the ids of their pairs.

    Args:
        values: one a unit, the units of all rows one after another.
        pair_ids: pair i has the rows 2 i and 2 i + 1.
        unit_starts: where the units of each row begin.

    Raises:
        NotFinite: there is one.
    """
    import numpy as np

    if not np.isfinite(values).all():
        rows = np.searchsorted(unit_starts, np.flatnonzero(~np.isfinite(values)), side="right") - 1
        names = [pair_ids[pair] for pair in np.unique(rows // 2)]
        raise NotFinite(
            f"the importance weights of the pairs {listed(names)} are not finite",
            fix="Change the weighting's parameters, or correct the contrastive pair of models",
        )


def read_summary(folder: Path) -> WeightsSummary:
    """Read the summary of an artifact."""
    return WeightsSummary.model_validate_json((folder / SUMMARY).read_bytes())


def needed_signals(weighting: Weighting) -> list[Signal]:
    """The signals that a strategy reads, in a fixed order."""
    return sorted(find_strategy(weighting.strategy).needs)
