"""Scores of one model on one column of a suite, by lm-eval's Python API.

The tasks of a column are loaded once in a process, for all models that are evaluated on it.
"""

import contextlib
import time
import weakref
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as run_lm_eval
from torch import nn
from transformers import PreTrainedTokenizerBase

from ctpd.core.temporary import TemporaryFolder
from harness.answers import Answer, Health
from harness.backends import SharedContextLM, open_vllm
from harness.endings import Endings, watched_vllm
from harness.finite import finite_logits, refuse_non_finite
from harness.generations import health_of
from harness.isolation import Progress, compiled_templates, dataset_cache, quiet, sandboxed_templates, seeded, shown
from harness.loading import SEEDS, datasets_of, find_task, load_tasks
from harness.prompts import Documents as Documents
from harness.prompts import check_template, template_of, template_use
from harness.record import ColumnResult, DocumentScore, Protocol
from harness.samples import answers_of, task_hash, write_samples
from harness.suites import Column
from harness.task_files import TaskFiles, task_files


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
    health: Health | None
    answers: tuple[Answer, ...]


class Computed(NamedTuple):
    """What computed the scores of a column, and what it had to say."""

    backend: Literal["hf", "vllm"]
    dtype: str
    batch_size: int | None
    max_length: int
    truncated: int | None
    unshared: str | None
    seconds: float
    alone: int = 0
    unfinished: int | None = None


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
        NotFinite: a logit, a likelihood or a score is NaN or infinite.
    """
    check_template(tokenizer, documents)
    modes = [(module, module.training) for module in model.modules()]
    start = time.perf_counter()
    try:
        report = shown(progress) if progress is not None else None
        with finite_logits(model) as check:
            with quiet("lm_eval"):
                lm = SharedContextLM(
                    model,
                    tokenizer,
                    batch_size=batch_size,
                    progress=report,
                    think_end_token=documents.think_end_token,
                )
            check()  # its trials, before hours of evaluation
            scores = score(lm, column, documents, lm.endings)
            check()
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
        alone=lm.num_alone,
        unfinished=lm.num_unfinished,
    )
    return _result(tokenizer, column, documents, scores, computed)


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
    check_template(tokenizer, documents)
    lm: Any = open_vllm(
        model.location,
        tokenizer_at.location,
        precision=precision,
        revision=model.revision,
        tokenizer_revision=tokenizer_at.revision,
        think_end_token=documents.think_end_token,
    )
    scores = score(lm, column, documents, watched_vllm(lm))
    seconds = time.perf_counter() - start
    computed = Computed("vllm", precision, None, lm.max_length, None, None, seconds, alone=getattr(lm, "num_alone", 0))
    return _result(tokenizer, column, documents, scores, computed)


def score(lm: LM, column: Column, documents: Documents, endings: Endings | None = None) -> Scores:
    """Evaluate any lm-eval model on one column; raises as ``evaluate_column``.

    Args:
        endings: where the model counts how its answers end; None where it does not.
    """
    limit, chat_template, allow_code = documents.limit, documents.chat_template, documents.allow_code
    folder = documents.samples
    with seeded(torch.device(lm.device or "cpu"), seeds=SEEDS), quiet("lm_eval"):
        kept = _kept(column, data_root=documents.data_root, allow_code=allow_code)
        loaded = kept.ready(limit=limit, chat_template=chat_template)
        template = template_of(lm, documents) if chat_template else contextlib.nullcontext()
        with kept.dataset_cache(), sandboxed_templates(), compiled_templates(), template:
            results = run_lm_eval(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=1000,  # only metrics without a closed form draw; the means of our suites have one
                apply_chat_template=chat_template,
                confirm_run_unsafe_code=allow_code,
                fewshot_as_multiturn=True,  # the default of lm-eval's entry point; acts with a chat template only
            )
        kept.prompts = None if chat_template else (limit,)
    assert results is not None, "one process evaluates: rank 0"
    scores, samples = results["results"][column.task], results["samples"]
    metric, filter_name = column.metric.split(",")
    stderr = scores.get(f"{metric}_stderr,{filter_name}")
    scored = tuple(
        DocumentScore(sample["doc_hash"], float(sample[metric]))
        for name in sorted(samples)
        for sample in samples[name]
        if sample["filter"] == filter_name
    )
    values = {key: float(scores[key]) for key in (column.metric, *column.also)}
    of_documents = {f"{metric} of document {n}": float(one.score or 0.0) for n, one in enumerate(scored)}
    refuse_non_finite(samples, values | of_documents)
    filtered = {name: [one for one in of_task if one["filter"] == filter_name] for name, of_task in samples.items()}
    if folder is not None:
        write_samples(filtered, folder)
    counts = [results["n-samples"][name] for name in samples]
    return Scores(
        value=values[column.metric],
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        also={key: values[key] for key in column.also},
        scored=scored,
        shots=next(iter(loaded["tasks"].values())).config.num_fewshot,
        num_docs=sum(count["effective"] for count in counts),
        num_total=sum(count["original"] for count in counts),
        task_hash=task_hash(samples),
        health=health_of(samples, loaded["tasks"], column, endings),
        answers=tuple(answers_of(filtered, scored, metric)),
    )


def _result(
    tokenizer: PreTrainedTokenizerBase, column: Column, documents: Documents, scores: Scores, computed: Computed
) -> ColumnResult:
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
        health=scores.health,
        answers=scores.answers,
        alone=computed.alone,
        template=template_use(tokenizer, documents),
        think_end_token=documents.think_end_token,
        unfinished=computed.unfinished,
    )


def check_column(column: Column, *, data_root: Path | None, allow_code: bool = False) -> None:
    """Build the tasks of a column, and keep them: so that missing data is reported before hours of training, not after.

    Raises:
        UserError: as ``load_tasks``.
    """
    with quiet("lm_eval"):
        _kept(column, data_root=data_root, allow_code=allow_code)


def check_code(column: Column) -> None:
    """Refuse a column whose task runs code, without loading it.

    Raises:
        UserError: it does, or there is no such task.
    """
    with quiet("lm_eval"):
        find_task(column, allow_code=False)


@dataclass(eq=False)
class _Kept:
    """The loaded tasks of a column, for all models that this process evaluates on it.

    Attributes:
        tasks: what ``load_tasks`` gave.
        folder: the cache of ``datasets`` for local files, which tasks go on to use; None where they are the hub's.
        prompts: the limit that the tasks' prompts were built for, in a tuple; None if they must be built.
    """

    tasks: Any
    folder: str | None
    prompts: tuple[int | None] | None = None

    def dataset_cache(self) -> contextlib.AbstractContextManager[None]:
        """A cache of its own for local files; the hub's are cached by revision, where they always are."""
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


def _kept(column: Column, *, data_root: Path | None, allow_code: bool) -> _Kept:
    """The column's tasks, loaded once in a process for each state of the files; raises as ``load_tasks``."""
    key = column, allow_code, _state(column, data_root)
    if key not in _KEPT:
        local = data_root is not None or bool(_own_files(column, data_root).data)
        cache = TemporaryFolder("datasets") if local else None
        new = _Kept(None, None if cache is None else str(cache.path))
        if cache is not None:
            weakref.finalize(new, cache.remove)  # at the end of the process at last
        try:
            with new.dataset_cache():
                new.tasks = load_tasks(column, data_root=data_root, allow_code=allow_code)
        except BaseException:
            if cache is not None:
                cache.remove()
            raise
        while len(_KEPT) >= MAX_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = new
    return _KEPT[key]


def _state(column: Column, data_root: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of each file that a column reads from a mirror, or that the user's own task reads."""
    own = _own_files(column, data_root).state
    if data_root is None:
        return own
    folders = [data_root.resolve() / name for name in column.datasets or datasets_of(column)]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return (*own, *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


def _own_files(column: Column, data_root: Path | None) -> TaskFiles:
    return task_files(column, base=Path.cwd() if data_root is None else data_root, mirrored=data_root is not None)
