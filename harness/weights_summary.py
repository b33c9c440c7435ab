"""What a record says of the importance weights of its row."""

from typing import NamedTuple

from ctpd.core.config import Config


class Histogram(Config):
    """Counts between neighbouring ``edges``, one more than counts."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]


class SideWeights(Config):
    """The distribution of the weights of all chosen, or of all rejected, responses.

    ``clamps`` are the weights of a log ratio at the lower and at the upper clamp; None where each response is scaled anew.
    """

    mean: float
    std: float
    histogram: Histogram
    clamps: tuple[float, float] | None


class Auroc(Config):
    """How well the log ratio tells right from wrong units, where the data says which are; None without both kinds."""

    chosen: float | None
    rejected: float | None
    pooled: float | None


class WeightedSpan(NamedTuple):
    """The text of an aligned span and its importance weight."""

    text: str
    weight: float


class WeightedPair(Config):
    """An example: the spans of both responses, in order."""

    prompt: str
    chosen: tuple[WeightedSpan, ...]
    rejected: tuple[WeightedSpan, ...]


class WeightsSummary(Config):
    """Importance weights of all units (spans or tokens); end units, whose weight is 1, are left out.

    ``clamped_low`` and ``clamped_high`` are shares of the units whose log ratio lies outside the clamps.
    ``note`` says so where all weights of a response are nearly equal, with the cause.
    """

    units: int
    mean: float
    clamped_low: float
    clamped_high: float
    chosen: SideWeights
    rejected: SideWeights
    auroc: Auroc | None = None
    examples: tuple[WeightedPair, ...] = ()
    note: str | None = None
