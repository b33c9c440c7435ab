"""Record the keys of testbed-smoke, and defaults by stage, in files that make every change visible in review.

`python -m tests.regression.identities` writes both files.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ctpd.app import Experiment
from ctpd.core.config import to_plain
from ctpd.pipeline import stages
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.methods import METHODS, Method, params_type
from ctpd.pipeline.stage import Part, Stage

KEYS, DEFAULTS = (Path(__file__).with_name(name) for name in ("keys.json", "defaults.json"))
RECIPE = "testbed-smoke"


def keys() -> dict[str, str]:
    """Label -> kind and key of every stage of the smallest recipe."""
    return {stage.label: f"{stage.kind}/{stage.key}" for stage in Graph(Experiment(RECIPE).records).stages}


def defaults() -> dict[str, Any]:
    """Kind -> version, and the default of every field that its key leaves out when it has that value."""
    return {
        kind.kind: {
            "version": kind.version,
            "defaults": dict(sorted(_of_type(kind, kind.kind), key=lambda item: item[0])),
        }
        for kind in sorted(stage_types(), key=lambda kind: kind.kind)
    }


def stage_types() -> list[type[Stage]]:
    """Every kind of stage."""
    folder = Path(next(iter(stages.__path__)))
    modules = [import_module(f"{stages.__name__}.{path.stem}") for path in sorted(folder.glob("[a-z]*.py"))]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [value for value in found if issubclass(value, Stage) and value is not Stage]


def _of_type(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    if kind is Method:
        for name in METHODS:
            yield from _of_type(params_type(name), f"{path}.{name}")
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, model_field in kind.model_fields.items():
            if not model_field.is_required():
                yield f"{path}.{name}", to_plain(_enumerated(model_field.get_default(call_default_factory=True)))
            yield from _of_annotation(model_field.annotation, f"{path}.{name}")
    elif isinstance(kind, type) and issubclass(kind, Part) and not dataclasses.is_dataclass(kind):
        for choice in sorted(kind.__subclasses__(), key=lambda choice: choice.__name__):
            yield from _of_type(choice, f"{path}.{choice.__name__}")
    elif isinstance(kind, type) and issubclass(kind, Part):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                yield f"{path}.{field.name}", to_plain(field.default)
            if field.name != "label":
                yield from _of_annotation(hints[field.name], f"{path}.{field.name}")


def _of_annotation(hint: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(hint, type) and issubclass(hint, Stage):
        return
    yield from _of_type(hint, path)
    for part in typing.get_args(hint):
        yield from _of_annotation(part, path)


def _enumerated(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, tuple) else value


if __name__ == "__main__":
    content = {"lm_eval": metadata.version("lm_eval"), "keys": keys()}
    KEYS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    DEFAULTS.write_text(json.dumps(defaults(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
