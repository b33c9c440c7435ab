"""The settings that all rows of a comparison have in common, with digests instead of paths."""

from collections.abc import Iterator, Mapping
from typing import Any

from ctpd.core.config import to_plain
from ctpd.core.identity import digest, identity
from ctpd.recipe import Shared
from harness.record import SharedSettings


def shared_settings(shared: Shared, digests: Mapping[str, str]) -> SharedSettings:
    """What a record keeps of a recipe's `shared` block.

    `seeds` and `evaluation` are left out: a record says its own seed, and the protocol of each column. The digest leaves
    out settings at their default, so that records made before and after a new setting compare as equal.

    Args:
        shared: the block.
        digests: for each of ``local_settings(shared)`` a digest of the contents that were found there. It replaces the
            path, so that equal contents at two paths compare as equal, and other contents at one path do not.
    """
    settings, compared = (_without_paths(values, shared, digests) for values in (to_plain(shared), identity(shared)))
    return SharedSettings(settings=settings, digest=digest(compared))


def _without_paths(values: dict[str, Any], shared: Shared, digests: Mapping[str, str]) -> dict[str, Any]:
    """The block as JSON, with a digest instead of each path."""
    for name in ("seeds", "evaluation"):
        values.pop(name, None)
    for name in local_settings(shared):
        *parents, last = name.split(".")
        block = values
        for parent in parents:
            block = block[parent]
        block[last] = digests[name]
    return values


def local_settings(shared: Shared) -> Iterator[str]:
    """The settings whose values are paths of files or folders, by their dotted names: ``teacher.sft``."""
    for role, model in (("teacher", shared.teacher), ("student", shared.student)):
        if model.model is not None and model.revision is None:
            yield f"{role}.model"
        if isinstance(model.sft, str) and model.sft != "skip":
            yield f"{role}.sft"
        for sign, phase in (("positive", model.positive), ("negative", model.negative)):
            if isinstance(phase, str):
                yield f"{role}.{sign}"
    for split, source in (("train", shared.data.train), ("eval", shared.data.eval)):
        if source is not None and source.path is not None:
            yield f"data.{split}.path"
