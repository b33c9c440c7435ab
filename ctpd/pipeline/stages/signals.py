"""Log-probabilities of a frozen model, one per token of every response."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ctpd.core.config import Config
from ctpd.core.roles import Role
from ctpd.pipeline.references import Model
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.pairs import PairsStage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIGNAL = "signal.safetensors"


class SignalsConfig(Config):
    """Which tokens are scored, and how."""

    role: Role
    """The model whose tokens are scored."""
    precision: str
    """Number format of the model's weights: float32 or bfloat16."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SignalsStage(Stage):
    """One scoring pass of a frozen model over all pairs."""

    kind = "signals"
    version = 2
    collective = True

    config: SignalsConfig
    pairs: PairsStage
    model: Model

    def build(self, work: Work) -> None:
        """Score every response token."""
        import numpy as np
        from safetensors.numpy import save_file

        from ctpd.pipeline.rows import token_rows
        from ctpd.pipeline.training import scored
        from ctpd.train.scoring import TOKEN_LOGPS, token_logps

        prepared = self.pairs.read(work)
        rows = token_rows(prepared, self.config.role)
        kept = scored(work, self.model.located(work), prepared, self.config, token_logps)
        logps = np.zeros(len(rows.input_ids), dtype=np.float32)
        logps[rows.unit >= 0] = kept[TOKEN_LOGPS]
        if work.writes:
            save_file({"logps": logps}, work.folder / SIGNAL)

    def logps(self, work: Work) -> "NDArray[np.float32]":
        """One value per token of the model's rows, in nats; 0 for tokens that are not scored."""
        import numpy as np
        from safetensors.numpy import load_file

        return np.asarray(load_file(work.path(self) / SIGNAL)["logps"], dtype=np.float32)
