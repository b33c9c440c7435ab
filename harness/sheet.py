"""What a table is made of: its declaration, its rows and cells. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from harness.published import Published, Reported
from harness.statistics import Interval, McNemar

AVERAGE = "Average"


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table that a recipe declares.

    Attributes:
        name: stem of its files.
        caption: one sentence.
        rows: (label, run) in the order shown.
        base: the run that differences are taken to; None for a table without differences.
        note: a footnote of the recipe's own.
        unranked: runs that are shown, but are neither best nor second, such as the teacher.
        published: name of a table in ``harness/published`` to show below, apart.
    """

    name: str
    caption: str
    rows: tuple[tuple[str, str], ...]
    base: str | None = None
    note: str | None = None
    unranked: tuple[str, ...] = ()
    published: str | None = None


class Cell(NamedTuple):
    """One score: mean over seeds, their standard deviation (None below two) and rank (1 best, 2 second, else None).

    The mean is None where the score of a seed, or of a document, is not finite, and where the column cannot be measured on
    the row's models (``unmeasured``).
    """

    mean: float | None
    spread: float | None
    num_seeds: int
    rank: int | None = None
    unmeasured: bool = False


class Rank(NamedTuple):
    """Place of a row among the trained rows of its table, 1 for the highest score, with the ends of its interval."""

    value: int
    low: int
    high: int


class Start(NamedTuple):
    """How a trained row's Average stands to that of the untrained student that it started from.

    Attributes:
        run: of the untrained student.
        difference: to it, over seeds and documents; of one seed over documents alone.
        is_below: whether the Average is lower.
        is_clear: whether it is significantly lower, with Holm's correction over the table; never of one seed.
    """

    run: str
    difference: Interval
    is_below: bool
    is_clear: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line. ``cells`` has a cell per column and one for the Average; None where nothing was measured.

    A row with a score that is not finite has no ranks, and nothing compares it with the base.

    ``seeds`` are those measured, ``missing_seeds`` those that other rows have; a row without any record has
    ``missing`` set. ``marks`` stand behind the label, and a footnote says what each means.

    What compares the row with the table's base, None for the base itself: ``difference`` of the Average and
    ``differences`` by column, over seeds and documents, from ``paired_seeds``, which are (None,) where neither row is
    trained per seed; ``given_seeds``, the Average's over documents alone; ``p_value`` of ``difference`` with Holm's
    correction over the table, None of one seed (``p_is_bound``: it is no larger, and the bootstrap has too few samples to
    say how small); and ``mcnemar`` by column and seed (0/1 scores only; p-values corrected over all of the table's tests).

    ``ranks`` has one per column, None where nothing was measured, and one for the Average; empty for a row that is not trained, and where no two rows have
    two seeds in common. ``start`` is None for a row that is not trained, and without an untrained student.

    ``faults`` says what is wrong with the answers that the row's models generate, a clause each (``harness.health.faults``).
    """

    label: str
    run: str
    cells: tuple[Cell | None, ...]
    seeds: tuple[int | None, ...]
    missing_seeds: tuple[int, ...]
    missing: bool
    marks: tuple[str, ...] = ()
    difference: Interval | None = None
    differences: Mapping[str, Interval] | None = None
    paired_seeds: tuple[int | None, ...] = ()
    given_seeds: Interval | None = None
    p_value: float | None = None
    p_is_bound: bool = False
    mcnemar: Mapping[str, Mapping[int | None, McNemar]] | None = None
    ranks: tuple[Rank | None, ...] = ()
    start: Start | None = None
    faults: tuple[str, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether all measured scores are numbers."""
        return all(cell is None or cell.mean is not None or cell.unmeasured for cell in self.cells)

    @property
    def title(self) -> str:
        """The label and its marks."""
        return " ".join((self.label, *self.marks))

    @property
    def has_one_training(self) -> bool:
        """Whether the comparison with the base is of a single training, whose chance no interval can hold."""
        return len(self.paired_seeds) == 1 and self.paired_seeds[0] is not None


@dataclass(frozen=True, slots=True)
class Table:
    """A finished table: ``columns`` without the Average, ``partial`` those evaluated on a part of the documents.

    ``reported`` are rows of others, which are shown last: never ranked, never compared.
    """

    spec: TableSpec
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    partial: tuple[str, ...]
    footnotes: tuple[str, ...]
    published: Published | None
    reported: tuple[Reported, ...] = ()

    @property
    def base_label(self) -> str | None:
        """Label of the row that differences are taken to."""
        return next((row.label for row in self.rows if row.run == self.spec.base), None)
