"""The one data step of a comparison: pairs become rows of tokens and aligned spans, the same for all stages (docs/method.md#data-step).

Shapes: N pairs; R = 2N rows, row 2i the chosen and row 2i + 1 the rejected response of pair i. Ragged arrays are flat,
row r in ``[starts[r], starts[r + 1])``. Spans are numbered from 0 in each row; an end span is the last of its row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd.core.errors import UserError
from ctpd.text.align import row_starts
from ctpd.text.blocks import Block, TokenRows, build_block
from ctpd.text.config import PairsConfig
from ctpd.text.pairs import DROP_REASONS, Dropped, Pair, ReadPairs
from ctpd.text.render import TemplatedTokenizer

_ALWAYS = DROP_REASONS[:4]  # counted even where there are none
_ARRAYS = ("num_spans", "has_end", "boundaries", "boundary_starts")
_TEXTS = ("pair_ids", "split", "prompts", "chosen", "rejected")
_BLOCK = 512  # pairs tokenized at once; bounds the memory of the tokenizers' output
_FIX = (
    "Correct the data; raise max_prompt_tokens or set `long_prompt: cut` if prompts are too long; "
    "raise max_dropped if dropping them is intended"
)


class Loss(NamedTuple):
    """A dropped pair: its split, the name of what it was read from, its row there and the reason."""

    split: str
    source: str
    row: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PreparedPairs:
    """N pairs as both models read them, and the spans that their tokens share."""

    teacher: TokenRows
    student: TokenRows
    num_spans: NDArray[np.int32]  # [R] end span included
    has_end: NDArray[np.bool_]  # [R] a cut response has no end span
    boundaries: NDArray[np.int32]  # flat: character ends of the spans of the response, without the end span
    boundary_starts: NDArray[np.int64]  # [R + 1]
    marks: NDArray[np.int8] | None  # one per boundary: +1 right, -1 wrong, 0 neutral; None without marks
    pair_ids: tuple[str, ...]
    split: tuple[str, ...]  # per pair
    prompts: tuple[str, ...]  # the last user message, as trained on
    chosen: tuple[str, ...]  # the responses, as trained on
    rejected: tuple[str, ...]
    dropped: dict[str, int]  # pairs by reason, over all splits
    report: dict[str, int | float]  # counts over all splits; `SPLIT_NAME` are those of one split
    losses: tuple[Loss, ...] = ()  # each dropped pair; not part of `texts`


class _Selection(NamedTuple):
    """The selected pairs of one split."""

    pairs: list[Pair]
    num_seen: int  # rows examined for the selection
    dropped: list[Dropped]  # of these


def prepare_pairs(
    pairs: Mapping[str, Sequence[Pair] | ReadPairs],
    config: PairsConfig,
    *,
    teacher: TemplatedTokenizer,
    student: TemplatedTokenizer,
) -> PreparedPairs:
    """Render, tokenize, align and cut the pairs of every split.

    Args:
        pairs: pairs by the name of their split, with the rows that are none.
        config: which pairs are used, and their lengths.
        teacher: how the teacher reads text.
        student: how the student does; it may be the same.

    Returns:
        The pairs, split after split, in the order given.

    Raises:
        UserError: too many pairs dropped, none left, or a template that reaches a limit.
    """
    blocks: list[tuple[str, Block]] = []
    losses: list[Loss] = []
    by_split: dict[str, int] = {}
    for split, found in pairs.items():
        given = found if isinstance(found, ReadPairs) else ReadPairs(found)
        selection = _select(given, sides=(teacher, student), select=config.select, limit=config.limit)
        built = [
            build_block(
                selection.pairs[i : i + _BLOCK],
                sides=(teacher, student),
                max_tokens=config.max_tokens,
                max_prompt_tokens=config.max_prompt_tokens,
                cut_prompts=config.long_prompt == "cut",
                where=f"split '{split}'",
            )
            for i in range(0, len(selection.pairs), _BLOCK)
        ]
        late = [loss for block in built for loss in block.dropped]
        _refuse_losses(split, selection, late, max_dropped=config.max_dropped)
        of_split = sorted([*selection.dropped, *late], key=lambda loss: _row_order(loss.row))
        losses += [Loss(split, given.source, *loss) for loss in of_split]
        by_split |= _counts_of_split(split, built, num_dropped=len(of_split))
        blocks += [(split, block) for block in built]
    if not blocks:
        raise UserError("there are no pairs", fix="Name at least one split")
    return _concatenated(blocks, losses, by_split)


def _counts_of_split(split: str, blocks: Sequence[Block], *, num_dropped: int) -> dict[str, int]:
    """Pairs, dropped pairs, cut responses and cut prompts of one split, by names that begin with the split's."""
    report = _total(block.report for block in blocks)
    counts = {"pairs": sum(len(block.pairs) for block in blocks), "dropped": num_dropped}
    counts |= {name: report[name] for name in ("responses_cut", "cut_prompts")}
    return {f"{split}_{name}": number for name, number in counts.items()}


def arrays(prepared: PreparedPairs) -> dict[str, NDArray[Any]]:
    """The arrays of prepared pairs by name. `texts` returns the other fields; `from_arrays` is the inverse of both."""
    sides = {"teacher": prepared.teacher, "student": prepared.student}
    result = {
        f"{name}.{field.name}": getattr(rows, field.name) for name, rows in sides.items() for field in fields(rows)
    }
    result |= {name: getattr(prepared, name) for name in _ARRAYS}
    return result if prepared.marks is None else {**result, "marks": prepared.marks}


def texts(prepared: PreparedPairs) -> dict[str, Any]:
    """The fields of prepared pairs that are not arrays, as JSON."""
    lists = {name: list(getattr(prepared, name)) for name in _TEXTS}
    return {**lists, "dropped": prepared.dropped, "report": prepared.report}


def from_arrays(arrays: Mapping[str, NDArray[Any]], texts: Mapping[str, Any]) -> PreparedPairs:
    """Make prepared pairs from the results of `arrays` and `texts`."""
    teacher, student = (
        TokenRows(**{field.name: arrays[f"{name}.{field.name}"] for field in fields(TokenRows)})
        for name in ("teacher", "student")
    )
    parts: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    parts |= {name: tuple(texts[name]) for name in _TEXTS}
    parts |= {name: dict(texts[name]) for name in ("dropped", "report")}
    return PreparedPairs(teacher=teacher, student=student, marks=arrays.get("marks"), **parts)


def _select(given: ReadPairs, *, sides: Sequence[TemplatedTokenizer], select: str, limit: int | None) -> _Selection:
    dropped: list[Dropped] = []
    valid: list[Pair] = []
    last = None
    for pair in given.pairs:
        if select == "all" and limit is not None and len(valid) == limit:
            break
        last = pair
        reason = _invalid(pair, sides)
        if reason is None:
            valid.append(pair)
        else:
            dropped.append(Dropped(pair.id, reason))
    whole = last is None or last is given.pairs[-1]
    seen = [loss for loss in given.dropped if whole or _row_order(loss.row) < _row_order(last.id)]  # type: ignore[union-attr]
    num_seen = len(valid) + len(dropped) + len(seen)
    if select == "shortest":
        order = sorted(range(len(valid)), key=lambda i: valid[i].num_characters)  # stable: the earlier of two equals
        valid = [valid[i] for i in sorted(order[:limit])]
    return _Selection(valid, num_seen, [*seen, *dropped])


def _row_order(row: str) -> tuple[int, str]:
    return (int(row), row) if row.isdecimal() else (0, row)


def _invalid(pair: Pair, sides: Sequence[TemplatedTokenizer]) -> str | None:
    """The reason to drop a pair before tokenization, or None (docs/method.md#dropped-pairs)."""
    if not (pair.chosen and pair.rejected):
        return "empty"
    if pair.chosen == pair.rejected:
        return "equal"
    contents = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
    return "special_token_text" if any(side.holds_special_text(text) for side in sides for text in contents) else None


def _refuse_losses(split: str, selection: _Selection, late: Sequence[Dropped], *, max_dropped: float) -> None:
    """Refuse a split if more than ``max_dropped`` of its pairs are dropped, before and after the selection together."""
    losses = [*selection.dropped, *late]
    total = Counter(loss.reason for loss in losses)
    reasons = ", ".join(f"{reason} {total[reason]}" for reason in DROP_REASONS if total[reason])
    if (example := next((loss for loss in losses if loss.detail), None)) is not None:
        reasons += f"; row {example.row}: {example.detail}"
    if len(selection.pairs) == len(late):
        raise UserError(
            f"no usable row is left of {selection.num_seen} ({reasons or 'the split is empty'})",
            where=f"split '{split}'",
            fix=_FIX,
        )
    kept = (1 - len(selection.dropped) / selection.num_seen) * (1 - len(late) / len(selection.pairs))
    if 1 - kept > max_dropped + 1e-9:
        raise UserError(
            f"{len(losses)} of {selection.num_seen} rows are dropped ({reasons}), {100 * (1 - kept):.1f} % of the "
            f"selected ones; at most {100 * max_dropped:g} % may be (max_dropped)",
            where=f"split '{split}'",
            fix=_FIX,
        )


def _concatenated(
    blocks: Sequence[tuple[str, Block]], losses: Sequence[Loss], by_split: Mapping[str, int]
) -> PreparedPairs:
    parts = [block for _, block in blocks]
    pairs = [pair for block in parts for pair in block.pairs]
    dropped = Counter(loss.reason for loss in losses)
    has_marks = any(pair.chosen_marks or pair.rejected_marks for pair in pairs)
    return PreparedPairs(
        teacher=_concatenated_rows([block.teacher for block in parts]),
        student=_concatenated_rows([block.student for block in parts]),
        num_spans=np.concatenate([block.num_spans for block in parts]),
        has_end=np.concatenate([block.has_end for block in parts]),
        boundaries=np.concatenate([block.boundaries for block in parts]),
        boundary_starts=row_starts(np.concatenate([block.boundary_counts for block in parts])),
        marks=np.concatenate([block.marks for block in parts]) if has_marks else None,
        pair_ids=tuple(pair.id for pair in pairs),
        split=tuple(split for split, block in blocks for _ in block.pairs),
        prompts=tuple(pair.prompt[-1].content for pair in pairs),
        chosen=tuple(pair.chosen for pair in pairs),
        rejected=tuple(pair.rejected for pair in pairs),
        dropped=dict.fromkeys(_ALWAYS, 0) | {name: dropped[name] for name in DROP_REASONS if dropped[name]},
        losses=tuple(losses),
        report={"pairs": len(pairs), **_total(block.report for block in parts), **by_split},
    )


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    """The sum of counters; counts of zero are kept."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _concatenated_rows(rows: Sequence[TokenRows]) -> TokenRows:
    return TokenRows(
        input_ids=np.concatenate([part.input_ids for part in rows]),
        row_starts=row_starts(np.concatenate([np.diff(part.row_starts) for part in rows])),
        unit=np.concatenate([part.unit for part in rows]),
    )
