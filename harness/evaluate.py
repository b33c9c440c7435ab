"""Scores of one model on one column of a suite, by lm-eval's Python API. The only importer of lm_eval.

Official task definitions are used untouched. Data comes from the hub, or offline from ``data_root``, a folder that
mirrors it (``<org>/<name>/``): ``datasets`` prefers a folder of that relative name, so tasks are built with
``data_root`` as the working directory (EVALUATION 2.1).

Shape legend: B rows of a batch, T tokens, K kept positions, V vocabulary.
"""

import contextlib
import copy
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from harness.isolation import Progress, fresh_dataset_cache, quiet, seeded, shown
from harness.suites import Column

OUR_TASKS = Path(__file__).parent / "tasks"
PACKAGED_TASKS = Path(lm_eval.tasks.__file__).parent

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's defaults; the last one picks the few-shot examples, so another one gives other prompts."""


def evaluate_column(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    column: Column,
    *,
    data_root: Path | None,
    batch_size: int,
    limit: int | None = None,
    chat_template: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a loaded causal language model on one column; model, tokenizer and global RNGs are left as found.

    Args:
        model: a transformers or PEFT model, evaluated on the device and in the dtype that it has.
        tokenizer: the model's; a copy is used, since lm-eval gives a tokenizer without a pad token one.
        column: what to measure.
        data_root: a mirror of the hub; None takes the hub itself (or the cache of ``datasets``).
        batch_size: rows of one forward pass. Part of the protocol: float noise moves with it.
        limit: the first so many documents of each task; None takes all.
        chat_template: whether prompts are rendered with the tokenizer's chat template.
        progress: called after each answered request.

    Returns:
        The column's part of a record, of JSON types only. Fractions, not percentages. ``documents`` holds
        ``[doc_hash, score]`` in the task's order; ``truncated`` counts requests that did not fit the model's length.

    Raises:
        UserError: unknown task, other version than the suite's, missing data, missing metric or chat template.
    """
    if chat_template and tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template", fix="Evaluate with `chat_template: false`")
    modes = [(module, module.training) for module in model.modules()]
    start = time.perf_counter()
    try:
        report = shown(progress) if progress is not None else None
        with quiet("lm_eval"):
            lm = LastLogitsLM(model, tokenizer, batch_size=batch_size, progress=report)
        result = score(lm, column, data_root=data_root, limit=limit, chat_template=chat_template)
    finally:
        for module, training in modes:
            module.training = training
    return result | {
        "seconds": round(time.perf_counter() - start, 3),
        "backend": "hf",
        "batch_size": batch_size,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "max_length": lm.max_length,
        "truncated": lm.num_truncated,
    }


def score(
    lm: LM, column: Column, *, data_root: Path | None, limit: int | None = None, chat_template: bool = False
) -> dict[str, Any]:
    """Evaluate any lm-eval model on one column; see ``evaluate_column``. Seconds and model are the caller's to add."""
    with seeded(torch.device(lm.device or "cpu"), seeds=SEEDS), quiet("lm_eval"), _dataset_cache(data_root):
        loaded = load_tasks(column, data_root=data_root)
        results = run_lm_eval(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=1000,  # only metrics without a closed form draw; the means of our suites have one
            apply_chat_template=chat_template,
            fewshot_as_multiturn=True,  # the default of lm-eval's entry point; acts with a chat template only
        )
    assert results is not None, "one process evaluates: rank 0"
    scores, samples = results["results"][column.task], results["samples"]
    metric, filter_name = column.metric.split(",")
    stderr = scores.get(f"{metric}_stderr,{filter_name}")
    counts = [results["n-samples"][name] for name in samples]
    return {
        "name": column.name,
        "task": column.task,
        "version": column.version,
        "shots": next(iter(loaded["tasks"].values())).config.num_fewshot,
        "metric": column.metric,
        "value": float(scores[column.metric]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "also": {key: float(scores[key]) for key in column.also},
        "limit": limit,
        "num_docs": sum(count["effective"] for count in counts),
        "num_total": sum(count["original"] for count in counts),
        "task_hash": _task_hash(samples),
        "documents": [
            [sample["doc_hash"], float(sample[metric])]
            for name in sorted(samples)
            for sample in samples[name]
            if sample["filter"] == filter_name
        ],
        "chat_template": chat_template,
        "seeds": dict(SEEDS),
        "lm_eval_version": installed_version("lm_eval"),
    }


def check_column(column: Column, *, data_root: Path | None) -> None:
    """Build the tasks of a column and drop them: what is missing is said before hours of training, not after.

    Raises:
        UserError: as ``load_tasks``.
    """
    with quiet("lm_eval"), _dataset_cache(data_root):
        load_tasks(column, data_root=data_root)


def _dataset_cache(data_root: Path | None) -> contextlib.AbstractContextManager[None]:
    """A cache of its own for a mirror's files; the hub's are cached by revision, where they always are."""
    return contextlib.nullcontext() if data_root is None else fresh_dataset_cache()


def load_tasks(column: Column, *, data_root: Path | None) -> Any:
    """Build the tasks of a column with its shots: lm-eval's ``TaskDict`` of tasks and groups.

    Raises:
        UserError: unknown task, other version than the suite's, shots or metric that the task lacks, missing data.
    """
    if column.folder is None:
        folders = [folder for folder in (PACKAGED_TASKS / column.task, OUR_TASKS) if folder.is_dir()]
    else:
        folders = [PACKAGED_TASKS / column.folder]  # an absolute folder stays what it is
    manager = TaskManager(include_defaults=False, include_path=folders)
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


class LastLogitsLM(HFLM):
    """lm-eval's model for transformers, that computes logits only where continuations are, and reports progress.

    Memory falls from batch x prompt x vocabulary to batch x answer x vocabulary, the scores stay (EVALUATION 3).
    DEVIATION from lm-eval's default: log-softmax in float32 for half-precision models too; sums of bfloat16
    log-probabilities are so coarse that choices tie.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, progress: Progress | None
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
        self.num_truncated = 0
        self._progress = progress
        self._longest_continuation = 0
        self._keeps_last_logits = self._probe()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._report(len(requests))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._report(len(requests))
        for context, options in (request.args for request in requests):
            room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
            if room <= 0:
                raise UserError(
                    f"the model's length of {self.max_length} tokens leaves no room for a prompt beside the "
                    f"{self.max_length - room} tokens that the task generates",
                    fix="Evaluate a model with a longer context, or lower `max_gen_toks` in the task's file",
                )
            self.num_truncated += len(self.tok_encode(context)) > room
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self._longest_continuation = max((len(continuation) for _, _, continuation in requests), default=0)
        self.num_truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, K, V] of the last K positions; the caller's slice counts from the end, so it fits any K."""
        if not self._keeps_last_logits:
            return super()._model_call(inps, attn_mask, labels)
        # lm-eval pads on the right with token 0 and tells nobody the lengths. Trailing zeros are at least the padding.
        padding = int((inps.flip(1) != 0).int().cumsum(1).eq(0).sum(1).max())
        kept = min(inps.shape[1], padding + self._longest_continuation)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=kept).logits

    def _probe(self) -> bool:
        """Whether the model takes ``logits_to_keep`` and means by it what we do."""
        ids = torch.full((1, 3), self.prefix_token_id, device=self.device)
        with torch.no_grad():
            try:
                last = self.model(ids, logits_to_keep=1).logits
            except TypeError:
                return False
            return last.shape[1] == 1 and torch.allclose(last[:, -1], self.model(ids).logits[:, -1], atol=1e-2)

    def _report(self, total: int) -> None:
        if self._progress is not None:
            self._progress(0, total)
            self.set_cache_hook(_ProgressHook(self._progress, total))


class _ProgressHook(CacheHook):
    """lm-eval calls its response cache once per answered request: the one place that tells how far it is."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__(None)
        self._progress, self._done, self._total = progress, 0, total

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._progress(self._done, self._total)
