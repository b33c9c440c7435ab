"""Responses that a model generates in place of the data's: the pairs with one side replaced."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctpd.core.config import Config
from ctpd.core.errors import UserError
from ctpd.core.roles import Role
from ctpd.objectives.base import Side
from ctpd.pipeline.references import Model
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.pairs import PairSource, PairsStage, read_pair_file

if TYPE_CHECKING:
    from ctpd.text.pairs import Pair
    from ctpd.text.prepare import PreparedPairs

GENERATED, COUNTS = "pairs_{split}.jsonl", "counts.json"


class GenerateConfig(Config):
    """What is generated."""

    role: Role
    """Whose model generates."""
    side: Side
    """Which responses are replaced."""
    precision: str
    """Of the model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GenerateStage(Stage):
    """The pairs with one side generated: greedy, until the end of turn.

    Left out and counted: responses that do not end within `max_tokens`, empty ones, and those equal to the other side.
    """

    kind = "generate"
    version = 2

    config: GenerateConfig
    pairs: PairsStage
    train: PairSource
    eval: PairSource | None = None
    model: Model

    def build(self, work: Work) -> None:
        """Generate.

        Raises:
            UserError: more than `max_dropped` of the responses are left out, or no response of the data has an end of
                turn.
        """
        prepared = self.pairs.read(work)
        originals = {"train": self.train.read(work)} | ({} if self.eval is None else {"eval": self.eval.read(work)})
        responses = self._responses(work, prepared)
        counts: Counter[str] = Counter()
        lines: dict[str, list[str]] = {split: [] for split in originals}
        known = {(split, pair.id): pair for split, pairs in originals.items() for pair in pairs}
        for split, pair_id, text in zip(prepared.split, prepared.pair_ids, responses, strict=True):
            reason, line = _replaced(known[split, pair_id], self.config.side, text)
            counts[reason] += 1
            if reason == "kept":
                lines[split].append(line)
        refuse_losses(counts, role=self.config.role, max_dropped=self.pairs.config.max_dropped)
        for split, of_split in lines.items():
            path = work.folder / GENERATED.format(split=split)
            path.write_text("\n".join([*of_split, ""]), encoding="utf-8")
        (work.folder / COUNTS).write_text(json.dumps(dict(counts)))

    def counts(self, work: Work) -> dict[str, int]:
        """How many responses were kept, and left out by reason."""
        found: dict[str, int] = json.loads((work.path(self) / COUNTS).read_text(encoding="utf-8"))
        return found

    def _responses(self, work: Work, prepared: "PreparedPairs") -> list[str | None]:
        """The text of each pair's response; None for one that did not end."""
        from ctpd.decoding import greedy_responses
        from ctpd.pipeline.rows import prompts_of, token_rows

        rows = token_rows(prepared, self.config.role)
        if not prepared.has_end.any():
            raise UserError(
                "every response of the data is cut at `max_tokens`: nothing shows by which token a turn ends",
                fix="Raise `max_tokens`",
            )
        end_token = int(rows.input_ids[rows.row_starts[1:][prepared.has_end] - 1][0])
        located = self.model.located(work)
        model: Any = located.load_frozen(precision=self.config.precision, device=work.runtime.torch_device())
        tokenizer = located.load_tokenizer()
        responses = greedy_responses(
            model,
            prompts_of(rows),
            end_token=end_token,
            max_tokens=self.pairs.config.max_tokens,
            progress=work.progress,
        )
        return [None if ids is None else tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in responses]


@dataclass(frozen=True)
class GeneratedPairs(PairSource):
    """The pairs of one split with generated responses."""

    generated: GenerateStage
    split: str

    @property
    def most(self) -> int | None:
        """The pairs of the data."""
        return self.generated.train.most if self.split == "train" else None

    def read(self, work: Work) -> "list[Pair]":
        """Read them from the artifact."""
        return read_pair_file(work.path(self.generated) / GENERATED.format(split=self.split))


def refuse_losses(counts: Counter[str], *, role: Role, max_dropped: float) -> None:
    """Refuse to go on with too few responses.

    Args:
        counts: of the responses by what became of them; `kept` are used.
        max_dropped: the greatest share that may be left out.
    """
    lost = counts.total() - counts["kept"]
    if lost > max_dropped * counts.total():
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()) if reason != "kept")
        raise UserError(
            f"of {counts.total()} responses that the {role} generated, {lost} cannot be used ({reasons}), more than "
            f"`max_dropped: {max_dropped}` allows",
            fix="A model whose answers do not end needs more fine-tuning, or a larger `max_tokens`; raise "
            "`max_dropped` if the loss is meant",
        )


def _replaced(pair: "Pair", side: Side, text: str | None) -> tuple[str, str]:
    """Why a pair is left out, or `kept`; and the pair with one response replaced, as a line of JSON."""
    sides: Mapping[str, str] = {"chosen": pair.chosen, "rejected": pair.rejected} | {side: text or ""}
    problems = {"unfinished": text is None, "empty": not text, "equal": sides["chosen"] == sides["rejected"]}
    reason = next((name for name, found in problems.items() if found), "kept")
    messages: dict[str, Any] = {"prompt": [message._asdict() for message in pair.prompt]}
    messages |= {name: [{"role": "assistant", "content": content}] for name, content in sides.items()}
    return reason, json.dumps(messages, ensure_ascii=False)


def generated_by(pairs: PairsStage) -> GenerateStage | None:
    """The stage that generated responses of these pairs; None for the data's own."""
    return pairs.train.generated if isinstance(pairs.train, GeneratedPairs) else None
