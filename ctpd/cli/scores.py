"""Scores of evaluations as `ctpd eval` shows them, with the health of the answers; and the columns that are not measured."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from ctpd.cli.launch import HELPER
from ctpd.core.errors import UserError
from ctpd.core.printing import json_text

if TYPE_CHECKING:
    from harness.answers import Unmeasured
    from harness.record import ColumnResult

    Results = Mapping[str, Mapping[str, ColumnResult | Unmeasured]]
    """By the model's title and the column's name."""

NOTHING = "-"


def show_scores(results: "Results", *, as_json: bool) -> None:
    """Print the scores.

    Raises:
        UserError: a column cannot be measured on a model; the scores of the others are printed before.
    """
    if as_json:
        found = {
            title: {name: getattr(one, "value", None) for name, one in columns.items()}
            for title, columns in results.items()
        }
        click.echo(json_text(found))
    else:
        click.echo(_table(results))
    refuse_unmeasured(results)


def refuse_unmeasured(results: "Results") -> None:
    """End a command with an error if a column could not be measured, after all others were.

    Raises:
        UserError: it could not.
    """
    if HELPER in os.environ:  # the command that it helps says so
        return
    from harness.answers import Unmeasured

    lost: dict[Unmeasured, dict[str, dict[str, None]]] = {}
    for title, measured in results.items():
        for name, one in measured.items():
            if isinstance(one, Unmeasured):
                lost.setdefault(one, {}).setdefault(name, {})[title] = None
    if lost:
        parts = []
        for one, columns in lost.items():
            names = [f"{name} on {' and '.join(titles)}" for name, titles in columns.items()]
            parts.append(f"{', and '.join(names)}, since {one.reason}")
        fixes = dict.fromkeys(one.fix for one in lost if one.fix is not None)
        raise UserError(
            f"all columns but these were evaluated: {'; '.join(parts)}",
            fix=". ".join([*fixes, "Or leave the column out of the suite"]),
        )


def _table(results: "Results") -> str:
    from ctpd.cli.terminal import rendered, table
    from harness.health import MEASURES

    every = [one for columns in results.values() for one in columns.values()]
    with_health = any(getattr(one, "health", None) is not None for one in every)
    rows = [
        (title if first else "", name, *_score(result), *(_health(result) if with_health else ()))
        for title, columns in results.items()
        for first, (name, result) in zip([True, *[False] * len(columns)], columns.items(), strict=False)
    ]
    heads = ["model", "column", "score", "standard error", "documents"]
    heads += [one.title.lower() for one in MEASURES] if with_health else []
    return rendered(table(heads, rows, right=tuple(range(2, len(heads)))))


def _score(result: "ColumnResult | Unmeasured") -> tuple[str, str, str]:
    """Score and standard error in percent, and the documents that they come from."""
    from harness.answers import Unmeasured

    if isinstance(result, Unmeasured):
        return "not measured", NOTHING, NOTHING
    error = NOTHING if result.stderr is None else f"{100 * result.stderr:.2f}"
    documents = f"{result.protocol.num_docs:,}"
    if result.limit is not None:
        documents += f" of {result.protocol.num_total:,} (partial)"
    return "not finite" if result.value is None else f"{100 * result.value:.2f}", error, documents


def _health(result: "ColumnResult | Unmeasured") -> list[str]:
    """The measures of health as text, dashes for a column without generated answers."""
    from harness.health import MEASURES, texts

    health = getattr(result, "health", None)
    return texts([health]) if health is not None else [NOTHING] * len(MEASURES)
