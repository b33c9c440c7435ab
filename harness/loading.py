"""Building the lm-eval tasks of a column: official definitions untouched, but for the shots that a suite asks for.

Data comes from the hub, or offline from ``data_root``, a folder that mirrors it (``<org>/<name>/``): ``datasets`` prefers
a folder of that relative name, so tasks are built with ``data_root`` as the working directory.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from ctpd.core.config import nearest
from ctpd.core.errors import UserError
from harness.isolation import sandboxed_templates
from harness.suites import Column
from harness.task_code import refuse_code

OUR_TASKS = Path(__file__).parent / "tasks"
PACKAGED_TASKS = Path(lm_eval.tasks.__file__).parent

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's defaults; the last one picks the few-shot examples, so another one gives other prompts."""


def load_tasks(column: Column, *, data_root: Path | None, allow_code: bool = False) -> Any:
    """Build the tasks of a column with its shots: lm-eval's ``TaskDict`` of tasks and groups.

    Args:
        column: the column.
        data_root: a mirror of the hub; None takes the hub itself.
        allow_code: whether the task may run code of its own, or code that a model generates.

    Raises:
        UserError: unknown task, one that runs code, other version than the suite's, shots or metric that the task lacks,
            missing data.
    """
    manager, file = find_task(column, allow_code=allow_code)
    where = f"column '{column.name}'"
    datasets = sorted(_datasets(column.task, manager.task_index))
    ours = file.is_relative_to(OUR_TASKS)
    if data_root is not None:
        for name in datasets:
            if "/" in name and not (data_root / name).is_dir():
                raise _missing_data(name, f"{data_root / name} does not exist", where, data_root, ours=ours)
    try:
        with contextlib.chdir(data_root) if data_root is not None else contextlib.nullcontext(), sandboxed_templates():
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


def find_task(column: Column, *, allow_code: bool) -> tuple[TaskManager, Path]:
    """Find the definition of a column's task, and load nothing: lm-eval's manager and the file.

    Raises:
        UserError: unknown task, or one that runs code.
    """
    manager, folders = _task_manager(column)
    entry = manager.task_index.get(column.task)
    if entry is None or entry.yaml_path is None:  # a tag has no file, and no score of its own
        raise UserError(
            f"lm-eval has no task or group '{column.task}' in {' or '.join(map(str, folders))}."
            + nearest(column.task, [*manager.all_subtasks, *manager.all_groups]),
            where=f"column '{column.name}'",
            fix="Correct `task`, or name the folder that defines it as `folder`",
        )
    if allow_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # a metric that runs generated code asks for it
    else:
        refuse_code(column, manager.task_index, trusted=(OUR_TASKS, PACKAGED_TASKS))
    return manager, entry.yaml_path


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
        raise UserError(
            f"the task '{task.task_name}' takes no shots, and the suite asks for {shots}",
            where=where,
            fix="Write `shots: 0` or `shots: null`",
        )
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _check_metrics(task: Task, column: Column, *, where: str) -> None:
    """Refuse now, not after the evaluation, a metric that the task does not report or that falls as models improve."""
    filters = [one["name"] for one in task.config.filter_list or [{"name": "none"}]]
    keys = [f"{metric},{name}" for metric in task.aggregation() for name in filters]
    for key in (column.metric, *column.also):
        if key not in keys:
            raise UserError(
                f"the task '{task.task_name}' has no metric '{key}'.{nearest(key, keys)}",
                where=where,
                fix=f"Metrics are: {', '.join(keys)}",
            )
    if not task.higher_is_better().get(column.metric.split(",")[0], True):
        raise UserError(
            f"'{column.metric}' is better when lower, and tables rank higher as better",
            where=where,
            fix="Report another metric",
        )


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
        fix = (
            "Run the recipe that writes this data, for example `ctpd run testbed`, and give its folder, "
            "STORE/world/KEY/hub, as the data root"
        )
    else:
        target = f"{data_root if data_root is not None else 'DATA_ROOT'}/{dataset}"
        fix = (
            f"Fetch it on a machine with a network, `hf download {dataset} --repo-type dataset --local-dir {target}`, "
            "and give DATA_ROOT as the data root"
        )
    return UserError(f"the data set '{dataset}' could not be loaded ({reason})", where=where, fix=fix)
