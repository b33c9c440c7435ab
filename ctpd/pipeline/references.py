"""What a stage can read that is no stage (files, hub models), and models as chains of a base and adapters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ctpd.core.errors import UserError
from ctpd.core.store import digest_folder
from ctpd.pipeline.graph import Stage

MODEL_FOLDER = "model"  # inside an artifact that holds a model
META, TRAINING, SUMMARY, CHAIN, WRITTEN = (
    "pairs.json",
    "training.json",
    "summary.json",
    "chain.json",
    "written.json",
)  # JSON files of artifacts
ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class External:
    """A model or tokenizer directory, or a hub id with its pinned revision. The digest is its identity."""

    location: str
    digest: str
    revision: str | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a LoRA adapter instead of a whole model."""
        return (Path(self.location) / ADAPTER_CONFIG).is_file()


def external_model(location: str, *, revision: str | None, role: str, in_recipe: bool = True) -> External:
    """Refer to a local model directory by its contents, or to a hub model by its revision.

    Args:
        location: a directory, or a hub id.
        revision: a hub id's commit; None for a directory.
        role: whose model it is, for messages.
        in_recipe: whether ``location`` is written in a recipe, for messages; else it comes from `--model`.

    Raises:
        UserError: the directory does not exist or holds no model; a hub id has no revision; a hub id with a revision
            is the name of a local directory too.
    """
    folder = Path(location).expanduser()
    if revision is not None:
        if folder.exists():
            raise UserError(
                f"'{location}' with the revision '{revision}' means the model of the {role} on the hub, and there is a "
                f"local directory of that name, {folder.absolute()}",
                fix=f"For the directory give './{location}' without a revision; for the hub's model run the command in "
                "another working directory",
            )
        return External(location, f"hub:{location}@{revision}", revision)
    if _HUB_ID.fullmatch(location) and not folder.exists():
        pinned = "add `revision:` with a commit" if in_recipe else f"give `{location}@COMMIT`"
        raise UserError(
            f"the model directory '{location}' of the {role} does not exist, and as a hub id it lacks a revision",
            fix=f"To use the hub's model {pinned}; else correct the path, which is relative to the working directory",
        )
    names = ("config.json", ADAPTER_CONFIG)
    if not folder.is_dir() or not any((folder / name).is_file() for name in names):
        problem = "does not exist" if not folder.exists() else "holds no config.json"
        fix = "Correct the path, which is relative to the working directory"
        if in_recipe:
            fix = "Correct the path in the recipe (it is relative to the working directory), or make the model first; "
            fix += "the recipe's header says how"
        raise UserError(f"the model directory '{location}' of the {role} {problem}", fix=fix)
    # Absolute, because artifacts name their base model and are read from other working directories.
    return External(str(folder.absolute()), cached_digest(folder))


def cached_digest(folder: Path) -> str:
    """The digest of a folder's files, computed once a process as long as none changes."""
    return _folder_digest(folder.resolve(), _newest(folder))


def _newest(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)


@cache
def _folder_digest(folder: Path, changed: float) -> str:
    return digest_folder(folder)


Source = Stage | External


@dataclass(frozen=True, eq=False)
class ModelRef:
    """A model to be: a whole model, adapters merged into it in order, and the tokenizer."""

    role: str
    root: Source
    tokenizer: Source
    adapters: tuple[Source, ...] = ()

    @property
    def newest(self) -> Source:
        """What the last training made: the artifact that stands for this model."""
        return self.adapters[-1] if self.adapters else self.root

    def _named(self, prefix: str) -> dict[str, Source]:
        chain = {f"{prefix}": self.root, **{f"{prefix}.adapter{i}": a for i, a in enumerate(self.adapters)}}
        return chain | {f"{prefix}.tokenizer": self.tokenizer}

    def stages(self, prefix: str) -> dict[str, Stage]:
        """The stages of the chain, as a stage's inputs."""
        return {name: source for name, source in self._named(prefix).items() if isinstance(source, Stage)}

    def externals(self, prefix: str) -> dict[str, str]:
        """The digests of the rest, as a stage's externals."""
        return {name: source.digest for name, source in self._named(prefix).items() if isinstance(source, External)}

    def located(self, prefix: str, inputs: Mapping[str, Path]) -> "LocatedModel":
        """Where everything lies, given the folders of a stage's inputs."""
        place = {
            name: source.location if isinstance(source, External) else str(inputs[name] / MODEL_FOLDER)
            for name, source in self._named(prefix).items()
        }
        adapters = tuple(Path(place[f"{prefix}.adapter{i}"]) for i in range(len(self.adapters)))
        return LocatedModel(
            folder=place[prefix],
            revision=_revision(self.root),
            adapters=adapters,
            tokenizer=place[f"{prefix}.tokenizer"],
            tokenizer_revision=_revision(self.tokenizer),
        )

    def chain(self) -> dict[str, Any]:
        """Where the parts are, so that a model can be put together outside the graph (`ctpd export --merge`)."""
        return {
            "base": _place(self.root),
            "revision": _revision(self.root),
            "adapters": [_place(adapter) for adapter in self.adapters],
            "tokenizer": _place(self.tokenizer),
            "tokenizer_revision": _revision(self.tokenizer),
        }

    def trained(self, stage: Stage, *, adapter: bool) -> "ModelRef":
        """This model after the training ``stage``."""
        if adapter:
            return ModelRef(self.role, self.root, self.tokenizer, (*self.adapters, stage))
        return ModelRef(self.role, stage, self.tokenizer)

    def replaced(self, other: External) -> "ModelRef":
        """A ready-made model in this one's place, or a ready-made adapter on it."""
        if other.is_adapter:
            return ModelRef(self.role, self.root, self.tokenizer, (*self.adapters, other))
        return ModelRef(self.role, other, self.tokenizer)


def _place(source: Source) -> str:
    return source.location if isinstance(source, External) else f"store:{source.kind}/{source.key}"


def _revision(source: Source) -> str | None:
    return source.revision if isinstance(source, External) else None


@dataclass(frozen=True, kw_only=True)
class LocatedModel:
    """Folders (or hub ids with their revisions) of a model, its adapters and its tokenizer.

    The tokenizer has a revision of its own: after a full fine-tuning the model is an artifact, the tokenizer still the
    hub's.
    """

    folder: str
    revision: str | None
    adapters: tuple[Path, ...]
    tokenizer: str
    tokenizer_revision: str | None
