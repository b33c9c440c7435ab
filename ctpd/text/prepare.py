"""The one data step of a comparison: pairs become rows of tokens and aligned spans, the same for all stages (docs/method.md#data-step).

Shapes: N pairs; R = 2N rows, row 2i the chosen and row 2i + 1 the rejected response of pair i. Ragged arrays are flat,
row r in ``[starts[r], starts[r + 1])``. Spans are numbered from 0 in each row; an end span is the last of its row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd.core.errors import UserError
from ctpd.text.align import row_starts
from ctpd.text.blocks import Block, TokenRows, build_block
from ctpd.text.config import PairsConfig
from ctpd.text.pairs import DROP_REASONS, Dropped, Pair, ReadPairs
from ctpd.text.render import TemplatedTokenizer, unknown_id

_ALWAYS = DROP_REASONS[:4]  # counted even where there are none
_ARRAYS = ("num_spans", "has_end", "boundaries", "boundary_starts")
TEXTS = ("pair_ids", "split", "prompts", "chosen", "rejected")
"""The fields of `PreparedPairs` with one text per pair."""
STARTS = "_starts"
"""What the names of arrays end in that hold where rows begin."""
_BLOCK = 512  # pairs tokenized at once; bounds the memory of the tokenizers' output
_FIX = (
    "Correct the data; raise max_prompt_tokens or set `long_prompt: cut` if prompts are too long; "
    "raise max_dropped if dropping them is intended"
)
_MUCH_UNKNOWN = 0.5  # of the scored tokens of a split; a mark for a space stands before the token of an unknown word
_FEW = 10  # pairs whose texts may be unknown to a tokenizer by chance
_TEMPLATE_FIX = (
    "Give a template that renders these rows (`ctpd inspect template` shows what it makes of conversations), or correct the "
    "data; raise max_dropped if dropping them is intended"
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
    losses: tuple[Loss, ...] = ()  # each dropped pair; not stored with the pairs


class Piece(NamedTuple):
    """One block of prepared pairs: arrays by name and one text per pair. All of them in order, joined, are the whole.

    Arrays whose name ends in ``_starts`` hold the lengths of the rows.
    """

    arrays: dict[str, NDArray[Any]]
    texts: dict[str, list[str]]


class Preparation:
    """Renders, tokenizes, aligns and cuts the pairs of every split, block by block, so that memory is bounded.

    Args:
        pairs: the rows of each split.
        config: which pairs are used, and their lengths.
        teacher: how the teacher reads text.
        student: how the student does; it may be the same.

    Attributes, complete when all `pieces` are read:
        losses: each dropped pair.
        report: counts over all splits; `SPLIT_NAME` are those of one split.
        dropped: number of pairs by reason, over all splits.
        num_pairs: pairs that are kept.
        has_marks: whether a pair has marks; the marks of the pieces are all 0 otherwise.
        end_tokens: what ends the responses of each model, and what says so: its template, or what else.
    """

    def __init__(
        self,
        pairs: Mapping[str, ReadPairs],
        config: PairsConfig,
        *,
        teacher: TemplatedTokenizer,
        student: TemplatedTokenizer,
    ) -> None:
        self._pairs, self._config, self._sides = pairs, config, (teacher, student)
        self.losses: list[Loss] = []
        self.num_pairs, self.has_marks = 0, False
        self._counts: Counter[str] = Counter()  # over all splits
        self._by_split: dict[str, int] = {}
        self._end_ids: tuple[set[int], set[int]] = (set(), set())  # of teacher and student

    @property
    def end_tokens(self) -> dict[str, str]:
        """By the name of the model: the tokens, and in brackets where they are from."""
        found = {}
        for side, ids in zip(self._sides, self._end_ids, strict=True):
            tokens = [str(side.tokenizer.convert_ids_to_tokens(end)) for end in sorted(ids)]
            origins = ", ".join(sorted(side.ends_from))
            found[side.name] = f"{', '.join(tokens) or 'none: every response is cut'} ({origins})"
        return found

    @property
    def report(self) -> dict[str, int | float]:
        """Counts over all splits, then those of each."""
        return {"pairs": self.num_pairs, **self._counts, **self._by_split}

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped pairs by reason."""
        found = Counter(loss.reason for loss in self.losses)
        return dict.fromkeys(_ALWAYS, 0) | {name: found[name] for name in DROP_REASONS if found[name]}

    def pieces(self) -> Iterator[Piece]:
        """The blocks of prepared pairs, split after split, in the order given.

        Raises:
            UserError: too many pairs dropped, none left, a template that reaches a limit, or half of the scored tokens
                are a tokenizer's unknown token.
        """
        if not self._pairs:
            raise UserError("there are no pairs", fix="Name at least one split")
        for split, given in self._pairs.items():
            yield from self._pieces_of(split, given)

    def _pieces_of(self, split: str, given: ReadPairs) -> Iterator[Piece]:
        config, seen = self._config, _Seen()
        selected = _selected(_valid(given, self._sides, seen), select=config.select, limit=config.limit)
        num_selected, late, report = 0, [], Counter[str]()
        unknown = [_Unknown(side) for side in self._sides]
        while pairs := list(islice(selected, _BLOCK)):
            block = build_block(
                pairs,
                sides=self._sides,
                max_tokens=config.max_tokens,
                max_prompt_tokens=config.max_prompt_tokens,
                cut_prompts=config.long_prompt == "cut",
                where=f"split '{split}'",
            )
            num_selected += len(pairs)
            late += block.dropped
            report.update({"kept": len(block.pairs), **block.report})
            self.has_marks |= any(pair.chosen_marks or pair.rejected_marks for pair in block.pairs)
            for ends, rows in zip(self._end_ids, (block.teacher, block.student), strict=True):
                ends.update(rows.input_ids[rows.row_starts[1:][block.has_end] - 1].tolist())
            for counts, rows in zip(unknown, (block.teacher, block.student), strict=True):
                counts.add(rows, has_end=block.has_end)
            yield _piece(split, block)
        _refuse_losses(split, seen, num_selected=num_selected, late=late, max_dropped=config.max_dropped)
        for counts in unknown if report["kept"] >= _FEW else ():
            counts.refuse(split)
        of_split = sorted([*seen.dropped, *late], key=lambda loss: _row_order(loss.row))
        self.losses += [Loss(split, given.source, *loss) for loss in of_split]
        kept = report.pop("kept")
        self.num_pairs += kept
        self._counts.update(report)
        shown = {"pairs": kept, "dropped": len(of_split)}
        shown |= {name: report[name] for name in ("responses_cut", "cut_prompts")}
        self._by_split |= {f"{split}_{name}": number for name, number in shown.items()}


class _Unknown:
    """How many of the scored tokens of one side, end tokens aside, stand for text that its tokenizer has no token for."""

    def __init__(self, side: TemplatedTokenizer) -> None:
        self._side, self._id = side, unknown_id(side.tokenizer)
        self._found = self._scored = 0

    def add(self, rows: TokenRows, *, has_end: NDArray[np.bool_]) -> None:
        """Count those of a block; ``has_end [R]``."""
        scored = rows.unit >= 0
        scored[rows.row_starts[1:][has_end] - 1] = False
        self._scored += int(np.count_nonzero(scored))
        self._found += 0 if self._id is None else int(np.count_nonzero(rows.input_ids[scored] == self._id))

    def refuse(self, split: str) -> None:
        """Refuse a split that one could learn nothing from."""
        if self._found and self._found >= _MUCH_UNKNOWN * self._scored:
            token = self._side.tokenizer.convert_ids_to_tokens(self._id)
            raise UserError(
                f"{self._found:,} of the {self._scored:,} tokens of the responses are {token}, which stands for whatever the "
                f"{self._side.name}'s tokenizer '{self._side.tokenizer.name_or_path}' has no token for",
                where=f"split '{split}'",
                fix="Give the model with all files of its tokenizer, or data in a language that it knows",
            )


def prepare_pairs(
    pairs: Mapping[str, Sequence[Pair] | ReadPairs],
    config: PairsConfig,
    *,
    teacher: TemplatedTokenizer,
    student: TemplatedTokenizer,
) -> PreparedPairs:
    """All pairs of a `Preparation`, in memory.

    Raises:
        UserError: as `Preparation.pieces`.
    """
    given = {split: found if isinstance(found, ReadPairs) else ReadPairs(found) for split, found in pairs.items()}
    preparation = Preparation(given, config, teacher=teacher, student=student)
    pieces = list(preparation.pieces())
    arrays = {name: np.concatenate([piece.arrays[name] for piece in pieces]) for name in pieces[0].arrays}
    arrays = {name: row_starts(array) if name.endswith(STARTS) else array for name, array in arrays.items()}
    if not preparation.has_marks:
        del arrays["marks"]
    texts: dict[str, Any] = {name: list(chain(*(piece.texts[name] for piece in pieces))) for name in TEXTS}
    texts |= {"dropped": preparation.dropped, "report": preparation.report}
    return from_arrays(arrays, texts, losses=preparation.losses)


def from_arrays(
    arrays: Mapping[str, NDArray[Any]], texts: Mapping[str, Any], *, losses: Iterable[Loss] = ()
) -> PreparedPairs:
    """Make prepared pairs of their arrays by name, and of the other fields as JSON types."""
    teacher, student = (
        TokenRows(**{field.name: arrays[f"{name}.{field.name}"] for field in fields(TokenRows)})
        for name in ("teacher", "student")
    )
    parts: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    parts |= {name: tuple(texts[name]) for name in TEXTS}
    parts |= {name: dict(texts[name]) for name in ("dropped", "report")}
    return PreparedPairs(teacher=teacher, student=student, marks=arrays.get("marks"), losses=tuple(losses), **parts)


def _piece(split: str, block: Block) -> Piece:
    arrays: dict[str, NDArray[Any]] = {}
    for name, rows in (("teacher", block.teacher), ("student", block.student)):
        arrays |= {f"{name}.{field.name}": getattr(rows, field.name) for field in fields(rows)}
        arrays[f"{name}.row_starts"] = np.diff(rows.row_starts)
    arrays |= {name: getattr(block, name) for name in ("num_spans", "has_end", "boundaries", "marks")}
    arrays["boundary_starts"] = block.boundary_counts
    texts = {
        "pair_ids": [pair.id for pair in block.pairs],
        "split": [split] * len(block.pairs),
        "prompts": [pair.prompt[-1].content for pair in block.pairs],
        "chosen": [pair.chosen for pair in block.pairs],
        "rejected": [pair.rejected for pair in block.pairs],
    }
    return Piece(arrays, texts)


@dataclass
class _Seen:
    """What the selection has read of a split."""

    num_valid: int = 0
    dropped: list[Dropped] = field(default_factory=list)  # before tokenization


def _valid(given: ReadPairs, sides: Sequence[TemplatedTokenizer], seen: _Seen) -> Iterator[Pair]:
    """The pairs that can be tokenized; what is read is noted in ``seen``."""
    for row in given.rows:
        reason = _invalid(row, sides, keeps_equal=given.keeps_equal) if isinstance(row, Pair) else None
        if isinstance(row, Dropped):
            seen.dropped.append(row)
        elif reason is not None:
            seen.dropped.append(Dropped(row.id, reason))
        else:
            seen.num_valid += 1
            yield row


def _selected(valid: Iterator[Pair], *, select: str, limit: int | None) -> Iterator[Pair]:
    """The first, or in their order the shortest, ``limit`` pairs; all without a limit."""
    if limit is None:
        return valid
    return islice(valid, limit) if select == "all" else iter(_shortest(valid, limit))


def _shortest(pairs: Iterator[Pair], limit: int) -> list[Pair]:
    """The shortest pairs in their order, the earlier of two equals; one block more than the limit is held."""
    kept: list[Pair] = []
    while more := list(islice(pairs, _BLOCK)):
        kept += more
        order = sorted(range(len(kept)), key=lambda i: kept[i].num_characters)[:limit]
        kept = [kept[i] for i in sorted(order)]
    return kept


def _row_order(row: str) -> tuple[int, str]:
    return (int(row), row) if row.isdecimal() else (0, row)


def _invalid(pair: Pair, sides: Sequence[TemplatedTokenizer], *, keeps_equal: bool) -> str | None:
    """The reason to drop a pair before tokenization, or None (docs/method.md#dropped-pairs)."""
    if not (pair.chosen and pair.rejected):
        return "empty"
    if pair.chosen == pair.rejected and not keeps_equal:
        return "equal"
    contents = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
    return "special_token_text" if any(side.holds_special_text(text) for side in sides for text in contents) else None


def _refuse_losses(split: str, seen: _Seen, *, num_selected: int, late: Sequence[Dropped], max_dropped: float) -> None:
    """Refuse a split if more than ``max_dropped`` of its pairs are dropped, before and after the selection together."""
    losses, num_seen = [*seen.dropped, *late], seen.num_valid + len(seen.dropped)
    total = Counter(loss.reason for loss in losses)
    reasons = ", ".join(f"{reason} {total[reason]}" for reason in DROP_REASONS if total[reason])
    if (example := next((loss for loss in losses if loss.detail), None)) is not None:
        reasons += f"; row {example.row}: {example.detail}"
    fix = _TEMPLATE_FIX if 2 * (total["template"] + total["lost_text"]) > len(losses) else _FIX
    if num_selected == len(late):
        raise UserError(
            f"no usable row is left of {num_seen} ({reasons or 'the split is empty'})",
            where=f"split '{split}'",
            fix=fix,
        )
    kept = (1 - len(seen.dropped) / num_seen) * (1 - len(late) / num_selected)
    if 1 - kept > max_dropped + 1e-9:
        raise UserError(
            f"{len(losses)} of {num_seen} rows are dropped ({reasons}), {100 * (1 - kept):.1f} % of the "
            f"selected ones; at most {100 * max_dropped:g} % may be (max_dropped)",
            where=f"split '{split}'",
            fix=fix,
        )
