"""The data step of a comparison: render pairs, tokenize them for both models and align the tokens."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctpd.core.userfiles import user_path
from ctpd.pipeline.references import Source, changed_since_the_plan, read_tokenizer
from ctpd.pipeline.sources import count_rows, file_digest, read_hub, read_rows
from ctpd.pipeline.stage import Part, Stage, Work
from ctpd.pipeline.stages.world import WorldStage
from ctpd.recipe import PlainSpec
from ctpd.text.config import PairsConfig
from harness.cautions import cut_text, pairs_text

if TYPE_CHECKING:
    from ctpd.text.pairs import Pair
    from ctpd.text.prepare import PreparedPairs
    from ctpd.text.render import TemplatedTokenizer

CUTTING = 2
"""The version of how long prompts are cut; part of the key where they are, so that other pairs keep theirs."""
PAIRS, META = "pairs.safetensors", "pairs.json"


class PairSource(Part):
    """Where the pairs of one split come from."""

    @abstractmethod
    def read(self, work: Work) -> "list[Pair]":
        """The pairs."""

    @property
    def most(self) -> int | None:
        """No more than so many pairs, as far as a plan can tell; None where it cannot."""
        return None

    def check(self) -> None:
        """Read what can be read without a build. Raises UserError where that holds no pairs."""


@dataclass(frozen=True)
class WorldPairs(PairSource):
    """The testbed's pairs."""

    world: WorldStage
    split: str

    @property
    def most(self) -> int:
        """What the world is asked for."""
        return self.world.config.num_pairs if self.split == "train" else self.world.config.num_eval_pairs

    def read(self, work: Work) -> "list[Pair]":
        """Read the pairs from the world's artifact."""
        return read_pair_file(self.world.pairs(work, self.split))


@dataclass(frozen=True)
class FilePairs(PairSource):
    """A local file; only the digest of its contents is part of a key."""

    path: str
    digest: str

    @property
    def identity(self) -> Any:
        """The digest; the file's path is not part of a key."""
        return {"sha256": self.digest}

    @property
    def most(self) -> int | None:
        """The file's rows."""
        return count_rows(user_path(self.path))

    def check(self) -> None:
        """Read the file."""
        read_pair_file(user_path(self.path))

    def read(self, work: Work) -> "list[Pair]":
        """Read the file.

        Raises:
            UserError: it has changed since the plan was made, or changes while it is read.
        """
        path = user_path(self.path)
        self._check(path)
        pairs = read_pair_file(path)
        self._check(path)
        return pairs

    def _check(self, path: Path) -> None:
        if file_digest(path) != self.digest:
            raise changed_since_the_plan(path)


@dataclass(frozen=True)
class HubPairs(PairSource):
    """A split of a hub data set at a pinned commit."""

    hub: str
    name: str | None
    split: str
    revision: str

    def read(self, work: Work) -> "list[Pair]":
        """Load the split."""
        from ctpd.text.pairs import parse_pairs

        rows = read_hub(self.hub, config=self.name, split=self.split, revision=self.revision)
        return parse_pairs(rows, source=self.hub)


def read_pair_file(path: Path) -> "list[Pair]":
    """The pairs of a local file."""
    from ctpd.text.pairs import parse_pairs

    return parse_pairs(read_rows(path), source=str(path))


@dataclass(frozen=True)
class ModelInput(Part):
    """The tokenizer and the template of one model."""

    tokenizer: Source
    template: Literal["chat"] | PlainSpec
    variables: Mapping[str, Any] = field(default_factory=dict)

    def load(self, work: Work, *, role: str) -> "TemplatedTokenizer":
        """The tokenizer with the template."""
        from ctpd.text.render import ChatTemplate, PlainTemplate, TemplatedTokenizer

        tokenizer = read_tokenizer(self.tokenizer, work)
        if isinstance(self.template, PlainSpec):
            plain = self.template
            template = PlainTemplate(user=plain.user, assistant=plain.assistant, system=plain.system)
            return TemplatedTokenizer(tokenizer, template, name=role)
        return TemplatedTokenizer(tokenizer, ChatTemplate(tokenizer, variables=dict(self.variables)), name=role)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairsStage(Stage):
    """Tokens and aligned spans of every response, for both models."""

    kind = "pairs"

    config: PairsConfig
    train: PairSource
    eval: PairSource | None = None
    teacher: ModelInput
    student: ModelInput

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As of any stage, and the version of how long prompts are cut if they are."""
        own: dict[str, Any] = super().identity
        return own if self.config.long_prompt == "drop" else {**own, "cutting": CUTTING}

    @property
    def sources(self) -> dict[str, PairSource]:
        """The sources by the name of their split."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})

    @property
    def most_pairs(self) -> int | None:
        """No more than so many pairs to train on, as far as a plan can tell; None where it cannot."""
        known = [number for number in (self.train.most, self.config.limit) if number is not None]
        return min(known, default=None)

    def build(self, work: Work) -> None:
        """Read, validate, render, tokenize and align the pairs, once for all methods."""
        from safetensors.numpy import save_file

        from ctpd.text.prepare import arrays, prepare_pairs, texts

        prepared = prepare_pairs(
            {split: source.read(work) for split, source in self.sources.items()},
            self.config,
            teacher=self.teacher.load(work, role="teacher"),
            student=self.student.load(work, role="student"),
        )
        save_file(arrays(prepared), work.folder / PAIRS)
        (work.folder / META).write_text(json.dumps(texts(prepared), ensure_ascii=False), encoding="utf-8")
        num_pairs = len(prepared.pair_ids)
        if any(prepared.dropped.values()) or cut_text(num_pairs, prepared.report) is not None:
            work.remark(f"pairs: {pairs_text(num_pairs, prepared.dropped, prepared.report)}")

    def read(self, work: Work) -> "PreparedPairs":
        """Read the prepared pairs."""
        return read_prepared(work.path(self))

    def read_meta(self, work: Work) -> dict[str, Any]:
        """Texts, ids, and counts of dropped and cut rows."""
        meta: dict[str, Any] = json.loads((work.path(self) / META).read_text(encoding="utf-8"))
        return meta


def read_prepared(folder: Path) -> "PreparedPairs":
    """Read the prepared pairs of an artifact."""
    from safetensors.numpy import load_file

    from ctpd.text.prepare import from_arrays

    return from_arrays(load_file(folder / PAIRS), json.loads((folder / META).read_text(encoding="utf-8")))
