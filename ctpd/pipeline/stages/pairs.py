"""The data step of a comparison: render pairs, tokenize them for both models and align the tokens."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctpd.core.userfiles import user_path
from ctpd.pipeline.references import Source, changed_since_the_plan, location, read_tokenizer, revision
from ctpd.pipeline.sources import DataRows, count_rows, file_digest, read_hub
from ctpd.pipeline.stage import Part, Stage, Work
from ctpd.pipeline.stages.world import WorldStage
from ctpd.recipe import PlainSpec
from ctpd.text.config import Layout, PairsConfig
from ctpd.text.layouts import FIRST_ROWS, PLAIN
from harness.cautions import cut_text, pairs_text

if TYPE_CHECKING:
    from ctpd.text.pairs import Dropped, Pair, ReadPairs
    from ctpd.text.prepare import PreparedPairs
    from ctpd.text.render import TemplatedTokenizer
    from ctpd.text.templates import EndToken

CUTTING = 2
"""The version of how long prompts are cut; part of the key where they are, so that other pairs keep theirs."""
_RENDERING = (
    "generation prompt, response, end"  # in the keys of pairs in chat templates: what was before rendered otherwise
)


class PairSource(Part):
    """Where the pairs of one split come from."""

    @abstractmethod
    def read(self, work: Work) -> "ReadPairs":
        """The pairs, and the rows that are none."""

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

    def read(self, work: Work) -> "ReadPairs":
        """Read the pairs from the world's artifact."""
        return read_usable_file(self.world.pairs(work, self.split))


@dataclass(frozen=True)
class FilePairs(PairSource):
    """Local files; only the digest of their contents and how they are read is part of a key.

    Attributes:
        encoding: Python's name of that of the texts; None for UTF-8.
        layout: how the rows hold pairs.
        reading: the version of how the rows are read, where they hold more than earlier versions read.
    """

    path: str
    digest: str
    encoding: str | None = None
    layout: Layout = PLAIN
    reading: int | None = None

    @property
    def identity(self) -> Any:
        """The digest, and what of the rest differs from the default; the files' path is not part of a key."""
        own: dict[str, Any] = super().identity
        return {"sha256": own.pop("digest"), **{name: value for name, value in own.items() if name != "path"}}

    @property
    def most(self) -> int | None:
        """The files' rows."""
        return count_rows(user_path(self.path), encoding=self.encoding)

    def check(self) -> None:
        """Read the files, whose first row that is no pair is said."""
        read_pair_file(user_path(self.path), encoding=self.encoding, layout=self.layout)

    def read(self, work: Work) -> "ReadPairs":
        """Read the files.

        Raises:
            UserError: while the rows are read, that one has changed since the plan was made, or since the first row, or that
                there are more or fewer of them.
        """
        from ctpd.text.pairs import ReadPairs

        path = user_path(self.path)
        found = read_usable_file(path, encoding=self.encoding, layout=self.layout)
        return ReadPairs(self._rows(path, found.rows), self.path, found.place)

    def _rows(self, path: Path, rows: "Iterable[Pair | Dropped]") -> "Iterator[Pair | Dropped]":
        self._check(path)
        yield from rows
        self._check(path)

    def _check(self, path: Path) -> None:
        if file_digest(path, encoding=self.encoding) != self.digest:
            raise changed_since_the_plan(path)


@dataclass(frozen=True)
class HubPairs(PairSource):
    """A split of a hub data set at a pinned commit.

    Attributes:
        layout: how the rows hold pairs.
        ignored: columns that are left out on purpose; no part of a key.
    """

    hub: str
    name: str | None
    split: str
    revision: str
    layout: Layout = PLAIN
    ignored: tuple[str, ...] = ()

    @property
    def identity(self) -> Any:
        """All fields that decide which pairs are read."""
        own: dict[str, Any] = super().identity
        return {name: value for name, value in own.items() if name != "ignored"}

    def read(self, work: Work) -> "ReadPairs":
        """Load the split.

        Raises:
            UserError: it cannot be loaded, or its first rows fill a column of the conversation that is not read.
        """
        from ctpd.text.pairs import ReadPairs, usable_rows
        from ctpd.text.unread import refuse_unread

        rows = read_hub(self.hub, config=self.name, split=self.split, revision=self.revision)
        head = list(islice(rows, FIRST_ROWS))
        refuse_unread(head, source=self.hub, layout=self.layout, ignored=self.ignored)
        return ReadPairs(usable_rows(chain(head, rows), source=self.hub, layout=self.layout), self.hub)


def read_pair_file(path: Path, *, encoding: str | None = None, layout: Layout = PLAIN) -> "list[Pair]":
    """The pairs of one or several local files (`data_files`), each of whose rows must be one."""
    from ctpd.text.pairs import parse_pairs

    rows = DataRows(path, encoding=encoding)
    return parse_pairs(rows, source=str(path), layout=layout, place=rows.place if rows.files != (path,) else None)


def read_usable_file(path: Path, *, encoding: str | None = None, layout: Layout = PLAIN) -> "ReadPairs":
    """The pairs of one or several local files (`data_files`), and the rows that are none, as they are gone through."""
    from ctpd.text.pairs import ReadPairs, usable_rows

    rows = DataRows(path, encoding=encoding)
    place = rows.place if rows.files != (path,) else None
    return ReadPairs(usable_rows(rows, source=str(path), layout=layout, place=place), str(path), place)


@dataclass(frozen=True)
class ModelInput(Part):
    """The tokenizer and the template of one model."""

    tokenizer: Source
    template: Literal["chat"] | PlainSpec
    variables: Mapping[str, Any] = field(default_factory=dict)
    end_token: str | None = None
    system: Literal["message", "merge"] = "message"

    @property
    def identity(self) -> Any:
        """All fields; beside a chat template how it is rendered, which an earlier version did otherwise."""
        own = super().identity
        return own if isinstance(self.template, PlainSpec) else {**own, "rendering": _RENDERING}

    def load(self, work: Work, *, role: str) -> "TemplatedTokenizer":
        """The tokenizer with the template.

        Raises:
            UserError: the tokenizer cannot be used, or has no chat template.
        """
        return self.templated(read_tokenizer(self.tokenizer, work), folder=location(self.tokenizer, work), role=role)

    def templated(self, tokenizer: Any, *, folder: str, role: str) -> "TemplatedTokenizer":
        """The template on the tokenizer, which is that of a directory or hub id.

        Raises:
            UserError: as `load`.
        """
        from ctpd.text.render import ChatTemplate, PlainTemplate, TemplatedTokenizer

        if isinstance(self.template, PlainSpec):
            plain = self.template
            template = PlainTemplate(user=plain.user, assistant=plain.assistant, system=plain.system)
            return TemplatedTokenizer(tokenizer, template, name=role)
        chat = ChatTemplate(
            tokenizer,
            variables=dict(self.variables),
            end=self._end(folder, tokenizer),
            merge_system=self.system == "merge",
        )
        return TemplatedTokenizer(tokenizer, chat, name=role)

    def _end(self, folder: str, tokenizer: Any) -> "EndToken | None":
        """The recipe's end token, or that of the model's `generation_config`; None where neither says one."""
        from ctpd.models import generation_end
        from ctpd.text.templates import EndToken

        if self.end_token is not None:
            return EndToken(self.end_token, "recipe")
        found = generation_end(folder, revision=revision(self.tokenizer))
        text = None if found is None else tokenizer.convert_ids_to_tokens(found)
        return None if text is None else EndToken(text, "generation_config")


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
        from ctpd.text.prepare import Preparation
        from ctpd.text.prepared_files import write_prepared

        teacher, student = self.teacher.load(work, role="teacher"), self.student.load(work, role="student")
        read = {split: source.read(work) for split, source in self.sources.items()}
        preparation = Preparation(read, self.config, teacher=teacher, student=student)
        write_prepared(preparation, work.folder, places={split: found.place for split, found in read.items()})
        num_pairs = preparation.num_pairs
        if preparation.losses or cut_text(num_pairs, preparation.report) is not None:
            work.remark(f"pairs: {pairs_text(num_pairs, preparation.dropped, preparation.report)}")

    def read(self, work: Work) -> "PreparedPairs":
        """Read the prepared pairs."""
        from ctpd.text.prepared_files import read_prepared

        return read_prepared(work.path(self))

    def read_meta(self, work: Work) -> dict[str, Any]:
        """Texts, ids, and counts of dropped and cut rows."""
        from ctpd.text.prepared_files import read_meta

        return read_meta(work.path(self))
