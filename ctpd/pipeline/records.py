"""The head of a record: what is known about a run before it is executed."""

from collections.abc import Mapping

from ctpd.core.config import to_plain
from ctpd.core.roles import Role
from ctpd.ops.weights import Signal
from ctpd.pipeline.plan import SharedStages
from ctpd.pipeline.references import external_model
from ctpd.pipeline.runs import PlannedRun
from ctpd.pipeline.stages.generate import generated_by
from ctpd.pipeline.stages.pairs import FilePairs
from ctpd.recipe import Recipe
from harness.record import Design, FrozenModel, Method, RecordHead, RowKind, StoredSignal
from harness.reproduction import own_recipe
from harness.shared import local_settings, shared_settings

UNTRAINED: Mapping[Role, RowKind] = {"teacher": "untrained teacher", "student": "untrained student"}


def record_head(run: PlannedRun, recipe: Recipe, stages: SharedStages, *, suite: str) -> RecordHead:
    """Run, method, parameters, the shared settings of the comparison, and the frozen models that the run uses."""
    return RecordHead(
        recipe=recipe.name,
        run=run.name,
        seed=run.seed,
        kind="trained" if run.training is not None else UNTRAINED[run.role],
        method=_method(run),
        shared=shared_settings(recipe.shared, _digests(recipe, stages)),
        suite=suite,
        partial=recipe.shared.evaluation.limit is not None,
        signals=signals_read(run),
        in_memory=teachers_in_memory(run),
        own_recipe=own_recipe(recipe, run=run.name, seed=run.seed, spec=run.role if run.spec is None else run.spec),
        design=_design(run),
    )


def _method(run: PlannedRun) -> Method | None:
    if run.method is None or run.spec is None:
        return None
    return Method(name=run.method.name, params=to_plain(run.method.params), tuned=dict(run.spec.tuned))


def _design(run: PlannedRun) -> Design | None:
    if run.training is None:
        return None
    requires, reference = run.training.method.requires, run.training.reference
    layout = requires.layout
    return Design(
        sides=requires.sides,
        granularity=layout.granularity,
        reference=None if reference is None else reference.config.role,
        weights=None if layout.weighting is None else layout.weighting.strategy,
    )


def _digests(recipe: Recipe, stages: SharedStages) -> dict[str, str]:
    """Digests of the files and folders that the recipe's `shared` block names by path."""
    found = {}
    for name in local_settings(recipe.shared):
        role, _, part = name.partition(".")
        if role == "data":
            source = stages.pair_sources[part.removesuffix(".path")]
            assert isinstance(source, FilePairs)
            found[name] = source.digest
        else:
            location = str(getattr(stages.spec("teacher" if role == "teacher" else "student"), part))
            found[name] = external_model(location, revision=None, role=role).digest
    return found


def signals_read(run: PlannedRun) -> tuple[StoredSignal, ...]:
    """The stored results of frozen models that a run reads; each costs one scoring pass over the pairs."""
    training = run.training
    if training is None:
        return ()
    view, generated = training.method.requires.teacher, generated_by(training.pairs)
    found: set[StoredSignal] = set()
    if training.reference is not None:
        found.add(StoredSignal(role=training.reference.config.role, model="reference", kept="log probabilities"))
    if training.weights is not None:
        signals = training.weights.signals
        found |= {StoredSignal(role=s.role, model=s.phase, kept="log probabilities") for s in signals}
    if view is not None and view.is_stored:
        found |= {StoredSignal(role=s.role, model=s.phase, kept="distributions") for s in view.models}
    if generated is not None:
        found.add(StoredSignal(role=generated.config.role, model="reference", kept="responses"))
    return tuple(sorted(found, key=lambda signal: (signal.role, signal.model, signal.kept)))


def teachers_in_memory(run: PlannedRun) -> tuple[FrozenModel, ...]:
    """The frozen models that are in memory while a run trains."""
    view = run.training.method.requires.teacher if run.training is not None else None
    return () if view is None or view.is_stored else tuple(map(_frozen, view.models))


def _frozen(signal: Signal) -> FrozenModel:
    return FrozenModel(role=signal.role, model=signal.phase)
