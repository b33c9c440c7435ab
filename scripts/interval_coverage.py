"""How often the intervals of a comparison hold the true difference: simulated studies, as the table of docs/statistics.md.

    python scripts/interval_coverage.py

Shape legend: M studies, C columns, S seeds, D documents, N draws.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from harness.statistics import Interval, Paired, crossed_bootstrap

GAIN = 0.05
"""The true difference of every column."""
NAIVE_DRAWS = 500
PORTION = 500
"""Studies that are in memory at once."""

Floats = NDArray[np.float64]


class Design(NamedTuple):
    """What is simulated.

    Attributes:
        seeds: trainings of each method; the same seeds for both.
        documents: of each column.
        columns: of which the Average is judged.
        sd: standard deviation of the effect of a training on a system's true score, in score units.
        base_has_seeds: whether the base is trained per seed as well.
    """

    seeds: int
    documents: int
    columns: int
    sd: float
    base_has_seeds: bool


DESIGNS = [
    Design(seeds, documents, columns, sd, base_has_seeds)
    for seeds, documents, columns in ((2, 200, 3), (3, 200, 3), (5, 200, 3), (10, 200, 3))
    for base_has_seeds in (True, False)
    for sd in (0.0, 0.02, 0.04)
]


def simulate(design: Design, *, studies: int, rng: np.random.Generator) -> list[Paired]:
    """Differences of answers that are right or wrong, in so many studies.

    A document has a difficulty, from 0.25 to 0.65, and the gain is not the same on all documents (standard deviation 0.1).
    A training moves a system's score, half of the variance in all columns together and half in each alone. The answer
    of one seed to one document is drawn anew.
    """
    num_seeds, shape = design.seeds, (studies, design.columns, design.seeds, design.documents)
    difficulty = rng.uniform(0.25, 0.65, size=(*shape[:2], 1, shape[3]))
    gain = GAIN + np.clip(rng.normal(0.0, 0.1, size=difficulty.shape), -0.15, 0.15)

    def training() -> Floats:
        shared, own = rng.normal(size=(studies, 1, num_seeds, 1)), rng.normal(size=(*shape[:3], 1))
        return np.asarray(design.sd * (shared + own) / 2**0.5)

    system = rng.random(shape) < difficulty + gain + training()
    if design.base_has_seeds:
        base = rng.random(shape) < difficulty + training()
    else:
        base = rng.random(difficulty.shape) < difficulty
    found_MCSD = system.astype(np.float64) - base
    names = [f"column {number}" for number in range(design.columns)]
    return [Paired(tuple(range(num_seeds)), dict(zip(names, study, strict=True))) for study in found_MCSD]


def coverage(intervals: Sequence[Interval]) -> float:
    """Share of the intervals that hold the true difference."""
    return float(np.mean([low <= GAIN <= high for _, low, high in intervals]))


def t_intervals(pairs: Sequence[Paired]) -> list[Interval]:
    """Student's, of one Average a seed: the documents are taken as given."""
    found = []
    for pair in pairs:
        means_S = np.mean([values.mean(axis=1) for values in pair.columns.values()], axis=0)
        half = special.stdtrit(len(means_S) - 1, 0.975) * means_S.std(ddof=1) / len(means_S) ** 0.5
        found.append(Interval(means_S.mean(), means_S.mean() - half, means_S.mean() + half))
    return found


def naive_intervals(pairs: Sequence[Paired], rng: np.random.Generator) -> list[Interval]:
    """Percentiles of the bootstrap that resamples seeds and documents with replacement, and corrects nothing."""
    seeds_NS = _counts(len(pairs[0].seeds), rng)
    by_column = {name: _counts(values.shape[1], rng) for name, values in pairs[0].columns.items()}
    found = []
    for pair in pairs:
        drawn = [((seeds_NS @ pair.columns[name]) * docs_ND).sum(axis=1) for name, docs_ND in by_column.items()]
        low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
        found.append(Interval(float(np.mean([values.mean() for values in pair.columns.values()])), low, high))
    return found


def _counts(size: int, rng: np.random.Generator) -> Floats:
    return np.asarray(rng.multinomial(size, np.full(size, 1 / size), size=NAIVE_DRAWS) / size)


def line(design: Design, *, studies: int, rng: np.random.Generator) -> list[str]:
    """The design, how many of four intervals hold the truth in percent, and half the width of ours in points."""
    found: list[list[Interval]] = [[], [], [], []]
    for _ in range(studies // PORTION):
        pairs = simulate(design, studies=PORTION, rng=rng)
        alone = crossed_bootstrap([pair.given_seeds() for pair in pairs]).average
        ours = crossed_bootstrap(pairs).average
        for kept, intervals in zip(found, (alone, t_intervals(pairs), naive_intervals(pairs, rng), ours), strict=True):
            kept.extend(intervals)
    width = 100 * float(np.mean([high - low for _, low, high in found[-1]])) / 2
    return [
        str(design.seeds),
        f"{design.columns} × {design.documents}",
        "seeds" if design.base_has_seeds else "none",
        f"{100 * design.sd:.0f}",
        *(f"{100 * coverage(intervals):.1f}" for intervals in found),
        f"{width:.1f}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How often the intervals of a comparison hold the true difference.")
    parser.add_argument(
        "--studies", type=int, default=2000, help=f"simulated studies of a line, a multiple of {PORTION}"
    )
    options = parser.parse_args()
    header = [
        "seeds",
        "documents",
        "base",
        "sd",
        "documents alone",
        "t over seeds",
        "naive crossed",
        "**ours**",
        "± points",
    ]
    made = (line(one, studies=options.studies, rng=np.random.default_rng(number)) for number, one in enumerate(DESIGNS))
    for cells in itertools.chain((header, ["---:"] * len(header)), made):
        print("| " + " | ".join(cells) + " |", flush=True)
