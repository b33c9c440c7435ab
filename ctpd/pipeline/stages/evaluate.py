"""Evaluate one model on one column of a suite with lm-evaluation-harness."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ctpd.core.config import Config
from ctpd.core.errors import Unmeasurable, UserError
from ctpd.core.processes import processes
from ctpd.core.temporary import temporary_folder
from ctpd.core.userfiles import user_path
from ctpd.pipeline.references import LocatedModel, Model, cached_digest, check_unchanged
from ctpd.pipeline.stage import Part, Stage, Work
from ctpd.pipeline.stages.world import WorldStage
from harness.answers import Unmeasured
from harness.record import ColumnResult
from harness.suites import Column
from harness.task_files import task_files

RESULT = "result.json"
SAMPLES = "samples"
"""The folder of sample files in lm-eval's format; artifacts of earlier versions have none."""
_WHOLE = "all"  # instead of the name of a data set: all of a mirror
_NOT_OF_THE_RESULT = ("name", "folder", "datasets")  # fields of a column that do not change its score


class Protocol(Config):
    """How a column is evaluated."""

    limit: int | None = None
    """Evaluate the first N documents of each task; None: all."""
    batch_size: int
    """Rows in one forward pass."""
    chat_template: bool = False
    """Whether prompts are rendered with the chat template."""
    template_variables: Mapping[str, Any] | None = None
    """With a chat template: its variables, the date included, as in training."""
    think_end_token: str | None = None
    """What the model generates up to this text is not scored."""
    precision: str
    """Number format of the model's weights: float32 or bfloat16."""
    backend: Literal["hf", "vllm"] = "hf"
    """What computes the scores."""
    lm_eval: str
    """The version of lm-eval."""
    allow_code: bool = False
    """Whether the task may run code of its own, or code that a model generates."""


@dataclass(frozen=True)
class ColumnTask(Part):
    """A column of a suite; its name and the folders of its files are not part of the key.

    Attributes:
        column: the column.
        files: a digest of the local files that the task reads; None where a version or the mirror stands for all of them.
    """

    column: Column
    files: str | None = None

    @property
    def identity(self) -> Any:
        """Task, metric, version, shots, further metrics and form; of the user's own task its files, too."""
        from ctpd.core.config import to_plain

        own = {name: value for name, value in to_plain(self.column).items() if name not in _NOT_OF_THE_RESULT}
        if self.column.form is None:  # newer than the other fields: left out, it moves no key
            del own["form"]
        return own if self.files is None else {**own, "files": self.files}

    @classmethod
    def of(cls, column: Column, documents: "WorldStage | Mirror | None") -> "ColumnTask":
        """The column with the digest of what its task reads now.

        Args:
            column: the column.
            documents: where it reads documents; None for the hub.
        """
        return cls(column, _files_digest(column, documents))

    def refuse_changes(self, documents: "WorldStage | Mirror | None") -> None:
        """Refuse to evaluate other files than those that the key was made of.

        Raises:
            UserError: a file of the user's own task has changed.
        """
        if _files_digest(self.column, documents) != self.files:
            raise UserError(
                f"the files of the task '{self.column.task}' have changed since this command was started",
                where=self.column.folder,
                fix="Run the same command again",
            )


def _files_digest(column: Column, documents: "WorldStage | Mirror | None") -> str | None:
    """The digest of what a task reads beside ``documents``; relative paths begin there, or in the working directory."""
    if isinstance(documents, WorldStage):  # whose key stands for its files
        return task_files(column, base=None).digest
    base = Path.cwd() if documents is None else Path(documents.root)
    return task_files(column, base=base, mirrored=documents is not None).digest


@dataclass(frozen=True)
class Mirror(Part):
    """A folder that mirrors the hub; the contents that a column reads are part of the key, the folder's path is not.

    Attributes:
        root: the folder.
        digests: of the folders of the column's data sets.
    """

    root: str
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> Any:
        """The digests."""
        return dict(self.digests)

    @classmethod
    def of(cls, root: str, column: Column) -> "Mirror":
        """The mirror with digests of the data sets that a column names, or of the whole folder if it names none."""
        folder = user_path(root)
        folders = {name: folder / name for name in column.datasets} or {_WHOLE: folder}
        return cls(str(folder), {name: cached_digest(part) for name, part in folders.items() if part.is_dir()})

    def check(self) -> None:
        """Refuse data that have changed since the plan was made.

        Raises:
            UserError: they have.
        """
        for name, digest in self.digests.items():
            check_unchanged(Path(self.root) if name == _WHOLE else Path(self.root) / name, digest)


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluateStage(Stage):
    """The score of a model on a column, with the score of every document; or why it cannot be measured."""

    kind = "evaluate"
    version = 3

    protocol: Protocol
    task: ColumnTask
    model: Model
    documents: WorldStage | Mirror | None = None

    def build(self, work: Work) -> None:
        """Evaluate."""
        result: ColumnResult | Unmeasured
        try:
            result = self._evaluate(work)
        except Unmeasurable as error:  # it would fail again: an outcome of model and column, as a score is
            result = Unmeasured(reason=error.what, fix=error.fix)
            work.remark(f"not measured, since {error.what}")
        (work.folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")

    def is_whole(self, folder: Path) -> bool:
        """Whether answers were kept, as far as there are some."""
        return (folder / SAMPLES).is_dir() or isinstance(read_result(folder), Unmeasured)

    def result(self, work: Work) -> ColumnResult | Unmeasured:
        """Read the result."""
        return read_result(work.path(self))

    def _root(self, work: Work) -> Path | None:
        """The folder that tasks read their data from; None for the hub."""
        if isinstance(self.documents, WorldStage):
            return self.documents.documents(work)
        if self.documents is None:
            return None
        self.documents.check()
        return Path(self.documents.root)

    def _evaluate(self, work: Work) -> ColumnResult:
        from harness.evaluate import Documents, Pinned, evaluate_column, evaluate_with_vllm

        protocol, located, column = self.protocol, self.model.located(work), self.task.column
        self.task.refuse_changes(self.documents)
        documents = Documents(
            self._root(work),
            limit=protocol.limit,
            chat_template=protocol.chat_template,
            allow_code=protocol.allow_code,
            samples=work.folder / SAMPLES,
            template_variables=protocol.template_variables or {},
            think_end_token=protocol.think_end_token,
        )
        tokenizer = located.load_tokenizer()
        if protocol.backend == "vllm":
            if processes().world_size > 1:
                raise UserError(
                    "vLLM in a launch of several processes is not supported", fix="Evaluate with one process"
                )
            with _one_folder(located, precision=protocol.precision) as (folder, revision):
                return evaluate_with_vllm(
                    Pinned(folder, revision),
                    Pinned(located.tokenizer, located.tokenizer_revision),
                    tokenizer,
                    column,
                    documents,
                    precision=protocol.precision,
                )
        model = located.load(precision=protocol.precision, device=work.runtime.torch_device())
        return evaluate_column(
            model, tokenizer, column, documents, batch_size=protocol.batch_size, progress=work.progress
        )


def read_result(folder: Path) -> ColumnResult | Unmeasured:
    """Read the result of an artifact."""
    found = (folder / RESULT).read_bytes()
    kind = Unmeasured if "reason" in json.loads(found) else ColumnResult
    return kind.model_validate_json(found)


@contextlib.contextmanager
def _one_folder(located: LocatedModel, *, precision: str) -> Iterator[tuple[str, str | None]]:
    """A model as one directory (or hub id) and its revision; adapters are merged into a temporary one."""
    if not located.adapters:
        yield located.folder, located.revision
        return
    from ctpd.models import save_model

    with temporary_folder("merged") as merged:
        save_model(located.load(precision=precision, device="cpu"), merged)
        yield str(merged), None
