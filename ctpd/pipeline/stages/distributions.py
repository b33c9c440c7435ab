"""Store the part of a frozen model's distributions that an objective needs, for every scored token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctpd.core.config import Config
from ctpd.core.roles import Role
from ctpd.pipeline.references import Model
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.pairs import PairsStage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DISTRIBUTIONS = "distributions.safetensors"


class DistributionsConfig(Config):
    """What is stored of each distribution: the K likeliest tokens, or two log-probabilities."""

    role: Role
    """The model whose tokens are scored."""
    precision: str
    """Number format of the model's weights: float32 or bfloat16."""
    top_k: int | None = None
    """The K likeliest tokens with their log-probabilities."""
    temperature: float = 1.0
    """Softmax temperature of these log-probabilities."""
    boundary: bool = False
    """Store instead the log-probability of the token and that of a boundary after it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DistributionsStage(Stage):
    """One scoring pass of a frozen model over all pairs."""

    kind = "distributions"
    version = 3
    collective = True

    config: DistributionsConfig
    pairs: PairsStage
    model: Model

    def build(self, work: Work) -> None:
        """Score every response token."""
        from safetensors.numpy import save_file

        from ctpd.pipeline.training import scored

        measure = self._measure(work)
        kept = scored(work, self.model.located(work), self.pairs.read(work), self.config, measure)
        if work.writes:
            save_file(kept, work.folder / DISTRIBUTIONS)

    def arrays(self, work: Work) -> "Mapping[str, NDArray[np.generic]]":
        """The stored arrays by name; the first axis counts scored tokens."""
        from safetensors.numpy import load_file

        found: Mapping[str, NDArray[np.generic]] = load_file(work.path(self) / DISTRIBUTIONS)
        return found

    def _measure(self, work: Work) -> Any:
        from ctpd.ops.boundaries import boundary_ids
        from ctpd.pipeline.vocabularies import model_facts
        from ctpd.train.scoring import logps_with_boundary, top_k

        if self.config.boundary:
            facts = model_facts(self.model.located(work))
            return logps_with_boundary(boundary_ids(facts.tokens, facts.special_ids))
        assert self.config.top_k is not None
        return top_k(self.config.top_k, self.config.temperature)
