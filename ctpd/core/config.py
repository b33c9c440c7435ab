"""Strict configuration: parsed YAML into frozen pydantic models.

Nothing is repaired: unknown and duplicate keys, wrong types, values out of range and missing fields are errors that name
file, line and key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError

from ctpd.core.errors import nearest as nearest
from ctpd.core.located import Located as Located
from ctpd.core.located import parse_yaml as parse_yaml
from ctpd.core.refusals import first_problem, refusal

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Base of all configuration: strict (no conversion but int to float), frozen, unknown fields refused, no NaN."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def of(cls, other: "Config") -> Self:
        """Copy the fields of this class from another configuration that has all of them."""
        return cls.model_validate({name: getattr(other, name) for name in cls.model_fields})


@dataclasses.dataclass(frozen=True)
class Tunable:
    """Marks a parameter that `tune` varies, with the values that it tries: `Annotated[Share, Tunable((0.1, 0.5, 0.9))]`.

    A recipe may give other values. The mark is no part of the type: it moves no key and is no range.

    Attributes:
        values: in ascending order.
    """

    values: tuple[float, ...]


# Ranges of values: errors and the JSON Schema of a recipe show them.
PositiveInt = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # the range that numpy and torch both accept
Text = Annotated[str, MinLen(1)]
Number = int | float


def validate(cls: type[C], data: Mapping[str, Any], *, source: str, path: str = "") -> C:
    """Make a configuration of parsed YAML, strictly.

    Args:
        cls: a ``Config``.
        data: the mapping; errors name the line if it is a ``Located`` one.
        source: the file, for errors.
        path: the dotted key of ``data`` inside the file, for errors.

    Raises:
        UserError: unknown or missing key, a value of the wrong type or out of its range, or values that contradict each
        other. Only one problem is reported, an unknown key before others.
    """
    try:
        return cls.model_validate(_plain(data))
    except ValidationError as error:
        raise refusal(first_problem(error, cls, data), data, source=source, path=path) from error


def _plain(value: Any) -> Any:
    """Convert mappings to plain dicts and sequences to tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def to_plain(value: Any) -> Any:
    """Turn configurations, dataclasses, mappings and sequences into JSON's own types.

    Raises:
        TypeError: a value has no canonical JSON form, and so cannot be part of an identity.
    """
    if isinstance(value, BaseModel):
        return {name: to_plain(getattr(value, name)) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")
