"""Models and tokenizers that a stage reads: artifacts of other stages, directories and hub models."""

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpd.core.errors import UserError
from ctpd.core.hashes import digest_folder, state, visible_files
from ctpd.core.userfiles import exists, user_path
from ctpd.pipeline.stage import Part, Stage, Work
from ctpd.recipe.model import checked_commit

if TYPE_CHECKING:
    from torch import nn

MODEL_FOLDER = "model"  # inside an artifact that holds a model
TRAINING = "training.json"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class External(Part):
    """A model or tokenizer directory, or a hub id with its pinned revision. Only the digest is part of a key.

    Attributes:
        location: a path or a hub id.
        digest: of the directory's contents, or the hub id with the revision.
        revision: the hub's commit; None for a directory.
    """

    location: str
    digest: str
    revision: str | None = None

    @property
    def identity(self) -> str:
        """The digest; the directory's path is not part of a key."""
        return self.digest

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a LoRA adapter instead of a whole model."""
        return (Path(self.location) / ADAPTER_CONFIG).is_file()


def external_model(location: str, *, revision: str | None, role: str, in_recipe: bool = True) -> External:
    """Refer to a local model directory by its contents, or to a hub model by its revision.

    Args:
        location: a directory, or a hub id.
        revision: a hub id's commit; None for a directory.
        role: "teacher", "student" or the like, for messages.
        in_recipe: whether ``location`` is written in a recipe, for messages; else it comes from `--model`.

    Raises:
        UserError: the directory does not exist or holds no model; a hub id has no revision, or a branch; a hub id
            with a revision is the name of a local directory too.
    """
    folder = user_path(location)
    if revision is not None:
        if exists(folder):
            raise UserError(
                f"'{location}' with the revision '{revision}' means the model of the {role} on the hub, and there is a "
                f"local directory of that name, {folder.absolute()}",
                fix=f"For the directory give './{location}' without a revision; for the hub's model run the command in "
                "another working directory",
            )
        return External(location, f"hub:{location}@{checked_commit(revision)}", revision)
    if _HUB_ID.fullmatch(location) and not exists(folder):
        pinned = "add `revision:` with a commit" if in_recipe else f"give `{location}@COMMIT`"
        raise UserError(
            f"the model directory '{location}' of the {role} does not exist, and as a hub id it lacks a revision",
            fix=f"To use the hub's model {pinned}; else correct the path, which is relative to the working directory",
        )
    names = ("config.json", ADAPTER_CONFIG)
    if not (exists(folder) and folder.is_dir()) or not any((folder / name).is_file() for name in names):
        problem = "does not exist" if not exists(folder) else "holds no config.json"
        fix = "Correct the path, which is relative to the working directory"
        if in_recipe:
            fix = (
                "Correct the path in the recipe, which is relative to the working directory, or create the model first"
            )
        raise UserError(f"the model directory '{location}' of the {role} {problem}", fix=fix)
    # Absolute, because artifacts name their base model and are read from other working directories.
    return External(str(folder.absolute()), cached_digest(folder))


def cached_digest(folder: Path) -> str:
    """The digest of a folder's files; they are read again when one of them has another size, time or inode."""
    seen = tuple((name, *state(path)) for name, path in visible_files(folder))
    return _folder_digest(folder.resolve(), seen)


@cache
def _folder_digest(folder: Path, seen: tuple[tuple[str | int, ...], ...]) -> str:
    return digest_folder(folder)


def check_unchanged(folder: Path, digest: str) -> None:
    """Refuse files that have changed since the plan was made, whose digest is part of the key.

    Raises:
        UserError: the folder has other contents now.
    """
    if (cached_digest(folder) if folder.is_dir() else None) != digest:
        raise changed_since_the_plan(folder)


def changed_since_the_plan(path: Path) -> UserError:
    """The error for a file or folder whose contents are not those that the plan was made with."""
    return UserError(
        "the contents have changed since this command was started, and what it builds would be stored as made from the "
        "earlier ones",
        where=str(path),
        fix="Run the same command again: it plans with the contents as they are now",
    )


Source = Stage | External
"""Where the files of a model or tokenizer come from."""


def location(source: Source, work: Work) -> str:
    """The directory or hub id of a source; used in `build`.

    Raises:
        UserError: the files of the directory have changed since the plan was made.
    """
    if not isinstance(source, External):
        return str(work.path(source) / MODEL_FOLDER)
    if source.revision is None:
        check_unchanged(Path(source.location), source.digest)
    return source.location


def revision(source: Source) -> str | None:
    """The pinned commit of a hub model."""
    return source.revision if isinstance(source, External) else None


def read_tokenizer(source: Source, work: Work) -> Any:
    """The tokenizer of a source."""
    from ctpd.models import load_tokenizer

    return load_tokenizer(location(source, work), revision=revision(source))


@dataclass(frozen=True, eq=False)
class Model(Part):
    """A planned model: base weights, LoRA adapters to merge into them in order, and the tokenizer."""

    root: Source
    tokenizer: Source
    adapters: tuple[Source, ...] = ()

    @property
    def newest(self) -> Source:
        """The source of the last adapter, or of the base weights if there is none."""
        return self.adapters[-1] if self.adapters else self.root

    def located(self, work: Work) -> "LocatedModel":
        """The paths or hub ids of all parts; used in `build`."""
        return LocatedModel(
            folder=location(self.root, work),
            revision=revision(self.root),
            adapters=tuple(Path(location(adapter, work)) for adapter in self.adapters),
            tokenizer=location(self.tokenizer, work),
            tokenizer_revision=revision(self.tokenizer),
        )

    def chain(self) -> dict[str, Any]:
        """References to the parts, from which `ctpd export --merge` loads the model without the graph."""
        return {
            "base": _reference(self.root),
            "revision": revision(self.root),
            "adapters": [_reference(adapter) for adapter in self.adapters],
            "tokenizer": _reference(self.tokenizer),
            "tokenizer_revision": revision(self.tokenizer),
            "digests": {
                part.location: part.digest
                for part in (self.root, *self.adapters, self.tokenizer)
                if isinstance(part, External) and part.revision is None
            },
        }

    def trained(self, stage: Stage, *, adapter: bool) -> "Model":
        """This model after a training."""
        if adapter:
            return dataclasses.replace(self, adapters=(*self.adapters, stage))
        return Model(stage, self.tokenizer)

    def replaced(self, other: External) -> "Model":
        """A ready-made model instead of this one, or a ready-made adapter on it."""
        if other.is_adapter:
            return dataclasses.replace(self, adapters=(*self.adapters, other))
        return Model(other, self.tokenizer)


def _reference(source: Source) -> str:
    return source.location if isinstance(source, External) else f"store:{source.kind}/{source.key}"


@dataclass(frozen=True, kw_only=True)
class LocatedModel:
    """Folders (or hub ids with their revisions) of a model, its adapters and its tokenizer.

    The tokenizer has a revision of its own: after a full fine-tuning the model is an artifact, and the tokenizer is
    still the hub's.
    """

    folder: str
    revision: str | None
    adapters: tuple[Path, ...]
    tokenizer: str
    tokenizer_revision: str | None

    @property
    def title(self) -> str:
        """What the model is called in errors: where its newest part is."""
        return str(self.adapters[-1]) if self.adapters else self.folder

    def load(self, *, precision: str, device: str) -> Any:
        """The model with its adapters merged, in evaluation mode.

        Args:
            precision: of the weights: float32, bfloat16 or 4bit.
            device: a torch device.
        """
        from ctpd.models import load_model

        return load_model(
            self.folder, adapters=self.adapters, precision=precision, device=device, revision=self.revision
        )

    def load_frozen(self, *, precision: str, device: str) -> "nn.Module":
        """A model that is not trained, with the scorer that gives its own log-probabilities."""
        from ctpd.probes import configure_scorer

        model: nn.Module = self.load(precision=precision, device=device)
        configure_scorer(model)
        return model

    def load_tokenizer(self) -> Any:
        """The tokenizer."""
        from ctpd.models import load_tokenizer

        return load_tokenizer(self.tokenizer, revision=self.tokenizer_revision)
