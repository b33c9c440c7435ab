"""The health of generated answers, from what lm-eval keeps of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctpd.core.errors import UserError
from ctpd.text.limited import LimitReached, interrupted
from harness.answers import Health
from harness.endings import Endings
from harness.health import matches, measure
from harness.suites import Column

Samples = Mapping[str, Sequence[Mapping[str, Any]]]


def health_of(samples: Samples, tasks: Mapping[str, Any], column: Column, endings: Endings | None) -> Health | None:
    """The health of a column's answers; None for a column that generates none.

    Without a form of the suite's, an answer is in form if the filter that the column's metric reads found something in it:
    lm-eval gives a fallback where a regular expression does not match. A filter that takes every text says nothing.

    Args:
        samples: lm-eval's, by task.
        tasks: lm-eval's, by name.
        column: which metric, and perhaps the expected form.
        endings: how the answers ended; None where the backend does not count.

    Raises:
        UserError: the suite's form takes too long on an answer.
    """
    filter_name = column.metric.split(",")[1]
    answers: list[str] = []
    in_form: list[bool] = []
    has_form = True
    for name, of_task in sorted(samples.items()):
        if tasks[name].OUTPUT_TYPE != "generate_until":
            continue
        fallbacks = _fallbacks(tasks[name], filter_name)
        has_form &= column.form is not None or bool(fallbacks)
        for sample in of_task:
            if sample["filter"] == filter_name:
                texts = list(_texts(sample["resps"]))
                answers += texts
                read = not any(one in fallbacks for one in sample["filtered_resps"])
                in_form += [read] * len(texts) if column.form is None else [_has_form(column, one) for one in texts]
    ended = None if endings is None else endings.of(len(answers))
    return measure(answers, ended=ended, in_form=in_form if has_form else None)


def _texts(responses: Any) -> Iterator[str]:
    """The texts in lm-eval's responses, a list for each request."""
    if isinstance(responses, str):
        yield responses
    elif isinstance(responses, list | tuple):
        for part in responses:
            yield from _texts(part)


def _fallbacks(task: Any, filter_name: str) -> list[Any]:
    """What the filter gives where it finds nothing: as it is, and as the only one of several responses."""
    filters = [made() for one in getattr(task, "_filters", ()) if one.name == filter_name for made in one.filters]
    found = [one.fallback for one in filters if getattr(one, "fallback", None) is not None]
    return [form for fallback in found for form in (fallback, [fallback])]


def _has_form(column: Column, text: str) -> bool:
    assert column.form is not None
    try:
        with interrupted():
            return matches(column.form, text)
    except LimitReached as error:
        raise UserError(
            f"the form of the column '{column.name}' {error.what} on an answer",
            fix="Write a regular expression without nested repetitions",
        ) from error
