"""Rehearse a recipe: check its models' files, prepare all of its pairs, and run everything else small, in a store of its own."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctpd.app import Experiment, read_records
from ctpd.core.disk import explained
from ctpd.core.errors import CtpdError, UserError
from ctpd.core.store import Store
from ctpd.core.temporary import kept_in
from ctpd.pipeline.build import build_what_can_be
from ctpd.pipeline.evaluations import check_columns
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.model_checks import Skeletons, find_problems, origin
from ctpd.pipeline.notes import plan_notes, refuse_trainings
from ctpd.pipeline.progress import Bar, Progress
from ctpd.pipeline.references import External, Model
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Stage
from ctpd.recipe import EvaluationSpec
from ctpd.rehearsal.costs import Lengths, Needs
from ctpd.rehearsal.derive import STORE, stand_ins, write_recipe
from ctpd.rehearsal.outcome import Problem, Rehearsal, State, rows_of
from ctpd.rehearsal.requests import Requests, measured_requests
from ctpd.rehearsal.sizes import RealModels
from ctpd.text.prepare import PreparedPairs
from ctpd.text.prepared_files import read_prepared
from harness.files import file_stem
from harness.suites import Column, Suite, load_suite

TABLES = "tables and report"
STAND_INS = "stand-ins of the models"


def rehearse(experiment: Experiment, folder: Path, *, runtime: Runtime, progress: Progress, hub: bool) -> Rehearsal:
    """Rehearse a recipe; what fails is part of the result.

    Args:
        experiment: the recipe, all of it.
        folder: for everything that it writes: an empty one, or that of an earlier rehearsal.
        runtime: how to execute.
        progress: told of every stage.
        hub: whether the hub can be asked.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / STORE)
    with kept_in(store.root):
        found = _Rehearsing(experiment, folder, store, runtime, progress, hub).run()
    found.seconds = time.monotonic() - start
    return found


@dataclass
class _Rehearsing:
    """One rehearsal, in its parts."""

    experiment: Experiment
    folder: Path
    store: Store
    runtime: Runtime
    progress: Progress
    hub: bool
    states: dict[str, State] = field(default_factory=dict)
    """Of each stage of the rehearsal that was tried, by its label."""
    problems: list[Problem] = field(default_factory=list)
    unknown: list[Problem] = field(default_factory=list)

    def run(self) -> Rehearsal:
        """All parts: files, tasks, pairs, everything else, what it needs."""
        real = Graph([*self.experiment.choices, *self.experiment.outlook.records])
        skeletons = Skeletons(not self.hub, needs_weights=False)
        notes = self._check_files(real, skeletons)
        suites = self._suites()
        self._build(Graph([self.experiment.stages.pairs]))
        pairs = self.experiment.stages.pairs
        rehearsed = self._small(suites)
        requests = {} if rehearsed is None else measured_requests(rehearsed, self.store)
        folder = self._artifact(pairs)
        prepared = None if folder is None else read_prepared(folder)
        lengths = None if prepared is None else Lengths.of(prepared)
        needs = Needs(
            RealModels(skeletons), lengths, self.experiment.recipe.launch, Requests(requests, self.experiment)
        )
        rows, uneven = rows_of(real.stages, self.states, needs)
        known = "\n".join(problem.text for problem in self.problems)
        self.problems += [problem for problem in uneven if problem.text not in known]
        return Rehearsal(
            recipe=self.experiment.source,
            rows=rows,
            problems=self.problems,
            unknown=self.unknown,
            notes=notes,
            pairs=None if prepared is None else _pairs_facts(prepared),
            processes=self.experiment.recipe.launch.num_processes,
            sharded=self.experiment.recipe.launch.fsdp is not None,
        )

    def _artifact(self, stage: Stage) -> Path | None:
        return self.store.path(stage.kind, stage.key) if self.store.has(stage.kind, stage.key) else None

    def _check_files(self, real: Graph, skeletons: Skeletons) -> list[str]:
        """Check the plan and the files of the real models; returns what a user should know."""
        notes: list[str] = []
        with self._noted("plan"):
            notes += plan_notes(real)
            refuse_trainings(real.stages, num_processes=self.experiment.recipe.launch.num_processes)
        with self._noted("models"):
            found = find_problems(real.stages, skeletons)
            by_text: dict[str, list[str]] = {}
            for label, error in found.problems:
                by_text.setdefault(str(error), []).append(label)
            self.problems += [Problem("; ".join(labels), text) for text, labels in by_text.items()]
            notes += [f"{note}." for note in found.notes]
        self._check_weights_are_there(real, skeletons)
        return notes

    def _check_weights_are_there(self, real: Graph, skeletons: Skeletons) -> None:
        models = [model for stage in real.stages for model in _models(stage)]
        for source in dict.fromkeys(source for model in models if (source := origin(model.root)) is not None):
            with contextlib.suppress(UserError):  # said already
                skeleton = skeletons.of(source)
                if skeleton is None or skeleton.found is None:
                    self.unknown.append(Problem("weights", _unchecked(source)))

    def _suites(self) -> dict[str, str]:
        """Try every column; returns the suites that were written without those whose tasks cannot be had."""
        recipe = self.experiment.recipe
        names = [recipe.shared.evaluation.suite] + ([] if recipe.tune is None else [recipe.tune.suite])
        written = {}
        for name in dict.fromkeys(names):
            suite = load_suite(name)
            kept = [column for column in suite.columns if self._can_be_had(column, recipe.shared.evaluation)]
            if kept and len(kept) < len(suite.columns):
                written[name] = str(self._write_suite(suite, kept))
            elif not kept:
                written[name] = ""
        return written

    def _can_be_had(self, column: Column, spec: EvaluationSpec) -> bool:
        from harness.evaluate import check_code

        try:
            if column.task not in spec.allow_code:
                check_code(column)  # reads no data: what is wrong here is wrong with the hub, too
        except Exception as error:
            self.problems.append(Problem(f"column {column.name}", _text(error)))
            return False
        try:
            check_columns([column], spec, self.store)
        except Exception as error:  # of any library that reads the data
            needs_hub = spec.data_root is None and not self.hub
            (self.unknown if needs_hub else self.problems).append(Problem(f"column {column.name}", _text(error)))
            return False
        return True

    def _write_suite(self, suite: Suite, columns: Sequence[Column]) -> Path:
        path = self.folder / f"suite-{file_stem(suite.name)}.yaml"
        plain = suite.model_copy(update={"columns": tuple(columns)}).model_dump(mode="json", exclude_defaults=True)
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def _small(self, suites: dict[str, str]) -> Experiment | None:
        """Run the recipe with stand-ins, through to tables and report; None if it could not even be planned."""
        recipe, folder = self.experiment.recipe, self.folder
        small: Experiment | None = None
        with self._noted(STAND_INS):
            models = stand_ins(recipe, folder, local=not self.hub)
            replaced = {name: suite for name, suite in suites.items() if suite}
            small = Experiment(write_recipe(recipe, folder, suites=replaced, models=models), store=self.store)
        if small is None:
            return None
        if suites.get(recipe.shared.evaluation.suite) == "":  # no column is left, and so there is no record
            self._build(Graph([*small.training, *small.weights.values()]))
            self.unknown.append(Problem(TABLES, "No column of the suite could be had, so there is nothing to show."))
            return small
        if small.search is not None:
            self._build(Graph(small.choices))
            small = small.decided(self.store)
        self._build(Graph(small.records))
        with self._noted(TABLES):
            _write_tables(small, self.store, self.folder / "tables")
        return small

    def _build(self, graph: Graph) -> None:
        """Build what can be built: a stage that fails stops only those that read it."""
        shown = _WithoutNotes(self.progress)
        failures = build_what_can_be(graph, self.store, runtime=self.runtime, progress=shown)
        failed = {stage.key for stage, _ in failures}
        for stage in graph.stages:
            done = self.store.has(stage.kind, stage.key) or graph.failed(stage, self.store)
            self.states[stage.label] = State.RAN if done else State.FAILED if stage.key in failed else State.BLOCKED
        self.problems += [Problem(stage.label, _text(error)) for stage, error in failures]

    @contextmanager
    def _noted(self, where: str) -> Iterator[None]:
        """Put an error of the block on the page."""
        try:
            yield
        except Exception as error:  # whatever a stage or a library raises, the others can be tried
            self.problems.append(Problem(where, _text(error)))


class _WithoutNotes(Progress):
    """The progress of stages without remarks: what is remarked on few steps of a tiny model says nothing of the recipe."""

    def __init__(self, progress: Progress) -> None:
        self._shown = progress

    @contextmanager
    def stage(self, label: str, *, index: int, total: int) -> Iterator[Bar]:
        """As the progress."""
        with self._shown.stage(label, index=index, total=total) as bar:
            yield bar

    def note(self, text: str) -> None:
        """Nothing."""


def _models(stage: Stage) -> Iterator[Model]:
    for value in vars(stage).values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Model):
                yield item


def _unchecked(source: External) -> str:
    where = f"{source.location}: the directory holds configuration and tokenizer alone"
    if source.revision is not None:
        where = f"{source.location}: of the hub's model the headers of the weights are not on this machine"
    return f"{where}, so it could not be checked that its weights are whole and fit."


def _text(error: Exception) -> str:
    """An error as a paragraph."""
    error = explained(error) or error
    if isinstance(error, CtpdError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]} (a fault of ctpd, or of a library)"


def _pairs_facts(prepared: PreparedPairs) -> dict[str, Any]:
    """What became of the pairs: how many there are, how many were dropped and why, and their tokens."""
    return {
        "pairs": len(prepared.pair_ids),
        "dropped": {reason: number for reason, number in prepared.dropped.items() if number},
        "tokens": {"teacher": len(prepared.teacher.input_ids), "student": len(prepared.student.input_ids)},
        "spans": int(prepared.num_spans.sum()),
    }


def _write_tables(experiment: Experiment, store: Store, folder: Path) -> None:
    """Make tables, report and figures of the records, as `ctpd compare` does."""
    from harness import comparison

    records = read_records(experiment, store)
    columns = [column.name for column in experiment.suite.columns]
    made = comparison.tables(experiment.recipe, records, columns=columns)
    comparison.write_tables(made, folder)
    comparison.write_tuning(records, folder)
    comparison.write_report(experiment.recipe, made, records, folder)
    comparison.write_figures(made, records, folder)
