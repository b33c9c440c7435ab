"""Convert pydantic's validation errors to a `UserError` with file, line, dotted key, expected type and nearest name."""

import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ctpd.core.errors import UserError, nearest, shortened
from ctpd.core.located import Located

Keys = tuple[str | int, ...]


class _Kind(NamedTuple):
    """One alternative of a declared type: the type without its annotations, and its bounds."""

    type: Any
    bounds: tuple[Any, ...] = ()

    @property
    def is_model(self) -> bool:
        return isinstance(self.type, type) and issubclass(self.type, BaseModel)

    @property
    def shape(self) -> str:
        """The form in YAML: a mapping, a list or a single value."""
        origin = typing.get_origin(self.type)
        if self.is_model or origin in (dict, Mapping):
            return "mapping"
        return "list" if origin is tuple else "scalar"

    def inside(self, key: str | int) -> "list[_Kind]":
        """What is declared for the value under a key."""
        if self.is_model:
            field = self.type.model_fields.get(key)
            return [] if field is None else _kinds(field.annotation, *field.metadata)
        arguments = typing.get_args(self.type)
        return _kinds(arguments[-1] if self.shape == "mapping" else arguments[0]) if arguments else []


class Problem(NamedTuple):
    """One error of pydantic: the keys that lead to it, what is declared there, the value found.

    ``error`` is None where no alternative of a union fits the value.
    """

    keys: Keys
    kinds: list[_Kind]
    value: Any
    error: ErrorDetails | None


def first_problem(error: ValidationError, declared: Any, value: Any) -> Problem:
    """Choose the problem to report: an unknown key if there is one, since it may be a misspelt missing one; else the first."""
    return _first(error, _kinds(declared), value, ())


def _first(error: ValidationError, kinds: list[_Kind], value: Any, keys: Keys) -> Problem:
    details = error.errors(include_url=False)
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    for number, key in enumerate(first["loc"], start=1):
        if len(kinds) != 1:
            return _in_union(kinds, value, keys)
        if first["type"] in ("extra_forbidden", "missing") and number == len(first["loc"]):
            return Problem((*keys, key), kinds, value, first)
        keys, kinds, value = (*keys, key), kinds[0].inside(key), value[key] if _has(value, key) else None
    return Problem(keys, kinds, value, first)


def _in_union(kinds: list[_Kind], value: Any, keys: Keys) -> Problem:
    """The problem in the alternative of a union that has the value's shape; pydantic reports errors of all alternatives."""
    shape = "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, tuple) else "scalar"
    fitting = [kind for kind in kinds if kind.shape == shape]
    if len(fitting) == 1:
        kind = fitting[0]
        config = None if kind.is_model else ConfigDict(strict=True, allow_inf_nan=False)
        hint: Any = Annotated[(kind.type, *kind.bounds)] if kind.bounds else kind.type
        try:
            TypeAdapter(hint, config=config).validate_python(value)
        except ValidationError as error:
            found = _first(error, [kind], value, keys)
            if found.keys != keys or (found.error is not None and found.error["type"] == "value_error"):
                return found
    return Problem(keys, kinds, value, None)


def refusal(problem: Problem, data: Mapping[str, Any], *, source: str, path: str) -> UserError:
    """The error to raise; ``data`` is the whole mapping, ``path`` its dotted key in the file ``source``."""
    keys, kinds, value, error = problem
    key, where = _dotted(path, keys), position(source, data, keys)
    kind = error["type"] if error is not None else ""
    if kind == "extra_forbidden":
        fields = kinds[0].type.model_fields
        fix = f"Keys here are: {', '.join(fields)}" if fields else None
        return UserError(f"unknown key '{key}'.{nearest(str(keys[-1]), fields)}", where=where, fix=fix)
    if kind == "missing":
        return UserError(f"the key '{key}' is missing", where=where, fix=f"Add `{keys[-1]}: ...`")
    if kind == "value_error":
        assert error is not None
        said = error["ctx"]["error"]
        what, fix = (said.what, said.fix) if isinstance(said, UserError) else (str(said), None)
        return UserError(f"'{key}': {what}" if key else what, where=where, fix=fix)
    names = [str(name) for each in kinds if _is_literal(each) for name in typing.get_args(each.type)]
    if names and isinstance(value, str):
        others = [_described(each) for each in kinds if not _is_literal(each)]
        fix = f"Use one of: {', '.join([*(f'`{name}`' for name in names), *others])}"
        return UserError(f"'{key}' is {shortened(repr(value))}.{nearest(value, names)}", where=where, fix=fix)
    numbers = [each for each in kinds if each.type in (int, float)]
    named = [each for each in kinds if len(numbers) < 2 or each.type is not int]  # float covers int
    expected = " or ".join(_described(each) for each in named) or "a value"
    return UserError(f"'{key}' must be {expected}, and is {_shown(value)}", where=where)


def _kinds(declared: Any, *bounds: Any) -> list[_Kind]:
    """The alternatives of a declared type, None left out."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        return _kinds(arguments[0], *bounds, *arguments[1:])
    if origin in (types.UnionType, typing.Union):
        return [kind for option in arguments if option is not type(None) for kind in _kinds(option, *bounds)]
    return [_Kind(declared, bounds)]


def _is_literal(kind: _Kind) -> bool:
    return typing.get_origin(kind.type) is typing.Literal


def _described(kind: _Kind) -> str:
    """A type and its range in plain words: `a whole number of at least 1`, `a number above 0`."""
    if _is_literal(kind):
        return "one of " + ", ".join(f"`{name}`" for name in typing.get_args(kind.type))
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    noun = names.get(kind.type) or {"list": "a list", "mapping": "a mapping", "scalar": "a value"}[kind.shape]
    if any(isinstance(bound, MinLen) for bound in kind.bounds):
        return f"{noun} that is not empty"
    by_type = {type(bound): bound for bound in kind.bounds}
    if Ge in by_type and Le in by_type:
        return f"{noun} from {by_type[Ge].ge} to {by_type[Le].le}"
    words = {Ge: ("of at least", "ge"), Gt: ("above", "gt"), Le: ("of at most", "le"), Lt: ("below", "lt")}
    limits = [f"{word} {getattr(by_type[bound], name)}" for bound, (word, name) in words.items() if bound in by_type]
    return " ".join([noun, " and ".join(limits)]) if limits else noun


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "nothing" if value is None else shortened(repr(list(value) if isinstance(value, tuple) else value))


def _dotted(path: str, keys: Keys) -> str:
    return (path + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)).removeprefix(".")


def position(source: str, data: Any, keys: Keys) -> str:
    """The file, and the line of the innermost key that has one; of a missing key, that of its mapping."""
    line: int | None = None
    if isinstance(data, Located) and not keys:
        line = min(data.lines.values(), default=None)
    for key in keys:
        if isinstance(data, Located):
            line = data.lines.get(str(key), min(data.lines.values(), default=line))
        if not _has(data, key):
            break
        data = data[key]
    return source if line is None else f"{source}, line {line}"


def _has(value: Any, key: str | int) -> bool:
    if isinstance(value, Mapping):
        return key in value
    return isinstance(value, tuple) and isinstance(key, int) and key < len(value)
