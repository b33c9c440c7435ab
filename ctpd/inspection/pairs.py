"""The first pairs of a recipe as each model will read them: prompt, responses, end, and what of it is scored."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpd.core.errors import UserError
from ctpd.core.printing import command
from ctpd.core.roles import ROLES, Role
from ctpd.core.store import Store
from ctpd.objectives.base import BOTH_SIDES
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.rows import token_rows
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Work
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.text.pairs import Pair
from ctpd.text.prepare import PreparedPairs, prepare_pairs
from ctpd.text.prepared_files import read_prepared

if TYPE_CHECKING:
    from ctpd.text.blocks import TokenRows

_READ = 64  # pairs that are prepared to show some of them: a few may be dropped


@dataclass(frozen=True, kw_only=True)
class ReadRow:
    """One row as one model reads it; ``response`` and ``end`` are scored, ``prompt`` and ``between`` are not.

    Attributes:
        between: text between the response and the end token.
        end: the end token; None for a response that was cut, which has none.
        tokens: of the whole row; ``scored`` those of response and end.
    """

    prompt: str
    response: str
    between: str
    end: str | None
    tokens: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class ShownPair:
    """One pair: its rows by model and side (`chosen`, `rejected`).

    Attributes:
        turns: role and content of each message of the prompt; empty where the data cannot be read again.
    """

    id: str
    split: str
    turns: tuple[dict[str, str], ...]
    rows: dict[Role, dict[str, ReadRow]]


def read_pairs(stage: PairsStage, store: Store, *, show: int, source: str) -> list[ShownPair]:
    """The first pairs of a recipe, from the store if they are prepared, else prepared now.

    Args:
        stage: the recipe's pairs.
        store: of its artifacts.
        show: so many pairs.
        source: the recipe, for errors.

    Raises:
        UserError: the pairs or tokenizers are artifacts that are not built yet, or cannot be read.
    """
    refuse_missing(stage, store, source)
    work = work_of(stage, store)
    if store.has(stage.kind, stage.key):
        prepared = read_prepared(store.open(stage.kind, stage.key))
    else:
        prepared = _prepared(stage, work)
    known = _originals(stage, work, set(zip(prepared.split[:show], prepared.pair_ids[:show], strict=True)))
    tokenizers = {role: getattr(stage, role).load(work, role=role).tokenizer for role in ROLES}
    return [
        ShownPair(
            id=prepared.pair_ids[pair],
            split=prepared.split[pair],
            turns=_turns(known.get((prepared.split[pair], prepared.pair_ids[pair])), last=prepared.prompts[pair]),
            rows={role: _rows(prepared, role, tokenizers[role], pair) for role in ROLES},
        )
        for pair in range(min(show, len(prepared.pair_ids)))
    ]


def prompt_parts(prompt: str, turns: Sequence[Mapping[str, str]]) -> Iterator[tuple[str | None, str]]:
    """A prompt as a model reads it, cut into the contents of its messages, each with its role, and the template's text (None).

    A content that the template has changed is part of the template's text.
    """
    start = 0
    for turn in turns:
        content = turn["content"].strip()
        found = re.compile(rf"(?<!\w){re.escape(content)}(?!\w)").search(prompt, start) if content else None
        if found is not None:
            yield from ((None, prompt[start : found.start()]), (turn["role"], found[0]))
            start = found.end()
    yield None, prompt[start:]


def work_of(stage: PairsStage, store: Store) -> Work:
    """What a stage of pairs reads its inputs with, outside of a build."""
    folders = {source.key: store.path(source.kind, source.key) for source in stage.inputs.values()}
    return Work(Path(), Runtime(), lambda done, total: None, writes=False, folders=folders)


def refuse_missing(stage: PairsStage, store: Store, source: str) -> None:
    """Refuse pairs whose inputs are not built.

    Raises:
        UserError: an artifact that they are made from is not in the store.
    """
    missing = [one.label for one in Graph(tuple(stage.inputs.values())).missing(store)]
    if missing:
        raise UserError(
            f"the store {store.root} lacks what the pairs are made from: {', '.join(missing)}",
            where=source,
            fix=f"Run `{command('train', source, store=store.root)}` first, or give another --store",
        )


def _originals(stage: PairsStage, work: Work, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], Pair]:
    """Pairs to train on as they are in the data, by split and id; none where these are elsewhere by now, or have changed."""
    found: dict[tuple[str, str], Pair] = {}
    try:
        for pair in stage.train.read(work).pairs:
            if ("train", pair.id) in wanted:
                found["train", pair.id] = pair
            if len(found) == len(wanted):
                break
    except UserError:
        return {}
    return found


def _turns(pair: Pair | None, *, last: str) -> tuple[dict[str, str], ...]:
    """The messages of a prompt, the last as it is trained on: its start may be cut."""
    if pair is None:
        return ()
    return tuple(turn._asdict() for turn in (*pair.prompt[:-1], pair.prompt[-1]._replace(content=last)))


def _prepared(stage: PairsStage, work: Work) -> PreparedPairs:
    """The first pairs to train on, by the recipe's rules; how many are dropped does not matter here."""
    config = stage.config.model_copy(update={"max_dropped": 1.0, "select": "all", "limit": _READ})
    sides = {role: getattr(stage, role).load(work, role=role) for role in ROLES}
    return prepare_pairs({"train": stage.train.read(work)}, config, **sides)


def _rows(prepared: PreparedPairs, role: Role, tokenizer: Any, pair: int) -> dict[str, ReadRow]:
    rows = token_rows(prepared, role)
    return {
        side: _row(rows, 2 * pair + number, tokenizer, has_end=bool(prepared.has_end[2 * pair + number]))
        for number, side in enumerate(BOTH_SIDES)
    }


def _row(rows: "TokenRows", row: int, tokenizer: Any, *, has_end: bool) -> ReadRow:
    start, stop = rows.row_starts[row], rows.row_starts[row + 1]
    ids, unit = rows.input_ids[start:stop].tolist(), rows.unit[start:stop]
    scored = [index for index, number in enumerate(unit.tolist()) if number >= 0]
    response = scored[:-1] if has_end else scored
    first, after = response[0], response[-1] + 1

    def text(part: Sequence[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return ReadRow(
        prompt=text(ids[:first]),
        response=text(ids[first:after]),
        between=text(ids[after:-1]) if has_end else "",
        end=text(ids[-1:]) if has_end else None,
        tokens=len(ids),
        scored=len(scored),
    )
