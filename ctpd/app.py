"""The composition root: joins the training graph and evaluation."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from ctpd.comparison import tables
from ctpd.core.config import digest, nearest, to_plain
from ctpd.core.errors import UserError
from ctpd.core.processes import processes
from ctpd.core.store import Store
from ctpd.pipeline.graph import Graph, Stage, Work
from ctpd.pipeline.progress import Progress
from ctpd.pipeline.references import META, SUMMARY, TRAINING, WRITTEN, External, LocatedModel, ModelRef, cached_digest
from ctpd.pipeline.runs import PlannedRun, plan_runs
from ctpd.pipeline.runtime import Runtime, provenance
from ctpd.pipeline.stages import SharedStages
from ctpd.recipe import EvaluationSpec, Recipe, load_recipe
from harness.suites import Column, Suite, load_suite

RESULT, RECORD = "result.json", "record.json"


class Experiment:
    """A recipe with its stages. Making one plans everything and computes nothing.

    Args:
        recipe: a shipped name or a path.
        only: keep these runs and untrained rows.
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
        shared = self._shared_settings()
        head = {
            "schema": 1,
            "recipe": self.recipe.name,
            "run": run.name,
            "seed": run.seed,
            "method": run.method.name if run.method else None,
            "params": dict(run.method.params) if run.method else {},
            "tuned": dict(run.spec.tuned) if run.spec else {},
            "shared": shared,
            "shared_hash": digest(shared),
            "suite": self.suite.name,
            "partial": self.recipe.shared.evaluation.limit is not None,
        }

        def build(work: Work) -> None:
            told = {**head, "signals": _signals(run), "in_memory": _in_memory(run)}
            _write_record(work, told, columns=[column.name for column in self.suite.columns])

        return Stage("record", 1, head, build, f"record: {run.title}", inputs)

    def _shared_settings(self) -> dict[str, Any]:
        """The settings that a comparison's runs have in common: no seeds, no paths of this machine, digests instead."""
        shared = to_plain(self.recipe.shared)
        del shared["seeds"], shared["evaluation"]
        for role, base in self.stages.bases.items():
            if isinstance(base.root, External):
                shared[role]["model"] = base.root.digest
        shared["data"]["digests"] = {
            name: value for name, value in self.stages.pairs.external.items() if name.startswith("data.")
        }
        for split in ("train", "eval"):
            if shared["data"][split] is not None:
                shared["data"][split]["path"] = None
        return dict(shared)


def run(
    recipe: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str] = "runs",
    runtime: Runtime | None = None,
    quiet: bool = True,
) -> list[Any]:
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
        (work.folder / RESULT).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")

    inputs = {**model.stages("model"), **world}
    external = {**model.externals("model"), **(_mirror_digests(column, spec) if not world else {})}
    return Stage("evaluate", 2, config, build, f"evaluate: {title} on {column.name}", inputs, external)


def _mirror_digests(column: Column, spec: EvaluationSpec) -> dict[str, str]:
    """What a mirror of the hub holds for a column: other documents under the same task make another result."""
    if spec.data_root is None:
        return {}
    root = Path(spec.data_root).expanduser()
    folders = {f"data.{name}": root / name for name in column.datasets} or {"data": root}
    return {name: cached_digest(folder) for name, folder in folders.items() if folder.is_dir()}


def _evaluate(
    work: Work, located: LocatedModel, column: Column, spec: EvaluationSpec, *, precision: str, data_root: Path | None
) -> dict[str, Any]:
    from ctpd.models import load_model, load_tokenizer
    from harness.evaluate import evaluate_column, evaluate_with_vllm

    protocol = {"data_root": data_root, "limit": spec.limit, "chat_template": spec.chat_template}
    tokenizer = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
    if spec.backend == "vllm":
        if processes().world_size > 1:
            raise UserError("vLLM in a launch of several processes is not supported", fix="Evaluate with one process")
        with _one_folder(located, precision=precision) as (folder, revision):
            return evaluate_with_vllm(
                folder, tokenizer, column, precision=precision, revision=revision,
                tokenizer_location=located.tokenizer, tokenizer_revision=located.tokenizer_revision, **protocol,
            )  # fmt: skip
    loaded = load_model(
        located.folder, adapters=located.adapters, precision=precision, device=work.runtime.torch_device(),
        revision=located.revision,
    )  # fmt: skip
    return evaluate_column(
        loaded, tokenizer, column, batch_size=spec.batch_size, progress=work.progress, **protocol,
    )  # fmt: skip


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


def _write_record(work: Work, head: Mapping[str, Any], *, columns: Sequence[str]) -> None:
    def read(name: str, file: str) -> Any:
        return json.loads((work.inputs[name] / file).read_text(encoding="utf-8"))

    evaluation = {column: {**read(f"evaluation.{column}", RESULT), "name": column} for column in columns}
    meta = read("pairs", META)
    record = {
        **head,
        "training": read("training", TRAINING) if "training" in work.inputs else None,
        "weights": read("weights", SUMMARY) if "weights" in work.inputs else None,
        "data": {
            "pairs": len(meta["pair_ids"]),
            "dropped": meta["dropped"],
            "report": meta["report"],
            "written": read("generated", WRITTEN) if "generated" in work.inputs else None,
        },
        "evaluation": evaluation,
        "provenance": {**provenance(work.runtime), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
    }
    (work.folder / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def read_records(experiment: Experiment, store: Store) -> list[dict[str, Any]]:
    """The records that are there. Raises UserError if there is none."""
    found = [store.open(stage.kind, stage.key) for stage in experiment.records if store.has(stage.kind, stage.key)]
    if not found:
        raise UserError(
            f"the store {store.root} holds no record of this recipe",
            where=experiment.source,
            fix=f"Run `ctpd run {experiment.source}` first, or give another --store",
        )
    return [json.loads((folder / RECORD).read_text(encoding="utf-8")) for folder in found]


def missing_runs(experiment: Experiment, store: Store) -> list[PlannedRun]:
    """The runs whose record is not there."""
    stages = zip(experiment.runs, experiment.records, strict=True)
    return [run for run, stage in stages if not store.has(stage.kind, stage.key)]


def _pairs_of(run: PlannedRun, stages: SharedStages) -> Stage:
    """The pairs that a run was trained on: the data's own, or those with a model's responses."""
    return stages.pairs if run.training is None else run.training.inputs["pairs"]


def _signals(run: PlannedRun) -> list[str]:
    """The stored signals that a run reads, and the responses that were written for it: each a pass over the pairs."""
    written = run.training.inputs["pairs"].inputs.get("generated") if run.training is not None else None
    upstream = [stage for made in (run.training, run.weights) if made is not None for stage in made.inputs.values()]
    labels = [stage.label.split(": ", 1)[1] for stage in upstream if stage.kind in ("signals", "distributions")]
    return sorted([*labels, *([written.label] if written is not None else [])])


def _in_memory(run: PlannedRun) -> list[str]:
    """The frozen models that are in memory while a run trains."""
    view = run.method.objective.teacher if run.method is not None else None
    return [] if view is None or view.is_stored else [signal.value.replace("_", " ") for signal in view.models]


def _narrowed(recipe: Recipe, *, seeds: Sequence[int], limit: int | None, source: str) -> Recipe:
    shared = recipe.shared
    unknown = sorted(set(seeds) - set(shared.seeds))
    if unknown:
        raise UserError(f"the recipe has no seed {unknown[0]}", where=source, fix=f"Its seeds are {list(shared.seeds)}")
    if seeds:
        shared = shared.model_copy(update={"seeds": tuple(seed for seed in shared.seeds if seed in seeds)})
    if limit is not None:
        evaluation = shared.evaluation.model_copy(update={"limit": limit})
        shared = shared.model_copy(update={"evaluation": evaluation})
    return recipe.model_copy(update={"shared": shared})


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
