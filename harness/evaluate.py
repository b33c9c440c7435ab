"""Scores of one model on one column of a suite, by lm-eval's Python API.

Official task definitions are used untouched. Data comes from the hub, or offline from ``data_root``, a folder that
mirrors it (``<org>/<name>/``): ``datasets`` prefers a folder of that relative name, so tasks are built with
``data_root`` as the working directory (EVALUATION 2.1).
"""

import contextlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lm_eval.tasks
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string
from torch import nn
from transformers import PreTrainedTokenizerBase

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from harness.backends import SharedContextLM, open_vllm
from harness.isolation import Progress, compiled_templates, dataset_cache, quiet, seeded, shown
from harness.record import ColumnResult, DocumentScore, Protocol
from harness.suites import Column

OUR_TASKS = Path(__file__).parent / "tasks"
PACKAGED_TASKS = Path(lm_eval.tasks.__file__).parent

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's defaults; the last one picks the few-shot examples, so another one gives other prompts."""


class Documents(NamedTuple):
    """Which documents of a task are evaluated, and how their prompts are made.

    Attributes:
        data_root: a mirror of the hub; None takes the hub itself (or the cache of ``datasets``).
        limit: the first so many documents of each task; None takes all.
        chat_template: whether prompts are rendered with the tokenizer's chat template.
    """

    data_root: Path | None
    limit: int | None = None
    chat_template: bool = False


class Pinned(NamedTuple):
    """A model or tokenizer directory, or a hub id with its revision."""

    location: str | Path
    revision: str | None = None


class Scores(NamedTuple):
    """What lm-eval says of a model on one column, whatever computed it; for the fields see ``ColumnResult``."""

    value: float
    stderr: float | None
    also: dict[str, float]
    scored: tuple[DocumentScore, ...]
    shots: int | None
    num_docs: int
    num_total: int
    task_hash: str


class Computed(NamedTuple):
    """What computed the scores of a column, and what it had to say."""

    backend: Literal["hf", "vllm"]
    dtype: str
    batch_size: int | None
    max_length: int
    truncated: int | None
    unshared: str | None
    seconds: float


def evaluate_column(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    column: Column,
    documents: Documents,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> ColumnResult:
    """Evaluate a loaded causal language model on one column; model, tokenizer and global RNGs are left as found.

    Args:
        model: a transformers or PEFT model, evaluated on the device and in the dtype that it has.
        tokenizer: the model's; a copy is used, since lm-eval gives a tokenizer without a pad token one.
        column: what to measure.
        documents: which documents, and how they are prompted.
        batch_size: rows of one forward pass; a row holds all choices of a document. Part of the protocol: float noise
            moves with it, and with which requests share a row or a prefix.
        progress: called after each answered request.

    Raises:
        UserError: unknown task, other version than the suite's, missing data, missing metric or chat template.
    """
    _check_template(tokenizer, documents)
    modes = [(module, module.training) for module in model.modules()]
    start = time.perf_counter()
    try:
        report = shown(progress) if progress is not None else None
        with quiet("lm_eval"):
            lm = SharedContextLM(model, tokenizer, batch_size=batch_size, progress=report)
        scores = score(lm, column, documents)
    finally:
        for module, training in modes:
            module.training = training
    computed = Computed(
        backend="hf",
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=batch_size,
        max_length=lm.max_length,
        truncated=lm.num_truncated,
        unshared=lm.unshared,
        seconds=time.perf_counter() - start,
    )
    return _result(column, documents, scores, computed)


def evaluate_with_vllm(
    model: Pinned,
    tokenizer_at: Pinned,
    tokenizer: PreTrainedTokenizerBase,
    column: Column,
    documents: Documents,
    *,
    precision: str,
) -> ColumnResult:
    """The same for a model directory (or hub id) through vLLM; see ``evaluate_column``.

    Args:
        model: where it is.
        tokenizer_at: where vLLM finds its tokenizer, which ``tokenizer`` is.
        precision: the dtype to load the model in.

    Raises:
        UserError: as there, or vLLM is not installed.
    """
    start = time.perf_counter()
    _check_template(tokenizer, documents)
    lm: Any = open_vllm(
        model.location,
        tokenizer_at.location,
        precision=precision,
        revision=model.revision,
        tokenizer_revision=tokenizer_at.revision,
    )
    scores = score(lm, column, documents)
    seconds = time.perf_counter() - start
    return _result(column, documents, scores, Computed("vllm", precision, None, lm.max_length, None, None, seconds))


def score(lm: LM, column: Column, documents: Documents) -> Scores:
    """Evaluate any lm-eval model on one column; raises as ``evaluate_column``."""
    _, limit, chat_template = documents
    with seeded(torch.device(lm.device or "cpu"), seeds=SEEDS), quiet("lm_eval"):
        kept = _kept(column, data_root=documents.data_root)
        loaded = kept.ready(limit=limit, chat_template=chat_template)
        with kept.dataset_cache(), compiled_templates():
            results = run_lm_eval(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=1000,  # only metrics without a closed form draw; the means of our suites have one
                apply_chat_template=chat_template,
                fewshot_as_multiturn=True,  # the default of lm-eval's entry point; acts with a chat template only
            )
        kept.prompts = None if chat_template else (limit,)
    assert results is not None, "one process evaluates: rank 0"
    scores, samples = results["results"][column.task], results["samples"]
    metric, filter_name = column.metric.split(",")
    stderr = scores.get(f"{metric}_stderr,{filter_name}")
    counts = [results["n-samples"][name] for name in samples]
    return Scores(
        value=float(scores[column.metric]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        also={key: float(scores[key]) for key in column.also},
        scored=tuple(
            DocumentScore(sample["doc_hash"], float(sample[metric]))
            for name in sorted(samples)
            for sample in samples[name]
            if sample["filter"] == filter_name
        ),
        shots=next(iter(loaded["tasks"].values())).config.num_fewshot,
        num_docs=sum(count["effective"] for count in counts),
        num_total=sum(count["original"] for count in counts),
        task_hash=_task_hash(samples),
    )


def _result(column: Column, documents: Documents, scores: Scores, computed: Computed) -> ColumnResult:
    protocol = Protocol(
        task=column.task,
        version=column.version,
        shots=scores.shots,
        metric=column.metric,
        chat_template=documents.chat_template,
        num_docs=scores.num_docs,
        num_total=scores.num_total,
        backend=computed.backend,
        dtype=computed.dtype,
        batch_size=computed.batch_size,
        seeds=SEEDS,
        lm_eval_version=installed_version("lm_eval"),
        task_hash=scores.task_hash,
    )
    return ColumnResult(
        protocol=protocol,
        value=scores.value,
        stderr=scores.stderr,
        also=scores.also,
        limit=documents.limit,
        documents=scores.scored,
        max_length=computed.max_length,
        truncated=computed.truncated,
        unshared=computed.unshared,
        seconds=round(computed.seconds, 3),
    )


def _check_template(tokenizer: PreTrainedTokenizerBase, documents: Documents) -> None:
    if documents.chat_template and tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template", fix="Evaluate with `chat_template: false`")


def check_column(column: Column, *, data_root: Path | None) -> None:
    """Build the tasks of a column, and keep them: what is missing is said before hours of training, not after.

    Raises:
        UserError: as ``load_tasks``.
    """
    with quiet("lm_eval"):
        _kept(column, data_root=data_root)


@dataclass(eq=False)
class _Kept:
    """The loaded tasks of a column, for all models that this process evaluates on it.

    Attributes:
        tasks: what ``load_tasks`` gave.
        folder: the cache of ``datasets`` for a mirror's files, which tasks go on to use; None where they are the hub's.
        prompts: the limit that the tasks' prompts were built for, in a tuple; None if they must be built.
    """

    tasks: Any
    folder: str | None
    prompts: tuple[int | None] | None = None

    def dataset_cache(self) -> contextlib.AbstractContextManager[None]:
        """A cache of its own for a mirror's files; the hub's are cached by revision, where they always are."""
        return contextlib.nullcontext() if self.folder is None else dataset_cache(self.folder)

    def ready(self, *, limit: int | None, chat_template: bool) -> Any:
        """The tasks as if newly loaded, but with their prompts if these would be the same: no template renders them."""
        same = not chat_template and self.prompts == (limit,)
        self.prompts = None  # until the evaluation that is about to begin has built them
        for task in self.tasks["tasks"].values():
            if same:
                task.build_all_requests = _as_built
                for instance in task.instances:
                    instance.resps, instance.filtered_resps = [], {}
            else:
                vars(task).pop("build_all_requests", None)
                task.set_fewshot_seed(seed=SEEDS["fewshot"])
        return self.tasks


def _as_built(**_: Any) -> None:
    """Replaces the task's method that builds prompts: they are built already."""


_KEPT: dict[Any, _Kept] = {}
MAX_KEPT = 8


def _kept(column: Column, *, data_root: Path | None) -> _Kept:
    """The column's tasks, loaded once in a process for each state of the files; raises as ``load_tasks``."""
    key = column, _state(column, data_root)
    if key not in _KEPT:
        new = _Kept(None, None if data_root is None else tempfile.mkdtemp(prefix="ctpd-datasets-"))
        if new.folder is not None:
            weakref.finalize(new, shutil.rmtree, new.folder, ignore_errors=True)  # at the end of the process at last
        with new.dataset_cache():
            new.tasks = load_tasks(column, data_root=data_root)
        while len(_KEPT) >= MAX_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = new
    return _KEPT[key]


def _state(column: Column, data_root: Path | None) -> tuple[tuple[str, int, int], ...] | None:
    """Path, size and time of each file that a column reads from a mirror."""
    if data_root is None:
        return None
    folders = [data_root.resolve() / name for name in column.datasets or datasets_of(column)]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def load_tasks(column: Column, *, data_root: Path | None) -> Any:
    """Build the tasks of a column with its shots: lm-eval's ``TaskDict`` of tasks and groups.

    Raises:
        UserError: unknown task, other version than the suite's, shots or metric that the task lacks, missing data.
    """
    manager, folders = _task_manager(column)
    where = f"column '{column.name}'"
    entry = manager.task_index.get(column.task)
    if entry is None or entry.yaml_path is None:  # a tag has no file, and no score of its own
        raise UserError(
            f"lm-eval has no task or group '{column.task}' in {' or '.join(map(str, folders))}."
            + nearest(column.task, [*manager.all_subtasks, *manager.all_groups]),
            where=where,
            fix="Correct `task`, or name the folder that defines it as `folder`",
        )
    datasets = sorted(_datasets(column.task, manager.task_index))
    ours = entry.yaml_path.is_relative_to(OUR_TASKS)
    if data_root is not None:
        for name in datasets:
            if "/" in name and not (data_root / name).is_dir():
                raise _missing_data(name, f"{data_root / name} does not exist", where, data_root, ours=ours)
    try:
        with contextlib.chdir(data_root) if data_root is not None else contextlib.nullcontext():
            loaded = manager.load([column.task])
    except (OSError, ValueError, DatasetsError) as error:
        raise _missing_data(", ".join(datasets), str(error), where, data_root, ours=ours) from error
    group = loaded.get("groups", {}).get(column.task)
    found = group.version if group is not None else loaded["tasks"][column.task].VERSION
    if str(found) == "N/A" or float(found) != column.version:
        raise UserError(
            f"the task '{column.task}' has version {found}, and the suite was written for {column.version}",
            where=where,
            fix="Install the lm-eval that the project pins, or write a suite for this version",
        )
    if group is not None and not group.has_aggregation:
        raise UserError(f"the group '{column.task}' has no score of its own", where=where, fix="Name one of its tasks")
    for task in loaded["tasks"].values():
        _set_shots(task, column.shots, where=where)
        _check_metrics(task, column, where=where)
    return loaded


def datasets_of(column: Column) -> list[str]:
    """Names of the data sets that a column's task reads."""
    manager, _ = _task_manager(column)
    return sorted(_datasets(column.task, manager.task_index))


def _task_manager(column: Column) -> tuple[TaskManager, list[Path]]:
    if column.folder is None:
        folders = [folder for folder in (PACKAGED_TASKS / column.task, OUR_TASKS) if folder.is_dir()]
    else:
        folders = [PACKAGED_TASKS / column.folder]  # an absolute folder stays what it is
    return TaskManager(include_defaults=False, include_path=folders), folders


def _set_shots(task: Task, shots: int | None, *, where: str) -> None:
    own = task.get_config("num_fewshot")
    if own == 0 and shots:  # a task that fixes 0 has its examples in the prompt; lm-eval ignores any other number
        raise UserError(f"the task '{task.task_name}' takes no shots, and the suite asks for {shots}", where=where,
                        fix="Write `shots: 0` or `shots: null`")  # fmt: skip
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _check_metrics(task: Task, column: Column, *, where: str) -> None:
    """Refuse now, not after the evaluation, a metric that the task does not report or that falls as models improve."""
    filters = [one["name"] for one in task.config.filter_list or [{"name": "none"}]]
    keys = [f"{metric},{name}" for metric in task.aggregation() for name in filters]
    for key in (column.metric, *column.also):
        if key not in keys:
            raise UserError(f"the task '{task.task_name}' has no metric '{key}'.{nearest(key, keys)}", where=where,
                            fix=f"Metrics are: {', '.join(keys)}")  # fmt: skip
    if not task.higher_is_better().get(column.metric.split(",")[0], True):
        raise UserError(f"'{column.metric}' is better when lower, and tables rank higher as better", where=where,
                        fix="Report another metric")  # fmt: skip


def _datasets(name: str, index: Mapping[str, Any]) -> set[str]:
    """Names of the data sets that a task, or the members of a group or tag, read."""
    entry = index.get(name)
    if entry is None:
        return set()
    config = entry.cfg or {}
    if "dataset_path" in config:
        return {config["dataset_path"]}
    members = config.get("task", [])
    names = {
        member if isinstance(member, str) else str(member.get("task") or member.get("group")) for member in members
    }
    return set().union(*(_datasets(member, index) for member in (names if "group" in config else entry.tags)))


def _missing_data(dataset: str, reason: str, where: str, data_root: Path | None, *, ours: bool) -> UserError:
    if ours:
        fix = "Run the recipe that writes this data, for example `ctpd run testbed`"
    else:
        target = f"{data_root if data_root is not None else 'DATA_ROOT'}/{dataset}"
        fix = (
            f"Fetch it on a machine with a network, `hf download {dataset} --repo-type dataset --local-dir {target}`, "
            "and give DATA_ROOT as the data root"
        )
    return UserError(f"the data set '{dataset}' could not be loaded ({reason})", where=where, fix=fix)


def _task_hash(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Hash of documents, prompts and targets: for one task the value that lm-eval's tracker reports."""
    hashes = [
        hash_string("".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in of_task))
        for _, of_task in sorted(samples.items())
    ]
    return hashes[0] if len(hashes) == 1 else hash_string("".join(hashes))
