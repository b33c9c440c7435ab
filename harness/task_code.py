"""What code a task would run. It is read from the task's definition alone, since loading a task runs some of it.

Trusted are this project's tasks and those that come with lm-eval, except that code which a model generates is never run
unasked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401 (fills the registry)
from lm_eval.api.registry import metric_registry

from ctpd.core.errors import UserError
from harness import task_yaml
from harness.suites import Column

_RUNS_GENERATED_CODE = ("code_eval",)


def refuse_code(column: Column, index: Mapping[str, Any], *, trusted: tuple[Path, ...]) -> None:
    """Refuse a column whose task, or a member of it, runs code that does not come with lm-eval or this project.

    Args:
        column: the column.
        index: lm-eval's index of tasks.
        trusted: the folders whose definitions may name functions.

    Raises:
        UserError: it does.
    """
    for reason in _Search(index, tuple(folder.resolve() for folder in trusted)).reasons(column.task):
        raise UserError(
            f"the task '{column.task}' {reason}",
            where=f"column '{column.name}'",
            fix=f"If you trust it, write `allow_code: [{column.task}]` into the `evaluation` block of a recipe",
        )


@dataclass
class _Search:
    index: Mapping[str, Any]
    trusted: tuple[Path, ...]
    seen: set[str] = field(default_factory=set)

    def reasons(self, name: str) -> Iterator[str]:
        """Why the task, group or tag ``name`` runs code, if it does."""
        entry = self.index.get(name)
        if name in self.seen or entry is None:
            return
        self.seen.add(name)
        members = sorted(entry.tags) if entry.yaml_path is None else []
        if entry.yaml_path is not None:
            files = dict(self._files(Path(entry.yaml_path), frozenset()))
            for path, own in files.items():
                if not self._is_trusted(path):
                    yield from _functions(path, own)
            merged: dict[str, Any] = {}
            for own in reversed(files.values()):
                merged |= own
            yield from _generated(merged)
            if not self._is_trusted(Path(entry.yaml_path)):
                yield from _fetched(merged)
            members = list(task_yaml.members(merged))
        for member in members:
            yield from self.reasons(member)

    def _files(self, path: Path, above: frozenset[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A YAML file and those that it includes, each before the ones that it overrides."""
        path = path.expanduser().resolve()
        if path in above:
            return
        own = task_yaml.parse(path.read_text(encoding="utf-8"))
        if not isinstance(own, dict):
            return
        yield path, own
        for name in reversed(task_yaml.included(own)):
            yield from self._files(path.parent / name, above | {path})

    def _is_trusted(self, path: Path) -> bool:
        return any(path.resolve().is_relative_to(folder) for folder in self.trusted)


def _functions(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    for keys, value in task_yaml.leaves(config):
        if isinstance(value, task_yaml.Tagged):
            yield f"runs Python of its own (`{keys[-1]}: !{value.tag} {value}` in {path})"


def _generated(config: Mapping[str, Any]) -> Iterator[str]:
    for keys, value in task_yaml.leaves(config):
        key = keys[-1]
        if (key == "unsafe_code" and value) or (key == "metric" and value in _RUNS_GENERATED_CODE):
            yield "runs the code that a model generates"


def _fetched(config: Mapping[str, Any]) -> Iterator[str]:
    """Metrics that lm-eval does not know are programs, which a library fetches."""
    metrics = config.get("metric_list") or []
    if config.get("process_results") is not None:  # then they are names of what it computes
        return
    for metric in metrics:
        name = metric.get("metric") if isinstance(metric, Mapping) else metric
        if isinstance(metric, Mapping) and (metric.get("hf_evaluate") or name not in metric_registry):
            yield f"runs the program of a metric that lm-eval does not have ('{name}')"
