"""Evaluations of a model on the columns of a suite, with a recipe's settings: their stages, and early checks of their tasks."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

from ctpd.core.store import Store
from ctpd.core.temporary import kept_in
from ctpd.core.userfiles import user_path
from ctpd.pipeline.references import Model
from ctpd.pipeline.stages.evaluate import ColumnTask, EvaluateStage, Mirror, Protocol
from ctpd.pipeline.stages.world import WorldStage
from ctpd.recipe import EvaluationSpec
from ctpd.text.templates import fixed_variables
from harness.suites import Column


def check_columns(columns: Sequence[Column], spec: EvaluationSpec, store: Store) -> None:
    """Load the tasks of columns that are to be evaluated, which finds what is wrong with them before anything is run.

    Args:
        columns: of a suite.
        spec: the protocol.
        store: which keeps temporary files.

    Raises:
        UserError: an unknown task, one that runs code, another version than the suite's, missing data.
    """
    is_testbed = spec.data_root == "testbed"
    if is_testbed:  # the recipe itself writes the data; tasks of the user's own may run code
        columns = [column for column in columns if column.folder is not None]
    if not columns:
        return
    from harness.evaluate import check_code, check_column

    root = None if spec.data_root is None else user_path(spec.data_root)
    with kept_in(store.root):
        for column in columns:
            allowed = column.task in spec.allow_code
            if not is_testbed:
                check_column(column, data_root=root, allow_code=allowed)
            elif not allowed:
                check_code(column)


class Prompting(NamedTuple):
    """What belongs to a model in how it is prompted: variables of its chat template, and the text that ends its reasoning."""

    variables: Mapping[str, Any] = {}
    think_end_token: str | None = None


def evaluation_stage(
    model: Model,
    column: Column,
    spec: EvaluationSpec,
    *,
    prompting: Prompting,
    title: str,
    world: WorldStage | None = None,
) -> EvaluateStage:
    """The stage that evaluates one model on one column with a recipe's evaluation settings.

    Args:
        spec: the protocol, with its `precision`.
        prompting: what the model's requests are rendered with.
        title: the model's name in the stage's label.
        world: the testbed whose documents are read; None for the hub, or the mirror that ``spec`` names.
    """
    assert spec.precision is not None
    documents: WorldStage | Mirror | None = world
    if world is None and spec.data_root is not None:
        documents = Mirror.of(spec.data_root, column)
    return EvaluateStage(
        label=f"evaluate: {title} on {column.name}",
        protocol=Protocol(
            limit=spec.limit,
            batch_size=spec.batch_size,
            chat_template=spec.chat_template,
            template_variables=fixed_variables(prompting.variables) if spec.chat_template else None,
            think_end_token=prompting.think_end_token,
            precision=spec.precision,
            backend=spec.backend,
            lm_eval=_lm_eval_version(),
            allow_code=column.task in spec.allow_code,
        ),
        task=ColumnTask.of(column, documents),
        model=model,
        documents=documents,
    )


@cache
def _lm_eval_version() -> str:
    return metadata.version("lm_eval")  # reads the file system on every call
