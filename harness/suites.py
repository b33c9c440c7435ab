"""Suites: which lm-eval tasks make the columns of a table, with which shots and metric (docs/method.md#suites)."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from pydantic import AfterValidator

from ctpd.core.config import Config, Positive, Text, nearest, parse_yaml, validate
from ctpd.core.errors import UserError, shortened
from ctpd.core.names import unfit_name
from ctpd.core.userfiles import CONFIGURATION_BYTES, exists, read_text, regular_file

SUITES = Path(__file__).parent / "suites"


def _names_a_filter(key: str) -> str:
    if key.count(",") != 1:
        raise UserError(
            f"the metric '{key}' names no filter",
            fix="Write it as lm-eval does, `metric,filter`, for example `acc,none`",
        )
    return key


def _is_a_form(pattern: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what Python may read otherwise one day
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise UserError(
            f"the form is no regular expression: {error}", fix="Write one of Python's, for example `\\d+`"
        ) from error
    return pattern


Metric = Annotated[str, AfterValidator(_names_a_filter)]


Form = Annotated[Text, AfterValidator(_is_a_form)]


class Column(Config):
    """One column of a table: an lm-eval task and the metric that is reported for it."""

    name: Text
    """The column's heading."""
    task: Text
    """Name of the task or group."""
    metric: Metric
    """Key in lm-eval's results, `metric,filter`; a fraction between 0 and 1, higher is better."""
    version: Positive
    """The version of the task's definition that the suite was written for; any other is refused."""
    shots: Annotated[int, Ge(0)] | None = None
    """Few-shot examples; left out, the task's own number."""
    also: tuple[Metric, ...] = ()
    """Further keys that are recorded beside `metric`."""
    folder: Text | None = None
    """Where the definition is, when that is neither this project's `harness/tasks` nor the folder of lm-eval's packaged tasks that has the task's name: a folder beside the suite's file, or one of lm-eval's."""
    datasets: tuple[Text, ...] = ()
    """The data sets that the task reads, by their names on the hub; their files in a mirror are part of a result's identity. Without them the whole mirror is."""
    form: Form | None = None
    """The expected form of a generated answer: a regular expression of Python's over the whole text, without the white space around it. Left out, an answer has it if the filter of `metric` finds something in it."""


class Suite(Config):
    """Columns in the order in which tables show them; their unweighted mean is the Average."""

    name: Text
    """The suite's name."""
    columns: tuple[Column, ...]
    """At least one."""


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name_or_path: str | Path) -> Suite:
    """Read a suite: the name of a shipped one, or the path of a YAML file.

    Raises:
        UserError: no such suite, an unknown or missing key, a wrong type, two columns of one name, or no column.
    """
    path = _find(name_or_path)
    data = parse_yaml(read_text(path, most_bytes=CONFIGURATION_BYTES), source=str(path))
    suite = validate(Suite, data, source=str(path))
    _check_names(suite, source=str(path))
    _check(suite.columns, source=str(path))
    columns = [column.model_copy(update={"folder": _locate(column.folder, beside=path)}) for column in suite.columns]
    return suite.model_copy(update={"columns": tuple(columns)})


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        fix = "Give the path of a YAML file with `name` and `columns`"
        if not exists(path):
            raise UserError(f"there is no suite file '{path}'", fix=fix)
        return regular_file(path, what="suite file", fix=fix)
    shipped = SUITES / f"{name_or_path}.yaml"
    if path.name == str(name_or_path) and exists(shipped):
        return shipped
    names = suite_names()
    raise UserError(
        f"there is no suite '{name_or_path}'.{nearest(str(name_or_path), names)}",
        fix=f"Use a shipped one ({', '.join(names)}) or the path of a YAML file",
    )


def _locate(folder: str | None, *, beside: Path) -> str | None:
    """The absolute path of a folder beside the suite's file; any other name unchanged."""
    if folder is not None and exists(beside.parent / folder) and (beside.parent / folder).is_dir():
        return str((beside.parent / folder).resolve())
    return folder


def _check_names(suite: Suite, *, source: str) -> None:
    """Refuse names that cannot be shown in a table, or be part of a file's name."""
    names = {"name": suite.name}
    for number, column in enumerate(suite.columns):
        names |= {f"columns[{number}].{key}": getattr(column, key) for key in ("name", "task", "metric")}
    for key, name in names.items():
        if problem := unfit_name(name):
            what = f"the name in '{key}' {problem}: {shortened(ascii(name), most=40)}"
            raise UserError(what, where=source, fix="Give it another name")


def _check(columns: Sequence[Column], *, source: str) -> None:
    if not columns:
        raise UserError("the suite has no columns", where=source, fix="List at least one under `columns:`")
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1 or name == "Average":
            raise UserError(
                f"the column name '{name}' is taken", where=source, fix="Give each column a name of its own"
            )
