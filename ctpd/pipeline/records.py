"""What is known of a run before it is executed: the head of its record."""

from typing import Any

from ctpd.core.config import to_plain
from ctpd.core.identity import digest
from ctpd.core.roles import ROLES
from ctpd.pipeline.plan import SharedStages
from ctpd.pipeline.references import External
from ctpd.pipeline.runs import PlannedRun
from ctpd.pipeline.stages.generate import generated_by
from ctpd.pipeline.stages.pairs import FilePairs
from ctpd.recipe import Recipe


def record_head(run: PlannedRun, recipe: Recipe, stages: SharedStages, *, suite: str) -> dict[str, Any]:
    """Run, method, parameters, the settings that a comparison's runs share, and what the run reads."""
    shared = shared_settings(recipe, stages)
    return {
        "schema": 1,
        "recipe": recipe.name,
        "run": run.name,
        "seed": run.seed,
        "method": run.method.name if run.method else None,
        "params": to_plain(run.method.params) if run.method else {},
        "tuned": dict(run.spec.tuned) if run.spec else {},
        "shared": shared,
        "shared_hash": digest(shared),
        "suite": suite,
        "partial": recipe.shared.evaluation.limit is not None,
        "signals": signals_read(run),
        "in_memory": teachers_in_memory(run),
    }


def shared_settings(recipe: Recipe, stages: SharedStages) -> dict[str, Any]:
    """The settings that a comparison's runs have in common: no seeds, no paths of this machine, digests instead."""
    shared: dict[str, Any] = to_plain(recipe.shared)
    del shared["seeds"], shared["evaluation"]
    for role in ROLES:
        root = stages.bases[role].root
        if isinstance(root, External):
            shared[role]["model"] = root.digest
    files = {split: source for split, source in stages.pair_sources.items() if isinstance(source, FilePairs)}
    for split, source in files.items():
        shared["data"][split]["path"] = source.digest
    return shared


def signals_read(run: PlannedRun) -> list[str]:
    """The stored signals that a run reads, and the responses generated for it: each a pass over the pairs."""
    training = run.training
    if training is None:
        return []
    view = training.method.requires.teacher
    titles = [f"{training.reference.config.role} SFT"] if training.reference is not None else []
    titles += [signal.long_name for signal in training.weights.signals] if training.weights is not None else []
    titles += [signal.long_name for signal in view.models] if view is not None and view.is_stored else []
    generated = generated_by(training.pairs)
    return sorted([*titles, *([generated.label] if generated is not None else [])])


def teachers_in_memory(run: PlannedRun) -> list[str]:
    """The frozen models that are in memory while a run trains."""
    view = run.training.method.requires.teacher if run.training is not None else None
    return [] if view is None or view.is_stored else [signal.long_name for signal in view.models]
