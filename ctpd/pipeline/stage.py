"""The base class of stages: a frozen configuration and inputs, which determine the key, and `build`.

Every field of a stage but its label is part of the key, and so is every stage that it can read. `build` runs on a copy
without the label, and `Work.path` gives the folders of inputs only, so nothing outside the key can affect an artifact.
"""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel

from ctpd.core import identity
from ctpd.pipeline.runtime import Runtime
from ctpd.train.loggers import LogTarget


@dataclasses.dataclass(frozen=True)
class Work:
    """The arguments of a build: its folder, its inputs' folders, and execution settings.

    Attributes:
        folder: where the stage writes its files.
        runtime: device, memory and loggers; they change results by rounding at most.
        progress: called with (done, total).
        writes: whether this process writes files; in a collective stage only rank 0 does.
        folders: key -> folder of each input.
        note: called with a sentence for the user.
        remark: called with what the user should know of the result, which is shown when the stage has ended.
        log_target: where the loggers of a training write.
        detail: called with what is shown beside the progress, such as the loss.
    """

    folder: Path
    runtime: Runtime
    progress: Callable[[int, int], None]
    writes: bool = True
    folders: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    note: Callable[[str], None] = lambda text: None
    remark: Callable[[str], None] = lambda text: None
    log_target: LogTarget | None = None
    detail: Callable[[str], None] = lambda text: None

    def path(self, stage: "Stage") -> Path:
        """The folder of an input's artifact.

        Raises:
            LookupError: the stage is not an input of the stage that is built, and so not part of its key.
        """
        if stage.key not in self.folders:
            raise LookupError(f"the build reads {stage.kind}, which is not an input and so not part of the key")
        return self.folders[stage.key]


class Part:
    """A frozen dataclass that several stages have in common, such as a model with its tokenizer and adapters.

    All of its fields are part of the key, unless it overrides `identity`.
    """

    @property
    def identity(self) -> Any:
        """The part's contribution to a key, as JSON types."""
        return {name: _identity(value) for name, value in _own_fields(self)}

    @property
    def stages(self) -> Iterator[tuple[str, "Stage"]]:
        """The stages among the fields, by the path of the field."""
        for name, value in _own_fields(self):
            yield from _stages(value, name)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Stage(Part):
    """One artifact that can be built. Subclasses are frozen dataclasses whose fields determine the key.

    Attributes:
        label: shown in progress and plans; not part of the key.
    """

    kind: ClassVar[str]
    """The folder in the store."""
    version: ClassVar[int] = 1
    """Raised when `build` gives another result for the same fields, or when a default changes."""
    collective: ClassVar[bool] = False
    """All processes of a launch run `build` at once and divide its work; not part of the key."""

    label: str

    @abstractmethod
    def build(self, work: Work) -> None:
        """Write the artifact's files into ``work.folder``."""

    def attempts(self) -> "Iterator[Stage]":
        """Inputs, and inputs of these, that `build` can do without where their numbers were not finite; others have none."""
        yield from ()

    def is_whole(self, folder: Path) -> bool:
        """Whether an artifact holds all that this version writes; one that lacks what came later is still right."""
        return True

    @cached_property
    def inputs(self) -> dict[str, "Stage"]:
        """The stages whose artifacts `build` may read, by the path of their field."""
        return dict(self.stages)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the key, as JSON types."""
        fields = {name: _identity(value) for name, value in _own_fields(self)}
        return {"stage": self.kind, "version": self.version, **fields}

    @cached_property
    def key(self) -> str:
        """sha256 of the canonical identity, 32 hex digits."""
        return identity.digest(self.identity)[:32]

    def unlabelled(self) -> Self:
        """A copy without the label, on which `build` runs."""
        seen = copy.copy(self)
        del seen.__dict__["label"]
        return seen


def _own_fields(part: Part) -> Iterator[tuple[str, Any]]:
    """The fields that are part of a key: all but the label, without those that equal their default."""
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        if field.name == "label":
            continue
        value = getattr(part, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            yield field.name, value


def _identity(value: Any) -> Any:
    if isinstance(value, Stage):
        return f"{value.kind}/{value.key}"
    if isinstance(value, Part):
        return value.identity
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, tuple | list):
        return [_identity(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _identity(item) for name, item in value.items()}
    if isinstance(value, BaseModel) or value is None or isinstance(value, bool | int | float | str):
        return identity.identity(value)
    raise TypeError(f"a field of type {type(value).__name__} cannot be part of a key")


def _stages(value: Any, path: str) -> Iterator[tuple[str, Stage]]:
    if isinstance(value, Stage):
        yield path, value
    elif isinstance(value, Part):
        for name, stage in value.stages:
            yield f"{path}.{name}", stage
    elif isinstance(value, tuple | Mapping):
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        for key, item in items:
            yield from _stages(item, f"{path}.{key}")
