"""What a model's template makes of conversations: rendered rows beside the template's own rendering, and refused ones."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from ctpd.core.roles import ROLES
from ctpd.core.store import Store
from ctpd.inspection.pairs import refuse_missing, work_of
from ctpd.pipeline.stages.pairs import PairsStage
from ctpd.text.pairs import Message, Pair
from ctpd.text.render import TemplatedTokenizer
from ctpd.text.templates import DIFFERENCES, Frame

_USER, _NEXT = Message("user", "What is it?"), Message("user", "And where?")
_ANSWER, _SYSTEM = Message("assistant", "A key."), Message("system", "Be brief.")
_REASONED = "<think>\nIt opens a door.\n</think>\n\nA key."
SHAPES: dict[str, Pair] = {
    name: Pair(name, prompt, chosen, "No.")
    for name, prompt, chosen in (
        ("a question", (_USER,), "A key."),
        ("several turns", (_USER, _ANSWER, _NEXT), "On the table."),
        ("a system message", (_SYSTEM, _USER), "A key."),
        ("two messages of the user", (_USER, _NEXT), "A key."),
        ("reasoning in the answer", (_USER,), _REASONED),
    )
}
"""Conversations that templates are known to treat differently."""


@dataclass(kw_only=True)
class TemplateReport:
    """How conversations are rendered for one model.

    Attributes:
        name: the tokenizer.
        rows: responses that were rendered, each in its conversation.
        end_tokens: the tokens that end them.
        ends_from: what says so: the template, the recipe, the model's `generation_config` or its tokenizer.
        differences: kind -> number of rows that the template itself renders otherwise (`ctpd.text.templates.MEANINGS`).
        examples: kind -> id, text as it is used and the template's own, of the first such row.
        refused: why -> number of pairs whose prompt the template does not render.
    """

    name: str
    rows: int = 0
    end_tokens: list[str] = field(default_factory=list)
    ends_from: list[str] = field(default_factory=list)
    differences: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


def report_template(side: TemplatedTokenizer, pairs: Sequence[Pair]) -> TemplateReport:
    """Render both responses of pairs, and compare with the template's own rendering."""
    found = TemplateReport(name=str(side.tokenizer.name_or_path))
    where = [f"pair {pair.id}" for pair in pairs]
    whys = side.refused([pair.prompt for pair in pairs], where=where)
    found.refused = dict(Counter(one.why for one in whys if one is not None))
    kept = [pair for pair, why in zip(pairs, whys, strict=True) if why is None]
    names = [f"pair {pair.id}" for pair in kept]
    frames = side.frames([pair.prompt for pair in kept], where=names)
    rows = [(pair, response, frame) for pair, frame in zip(kept, frames, strict=True) for response in _responses(pair)]
    found.rows = len(rows)
    if not rows:
        return found
    encoded = side.encode(
        [(pair.prompt, response) for pair, response, _ in rows],
        frames=[frame for _, _, frame in rows],
        where=[f"pair {pair.id}" for pair, _, _ in rows],
    )
    ends = sorted(set(encoded.ids[encoded.row_starts[1:] - 1].tolist()))
    found.end_tokens = [str(side.tokenizer.convert_ids_to_tokens(end)) for end in ends]
    found.ends_from = sorted(side.ends_from)
    kinds = [DIFFERENCES[number] if number >= 0 else "" for number in encoded.difference.tolist()]
    counts = Counter(kinds)
    found.differences = {kind: counts[kind] for kind in DIFFERENCES if counts[kind]}
    for kind in found.differences:
        pair, response, frame = rows[kinds.index(kind)]
        found.examples[kind] = (pair.id, _text(response, frame), side.template.own(pair.prompt, response))
    return found


def recipe_templates(stage: PairsStage, store: Store, *, limit: int | None, source: str) -> dict[str, TemplateReport]:
    """The templates of a recipe's teacher and student, on its pairs to train on.

    Args:
        stage: the recipe's pairs.
        store: of its artifacts.
        limit: only so many pairs.
        source: the recipe, for errors.

    Raises:
        UserError: the pairs or tokenizers are artifacts that are not built yet, or cannot be read.
    """
    refuse_missing(stage, store, source)
    work = work_of(stage, store)
    pairs = list(islice((pair for pair in stage.train.read(work).pairs if pair.chosen and pair.rejected), limit))
    return {role: report_template(getattr(stage, role).load(work, role=role), pairs) for role in ROLES}


def _responses(pair: Pair) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in (pair.chosen, pair.rejected) if text))


def _text(response: str, frame: Frame) -> str:
    return frame.before + response + frame.after
