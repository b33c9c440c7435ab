"""Strict configuration: YAML with line numbers into frozen dataclasses, and one canonical form for hashing.

Refuse, never repair: unknown and duplicate keys, wrong types and missing fields are errors that name file, line and key.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict

from ctpd.core.errors import UserError

T = TypeVar("T")


class Config(BaseModel):
    """Base of all configuration: strict (no conversion but int to float), frozen, unknown fields refused, no NaN."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def of(cls, other: "Config") -> Self:
        """The fields of this class out of a configuration that has them all."""
        return cls.model_validate({name: getattr(other, name) for name in cls.model_fields})


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the option closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader by YAML 1.2's core rules: `5e-7` is a number, `no` is a string; duplicate keys are refused."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (declared so by the library)


def _add_resolvers() -> None:
    import re

    rules = [
        ("tag:yaml.org,2002:null", r"^(?:~|null|)$", ["~", "n", ""]),
        ("tag:yaml.org,2002:bool", r"^(?:true|false)$", ["t", "f"]),
        ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
        ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
         list("-+.0123456789")),
        ("tag:yaml.org,2002:merge", r"^(?:<<)$", ["<"]),
    ]  # fmt: skip
    for tag, pattern, first in rules:
        _StrictLoader.add_implicit_resolver(tag, re.compile(pattern), first)


_add_resolvers()


class Located(dict[str, Any]):
    """A mapping that remembers the line on which it, and each of its keys, stands."""

    lines: dict[str, int]


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> Located:
    loader.flatten_mapping(node)
    result = Located()
    result.lines = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        line = key_node.start_mark.line + 1
        if key in result:
            raise UserError(
                f"the key '{key}' stands twice, on lines {result.lines[key]} and {line}",
                where=f"{key_node.start_mark.name}, line {line}",
                fix="Remove one of the two",
            )
        result[key] = loader.construct_object(value_node, deep=True)
        result.lines[key] = line
    return result


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str, *, source: str) -> Located:
    """Parse one YAML mapping; ``source`` names the file in errors.

    Raises:
        UserError: the text is no YAML, no mapping, or repeats a key.
    """
    loader = _StrictLoader(text)
    loader.name = source
    try:
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise UserError(f"not valid YAML ({error.problem})", where=where, fix="Correct the syntax") from error
    finally:
        loader.dispose()
    if not isinstance(data, Located):
        raise UserError("the file holds no mapping", where=source, fix="Start it with `key: value` lines")
    return data


def build(cls: type[T], data: Mapping[str, Any], *, source: str, path: str = "") -> T:
    """Build the frozen dataclass ``cls`` from parsed YAML, recursively and strictly.

    Args:
        cls: a dataclass whose annotations are scalars, ``X | None``, ``Literal``, tuples, mappings and dataclasses.
        data: the mapping; a ``Located`` one gives errors their line.
        source: the file, for errors.
        path: the key path of ``data`` inside the file, for errors.

    Raises:
        UserError: unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(
                f"unknown key '{_join(path, key)}'.{nearest(key, fields)}",
                where=_where(source, data, key),
                fix=f"Keys here are: {', '.join(fields)}",
            )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(
                hints[name], data[name], source=source, path=_join(path, name), where=_where(source, data, name)
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(
                f"the key '{_join(path, name)}' is missing", where=_where(source, data, None), fix=f"Add `{name}: ...`"
            )
    return cls(**values)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _where(source: str, data: Mapping[str, Any], key: str | None) -> str:
    lines = data.lines if isinstance(data, Located) else {}
    line = lines.get(key) if key is not None else min(lines.values(), default=None)
    return f"{source}, line {line}" if line is not None else source


def _value(hint: Any, value: Any, *, source: str, path: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _union(args, value, source=source, path=path, where=where)
    if hint is Any:
        return _plain(value)
    if origin is typing.Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(
            f"'{path}' is {value!r}.{nearest(str(value), map(str, args))}",
            where=where,
            fix=f"Use one of: {_list(args)}",
        )
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "a mapping", value, where)
        return build(hint, value, source=source, path=path)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong_type(path, "a list", value, where)
        return tuple(
            _value(args[0], item, source=source, path=f"{path}[{i}]", where=where) for i, item in enumerate(value)
        )
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "a mapping", value, where)
        return {
            key: _value(args[1], item, source=source, path=_join(path, key), where=_where(source, value, key))
            for key, item in value.items()
        }
    return _scalar(hint, value, path=path, where=where)


def _union(options: tuple[Any, ...], value: Any, *, source: str, path: str, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    real = [option for option in options if option is not type(None)]
    if isinstance(value, Mapping):
        nested = [
            option for option in real if dataclasses.is_dataclass(option) or typing.get_origin(option) is not None
        ]
        real = nested or real
    else:
        real = [option for option in real if not dataclasses.is_dataclass(option)] or real
    if len(real) == 1:
        return _value(real[0], value, source=source, path=path, where=where)
    for option in real:
        try:
            return _value(option, value, source=source, path=path, where=where)
        except UserError:
            continue
    raise _wrong_type(path, " or ".join(_name(option) for option in real), value, where)


def _scalar(hint: Any, value: Any, *, path: str, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    raise _wrong_type(path, _name(hint), value, where)


def _wrong_type(path: str, expected: str, value: Any, where: str) -> UserError:
    shown = "a mapping" if isinstance(value, Mapping) else "nothing" if value is None else repr(value)
    return UserError(f"'{path}' must be {expected}, and is {shown}", where=where, fix=f"Write {expected} there")


def _name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if typing.get_origin(hint) is typing.Literal:
        return _list(typing.get_args(hint))
    return names.get(hint, "a mapping" if dataclasses.is_dataclass(hint) else str(hint))


def _list(options: Iterable[Any]) -> str:
    return ", ".join(f"`{option}`" for option in options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def to_plain(value: Any) -> Any:
    """Turn dataclasses, mappings and sequences into JSON's own types.

    Raises:
        TypeError: a value has no canonical JSON form (so it can be no part of an identity).
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


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no white space, no NaN."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
