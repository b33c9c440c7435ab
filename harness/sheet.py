"""What a table is made of: its declaration, its rows and cells. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from harness.published import Published
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


@dataclass(frozen=True, slots=True)
class Row:
    """One line. ``cells`` has a cell per column and one for the Average; None where nothing was measured.

    A row with a score that is not finite has no ranks, and nothing compares it with the base.

    ``seeds`` are those measured, ``missing_seeds`` those that other rows have; a row without any record has
    ``missing`` set. What compares the row with the table's base, None for the base itself: ``difference`` of the Average
    over documents, ``p_value`` of it with Holm's correction over the table (``p_is_bound``: it is no larger, and the bootstrap
    has too few samples to say how small), ``seed_difference`` over seed means,
    ``differences`` by column, and ``mcnemar`` by column and seed (0/1 scores only; p-values corrected over all of the
    table's tests).

    ``faults`` says what is wrong with the answers that the row's models generate, a clause each (``harness.health.faults``).
    """

    label: str
    run: str
    cells: tuple[Cell | None, ...]
    seeds: tuple[int | None, ...]
    missing_seeds: tuple[int, ...]
    missing: bool
    difference: Interval | None = None
    differences: Mapping[str, Interval] | None = None
    p_value: float | None = None
    p_is_bound: bool = False
    seed_difference: Interval | None = None
    mcnemar: Mapping[str, Mapping[int | None, McNemar]] | None = None
    faults: tuple[str, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether all measured scores are numbers."""
        return all(cell is None or cell.mean is not None or cell.unmeasured for cell in self.cells)


@dataclass(frozen=True, slots=True)
class Table:
    """A finished table: ``columns`` without the Average, ``partial`` those evaluated on a part of the documents."""

    spec: TableSpec
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    partial: tuple[str, ...]
    footnotes: tuple[str, ...]
    published: Published | None

    @property
    def base_label(self) -> str | None:
        """Label of the row that differences are taken to."""
        return next((row.label for row in self.rows if row.run == self.spec.base), None)
