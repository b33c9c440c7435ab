"""Suites: which lm-eval tasks make the columns of a table, with which shots and metric (METHOD 7)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ctpd.core.config import build, nearest, parse_yaml
from ctpd.core.errors import UserError

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: an lm-eval task and the metric that is reported for it.

    Attributes:
        name: the column's heading.
        task: name of the task or group.
        metric: key in lm-eval's results, ``metric,filter``; a fraction between 0 and 1, higher is better.
        version: the version of the task's definition that the suite was written for; any other is refused.
        shots: few-shot examples; null takes the task's own number.
        also: further keys that are recorded beside ``metric``.
        folder: where the definition is, when that is neither this project's ``harness/tasks`` nor the folder of
            lm-eval's packaged tasks that has the task's name: a folder beside the suite's file, or one of lm-eval's.
        datasets: the data sets that the task reads, by their names on the hub; their files in a mirror are part of a
            result's identity. Without them the whole mirror is.
    """

    name: str
    task: str
    metric: str
    version: float
    shots: int | None = None
    also: tuple[str, ...] = ()
    folder: str | None = None
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Suite:
    """Columns in the order in which tables show them; their unweighted mean is the Average."""

    name: str
    columns: tuple[Column, ...]


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name_or_path: str | Path) -> Suite:
    """Read a suite: the name of a shipped one, or the path of a YAML file.

    Raises:
        UserError: no such suite, an unknown or missing key, a wrong type, two columns of one name, or no column.
    """
    path = _find(name_or_path)
    suite = build(Suite, parse_yaml(path.read_text(encoding="utf-8"), source=str(path)), source=str(path))
    _check(suite.columns, source=str(path))
    columns = tuple(replace(column, folder=_locate(column.folder, beside=path)) for column in suite.columns)
    return replace(suite, columns=columns)


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise UserError(
            f"there is no suite file '{path}'", fix="Give the path of a YAML file with `name` and `columns`"
        )
    shipped = SUITES / f"{name_or_path}.yaml"
    if path.name == str(name_or_path) and shipped.is_file():
        return shipped
    names = suite_names()
    raise UserError(
        f"there is no suite '{name_or_path}'.{nearest(str(name_or_path), names)}",
        fix=f"Use a shipped one ({', '.join(names)}) or the path of a YAML file",
    )


def _locate(folder: str | None, *, beside: Path) -> str | None:
    """A folder that stands beside the suite's file, as an absolute path; any other name as it is."""
    if folder is not None and (beside.parent / folder).is_dir():
        return str((beside.parent / folder).resolve())
    return folder


def _check(columns: Sequence[Column], *, source: str) -> None:
    if not columns:
        raise UserError("the suite has no columns", where=source, fix="List at least one under `columns:`")
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1 or name == "Average":
            raise UserError(
                f"the column name '{name}' is taken", where=source, fix="Give each column a name of its own"
            )
    for column in columns:
        if column.shots is not None and column.shots < 0:
            raise UserError(f"'{column.name}' has {column.shots} shots", where=source, fix="Use 0 or more, or null")
        for key in (column.metric, *column.also):
            if key.count(",") != 1:
                raise UserError(
                    f"the metric '{key}' of '{column.name}' names no filter",
                    where=source,
                    fix="Write it as lm-eval does, `metric,filter`, for example `acc,none`",
                )
