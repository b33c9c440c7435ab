"""The composition root: joins the training graph and evaluation."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from ctpd.core.config import nearest, to_plain
from ctpd.core.errors import UserError
from ctpd.core.processes import processes
from ctpd.core.recipe import EvaluationSpec, Recipe, load_recipe
from ctpd.core.store import Store
from ctpd.pipeline.graph import Graph, Stage, Work
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.references import (
    META,
    SUMMARY,
    TRAINING,
    WRITTEN,
    LocatedModel,
    ModelRef,
    cached_digest,
    external_model,
)
from ctpd.pipeline.runs import PlannedRun, plan_runs
from ctpd.pipeline.runtime import Runtime, provenance
from ctpd.pipeline.signals import models_in_memory, stored_signals
from ctpd.pipeline.stages import SharedStages
from harness.comparison import tables
from harness.record import (
    Clamp,
    ColumnResult,
    DataSummary,
    Method,
    Provenance,
    Record,
    RecordHead,
    Role,
    RowKind,
    WeightsSummary,
    training_summary,
)
from harness.shared import local_settings, shared_settings
from harness.sheet import Table
from harness.suites import Column, Suite, load_suite

RESULT, RECORD = "result.json", "record.json"

UNTRAINED: Mapping[Role, RowKind] = {"teacher": "untrained teacher", "student": "untrained student"}


class Experiment:
    """A recipe with its stages. Making one plans everything and computes nothing.

    Args:
        recipe: a shipped name or a path.
        only: keep these runs and anchors.
        seeds: keep these seeds.
        limit: evaluate on so many documents of each task; overrides the recipe's.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str],
        *,
        only: Sequence[str] = (),
        seeds: Sequence[int] = (),
        limit: int | None = None,
    ) -> None:
        self.source, self.limit = str(recipe), limit
        self.recipe = _narrowed(load_recipe(recipe), seeds=seeds, limit=limit, source=self.source)
        self.stages = SharedStages(self.recipe.shared, source=self.source)
        runs = list(plan_runs(self.recipe, self.stages, source=self.source))
        self.runs = _chosen(runs, only, source=self.source)

    @cached_property
    def suite(self) -> Suite:
        """The columns to evaluate."""
        return load_suite(self.recipe.shared.evaluation.suite)

    @cached_property
    def training(self) -> list[Stage]:
        """The artifacts that stand for the models to be evaluated, ready-made ones left out."""
        return [run.model.newest for run in self.runs if isinstance(run.model.newest, Stage)]

    @cached_property
    def evaluations(self) -> dict[int, dict[str, Stage]]:
        """Run number -> column -> evaluation stage."""
        return {
            number: {column.name: self._evaluation(run, column) for column in self.suite.columns}
            for number, run in enumerate(self.runs)
        }

    @cached_property
    def records(self) -> list[Stage]:
        """One record a run and seed."""
        return [self._record(run, self.evaluations[number]) for number, run in enumerate(self.runs)]

    def check_suite(self, store: Store) -> None:
        """Load the tasks that are still to be evaluated: what is missing is said before hours of training, not after.

        Raises:
            UserError: an unknown task, another version than the suite's, missing data.
        """
        root = self.recipe.shared.evaluation.data_root
        stages = [(name, stage) for columns in self.evaluations.values() for name, stage in columns.items()]
        missing = {name for name, stage in stages if not store.has(stage.kind, stage.key)}
        if root == "testbed" or not missing:  # the recipe itself writes the testbed's data
            return
        from harness.evaluate import check_column

        for column in self.suite.columns:
            if column.name in missing:
                check_column(column, data_root=None if root is None else Path(root).expanduser())

    def _evaluation(self, run: PlannedRun, column: Column) -> Stage:
        spec = self.recipe.shared.evaluation
        world = {"world": self.stages.world} if spec.data_root == "testbed" else {}
        return evaluation_stage(
            run.model, column, spec, precision=self.recipe.shared.precision, title=run.title, world=world
        )

    def _record(self, run: PlannedRun, evaluations: Mapping[str, Stage]) -> Stage:
        inputs = {f"evaluation.{column}": stage for column, stage in evaluations.items()}
        inputs["pairs"] = _pairs_of(run, self.stages)
        if "generated" in inputs["pairs"].inputs:
            inputs["generated"] = inputs["pairs"].inputs["generated"]
        if isinstance(run.model.newest, Stage):
            inputs["training"] = run.model.newest
        if run.weights is not None:
            inputs["weights"] = run.weights
        head = RecordHead(
            recipe=self.recipe.name,
            run=run.name,
            seed=run.seed,
            kind="trained" if run.method is not None else UNTRAINED[self.recipe.anchors[run.name]],
            method=_method(run),
            shared=shared_settings(self.recipe.shared, self._digests()),
            suite=self.suite.name,
            partial=self.recipe.shared.evaluation.limit is not None,
            signals=() if run.method is None else stored_signals(run.method.objective),
            in_memory=() if run.method is None else models_in_memory(run.method.objective),
        )

        def build(work: Work) -> None:
            _write_record(work, head, run, columns=[column.name for column in self.suite.columns])

        return Stage("record", 2, head.model_dump(mode="json"), build, f"record: {run.title}", inputs)

    def _digests(self) -> dict[str, str]:
        """Digests of what the recipe's `shared` block names by a path."""
        shared, found = self.recipe.shared, {}
        for name in local_settings(shared):
            if name.startswith("data."):
                found[name] = self.stages.pairs.external[name.removesuffix(".path")]
            else:
                role, _, part = name.partition(".")
                location = str(getattr(self.stages.spec(role), part))
                found[name] = external_model(location, revision=None, role=role).digest
        return found


def run(
    recipe: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str] = "runs",
    runtime: Runtime | None = None,
    quiet: bool = True,
) -> list[Table]:
    """Train, evaluate and compare everything that is missing; return the tables.

    In this process, or those of the launcher that has started it: a recipe's `launch` block starts none here.

    Args:
        recipe: a shipped name or a path.
        store: the folder of the artifacts.
        runtime: how to execute.
        quiet: print nothing.

    Raises:
        UserError: anything wrong with the recipe, the data or the models.
    """
    experiment, artifacts = Experiment(recipe), Store(Path(store))
    runtime = runtime or Runtime.of(experiment.recipe.launch)
    experiment.check_suite(artifacts)
    Graph(experiment.records).run(artifacts, runtime=runtime, progress=Progress(quiet=quiet))
    processes().destroy_process_group()
    columns = [column.name for column in experiment.suite.columns]
    return tables(experiment.recipe, read_records(experiment, artifacts), columns=columns)


def plan(recipe: str | os.PathLike[str]) -> Graph:
    """The whole graph of a recipe; nothing is computed."""
    return Graph(Experiment(recipe).records)


def evaluation_stage(
    model: ModelRef,
    column: Column,
    spec: EvaluationSpec,
    *,
    precision: str,
    title: str,
    world: Mapping[str, Stage],
) -> Stage:
    """One model on one task: the protocol, the task and the model are its identity; `spec.precision` comes first."""
    precision = spec.precision or precision
    task = {field: value for field, value in to_plain(column).items() if field not in ("name", "folder", "datasets")}
    config = {
        "task": task,
        "limit": spec.limit,
        "batch_size": spec.batch_size,
        "chat_template": spec.chat_template,
        "precision": precision,
        "backend": spec.backend,
        "lm_eval": metadata.version("lm_eval"),
    }

    def build(work: Work) -> None:
        root = work.inputs["world"] / "hub" if "world" in work.inputs else None
        if root is None and spec.data_root is not None:
            root = Path(spec.data_root).expanduser()
        located = model.located("model", work.inputs)
        result = _evaluate(work, located, column, spec, precision=precision, data_root=root)
        (work.folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")

    inputs = {**model.stages("model"), **world}
    external = {**model.externals("model"), **(_mirror_digests(column, spec) if not world else {})}
    return Stage("evaluate", 3, config, build, f"evaluate: {title} on {column.name}", inputs, external)


def _mirror_digests(column: Column, spec: EvaluationSpec) -> dict[str, str]:
    """What a mirror of the hub holds for a column: other documents under the same task make another result."""
    if spec.data_root is None:
        return {}
    root = Path(spec.data_root).expanduser()
    folders = {f"data.{name}": root / name for name in column.datasets} or {"data": root}
    return {name: cached_digest(folder) for name, folder in folders.items() if folder.is_dir()}


def _evaluate(
    work: Work, located: LocatedModel, column: Column, spec: EvaluationSpec, *, precision: str, data_root: Path | None
) -> ColumnResult:
    from ctpd.models import load_model, load_tokenizer
    from harness.evaluate import Documents, Pinned, evaluate_column, evaluate_with_vllm

    documents = Documents(data_root, limit=spec.limit, chat_template=spec.chat_template)
    tokenizer = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
    if spec.backend == "vllm":
        if processes().world_size > 1:
            raise UserError("vLLM in a launch of several processes is not supported", fix="Evaluate with one process")
        with _one_folder(located, precision=precision) as (folder, revision):
            place = Pinned(located.tokenizer, located.tokenizer_revision)
            return evaluate_with_vllm(
                Pinned(folder, revision), place, tokenizer, column, documents, precision=precision
            )
    loaded = load_model(
        located.folder, adapters=located.adapters, precision=precision, device=work.runtime.torch_device(),
        revision=located.revision,
    )  # fmt: skip
    return evaluate_column(loaded, tokenizer, column, documents, batch_size=spec.batch_size, progress=work.progress)


@contextlib.contextmanager
def _one_folder(located: LocatedModel, *, precision: str) -> Iterator[tuple[str, str | None]]:
    """A model as one directory (or hub id) and its revision; adapters are merged for the time."""
    if not located.adapters:
        yield located.folder, located.revision
        return
    from ctpd.models import load_model, save_model

    with tempfile.TemporaryDirectory() as temporary:
        model = load_model(
            located.folder, adapters=located.adapters, precision=precision, device="cpu", revision=located.revision
        )
        save_model(model, Path(temporary))
        yield temporary, None


def _write_record(work: Work, head: RecordHead, run: PlannedRun, *, columns: Sequence[str]) -> None:
    def read(name: str, file: str) -> Any:
        return json.loads((work.inputs[name] / file).read_text(encoding="utf-8"))

    meta = read("pairs", META)
    made = {**provenance(work.runtime), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    Record(
        **dict(head),
        training=training_summary(read("training", TRAINING)) if "training" in work.inputs else None,
        weights=_weights(work, run),
        data=DataSummary(
            pairs=len(meta["pair_ids"]),
            dropped=meta["dropped"],
            counts=meta["report"],
            generated=read("generated", WRITTEN) if "generated" in work.inputs else None,
        ),
        evaluation={column: read_result(work.inputs[f"evaluation.{column}"]) for column in columns},
        provenance=Provenance.model_validate_json(json.dumps(made)),
    ).write(work.folder / RECORD)


def _weights(work: Work, run: PlannedRun) -> WeightsSummary | None:
    if run.method is None or "weights" not in work.inputs:
        return None
    found = WeightsSummary.model_validate_json((work.inputs["weights"] / SUMMARY).read_bytes())
    weighting = run.method.objective.layout.weighting
    assert weighting is not None
    clamp = Clamp(k=weighting.k, mu=weighting.mu, lower=weighting.lower, upper=weighting.upper)
    return found.model_copy(update={"clamp": clamp})


def read_result(folder: Path) -> ColumnResult:
    """The result that an evaluation left in its folder."""
    return ColumnResult.model_validate_json((folder / RESULT).read_bytes())


def read_records(experiment: Experiment, store: Store) -> list[Record]:
    """The records that are there. Raises UserError if there is none."""
    found = [store.open(stage.kind, stage.key) for stage in experiment.records if store.has(stage.kind, stage.key)]
    if not found:
        raise UserError(
            f"the store {store.root} holds no record of this recipe",
            where=experiment.source,
            fix=f"Run `ctpd run {experiment.source}` first, or give another --store",
        )
    return [Record.read(folder / RECORD) for folder in found]


def missing_runs(experiment: Experiment, store: Store) -> list[PlannedRun]:
    """The runs whose record is not there."""
    stages = zip(experiment.runs, experiment.records, strict=True)
    return [run for run, stage in stages if not store.has(stage.kind, stage.key)]


def _pairs_of(run: PlannedRun, stages: SharedStages) -> Stage:
    """The pairs that a run was trained on: the data's own, or those with a model's responses."""
    return stages.pairs if run.training is None else run.training.inputs["pairs"]


def _method(run: PlannedRun) -> Method | None:
    if run.method is None or run.spec is None:
        return None
    return Method(name=run.method.name, params=dict(run.method.params), tuned=dict(run.spec.tuned))


def _narrowed(recipe: Recipe, *, seeds: Sequence[int], limit: int | None, source: str) -> Recipe:
    shared = recipe.shared
    unknown = sorted(set(seeds) - set(shared.seeds))
    if unknown:
        raise UserError(f"the recipe has no seed {unknown[0]}", where=source, fix=f"Its seeds are {list(shared.seeds)}")
    if seeds:
        shared = dataclasses.replace(shared, seeds=tuple(seed for seed in shared.seeds if seed in seeds))
    if limit is not None:
        shared = dataclasses.replace(shared, evaluation=dataclasses.replace(shared.evaluation, limit=limit))
    return dataclasses.replace(recipe, shared=shared)


def _chosen(runs: list[PlannedRun], only: Sequence[str], *, source: str) -> list[PlannedRun]:
    names = list(dict.fromkeys(run.name for run in runs))
    for name in only:
        if name not in names:
            raise UserError(
                f"the recipe has no run '{name}'.{nearest(name, names)}",
                where=source,
                fix=f"Its runs are {', '.join(names)}",
            )
    return [run for run in runs if not only or run.name in only]
