"""Make the rows that a training scores from prepared pairs and stored signals: units, references, weights."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ctpd.core.errors import UserError
from ctpd.core.roles import Role
from ctpd.objectives.base import Aggregate, Granularity, Layout, Side
from ctpd.ops.spans import flat_unit_sums
from ctpd.text.blocks import TokenRows
from ctpd.text.prepare import PreparedPairs
from ctpd.train.collator import ScoredRows


def units_of(
    prepared: PreparedPairs, role: Role, granularity: Granularity
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The unit of each token of one model's rows (-1: none), and where each row's units begin.

    With `granularity: tokens` every scored token is a unit of its own.
    """
    rows = token_rows(prepared, role)
    if granularity == "spans":
        return rows.unit, starts_of(prepared.num_spans)
    scored = rows.unit >= 0
    before = np.concatenate([[0], np.cumsum(scored)])
    first = before[rows.row_starts[:-1]]
    index = before[:-1] - np.repeat(first, np.diff(rows.row_starts))
    unit = np.where(scored, index, -1).astype(np.int32)
    return unit, starts_of(np.diff(before[rows.row_starts]))


def unit_signal(
    prepared: PreparedPairs, role: Role, logps: NDArray[np.float32], *, granularity: Granularity, aggregate: Aggregate
) -> NDArray[np.float32]:
    """Aggregate a stored signal (one value per token of the model ``role``) to one value per unit, flat."""
    unit, unit_starts = units_of(prepared, role, granularity)
    sums = flat_unit_sums(
        torch.from_numpy(logps),
        torch.from_numpy(unit),
        token_starts=torch.from_numpy(token_rows(prepared, role).row_starts),
        unit_starts=torch.from_numpy(unit_starts),
        aggregate=aggregate,
    )
    return np.asarray(sums.numpy(), dtype=np.float32)


def end_units(prepared: PreparedPairs, unit_starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which units are end spans: the last unit of every row that has an end token."""
    is_end = np.zeros(int(unit_starts[-1]), dtype=bool)
    is_end[unit_starts[1:][prepared.has_end] - 1] = True
    return is_end


class Constants(NamedTuple):
    """Precomputed values of the rows that stay constant during training.

    Attributes:
        reference: the role whose tokens were scored, and the reference model's log-probability of each of these tokens.
        weights: importance weights, one per unit, the units of all rows one after another.
    """

    reference: tuple[Role, NDArray[np.float32]] | None = None
    weights: NDArray[np.float32] | None = None


def scored_rows(
    prepared: PreparedPairs,
    *,
    role: Role,
    layout: Layout,
    sides: Sequence[Side],
    split: str,
    constants: Constants = Constants(),  # noqa: B008 (immutable)
) -> ScoredRows:
    """The rows of one split as the model ``role`` scores them for an objective with this layout.

    Args:
        sides: the responses that are scored, the preferred one first.
        constants: reference and weights.

    Raises:
        UserError: the split has no pairs.
    """
    unit, unit_starts = units_of(prepared, role, layout.granularity)
    is_end = end_units(prepared, unit_starts)
    pairs = np.flatnonzero(np.array([name == split for name in prepared.split], dtype=bool))
    if not len(pairs):
        raise UserError(f"there is no usable pair in the split '{split}'")
    columns = {"chosen": 2 * pairs, "rejected": 2 * pairs + 1}
    items = np.stack([columns[side] for side in sides], axis=1)
    rows = token_rows(prepared, role)
    reference = constants.reference
    return ScoredRows(
        input_ids=rows.input_ids,
        row_starts=rows.row_starts,
        unit=unit,
        unit_starts=unit_starts,
        counted=np.ones_like(is_end) if layout.end_span else ~is_end,
        items=items.astype(np.int64),
        reference=None if reference is None else _unit_reference(prepared, reference, layout),
        weights=constants.weights,
        names=tuple(prepared.pair_ids[pair] for pair in pairs),
    )


def _unit_reference(
    prepared: PreparedPairs, reference: tuple[Role, NDArray[np.float32]], layout: Layout
) -> NDArray[np.float32]:
    role, logps = reference
    return unit_signal(prepared, role, logps, granularity=layout.granularity, aggregate=layout.aggregate)


def text_rows(token_ids: Sequence[Sequence[int]]) -> ScoredRows:
    """Rows of whole texts, of which every token but the first is scored (pretraining)."""
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    row_starts = starts_of(lengths)
    position = np.arange(row_starts[-1]) - np.repeat(row_starts[:-1], lengths)
    unit_starts = starts_of(lengths - 1)
    return ScoredRows(
        input_ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids in token_ids]),
        row_starts=row_starts,
        unit=(position - 1).astype(np.int32),
        unit_starts=unit_starts,
        counted=np.ones(int(unit_starts[-1]), dtype=bool),
        items=np.arange(len(lengths), dtype=np.int64)[:, None],
    )


def token_rows(prepared: PreparedPairs, role: Role) -> TokenRows:
    """The rows of one model."""
    return prepared.teacher if role == "teacher" else prepared.student


def scored_positions(rows: TokenRows, row: int) -> NDArray[np.int64]:
    """The indices, among all tokens, of the scored tokens of one row."""
    start, end = rows.row_starts[row], rows.row_starts[row + 1]
    return np.asarray(np.flatnonzero(rows.unit[start:end] >= 0) + start, dtype=np.int64)


def prompts_of(rows: TokenRows) -> list[NDArray[np.int32]]:
    """The tokens before the chosen response of each pair."""
    firsts = range(0, len(rows.row_starts) - 1, 2)
    return [rows.input_ids[rows.row_starts[row] : scored_positions(rows, row)[0]] for row in firsts]


def starts_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Start indices of consecutive segments with these lengths, and their total."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
