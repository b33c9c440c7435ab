"""Parse YAML by the core schema of YAML 1.2 into mappings with line numbers; duplicate keys are refused."""

import math
import re
from typing import Any

import yaml

from ctpd.core.errors import UserError, shortened

MOST_NODES = 100_000  # scalars, lists and mappings of a file, with what its aliases stand for


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2: `5e-7` is a number, `no` a string, `010` ten; duplicate keys are refused."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (declared like this in the library)
    yaml_constructors = {  # noqa: RUF012 (the same); a recipe has no field of the types left out
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag not in {f"tag:yaml.org,2002:{name}" for name in ("binary", "timestamp", "omap", "pairs", "set")}
    }


# fmt: off
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
# fmt: on


class Located(dict[str, Any]):
    """A mapping with the line number of each key."""

    lines: dict[str, int]


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> Located:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "`!!map` before what is no mapping", node.start_mark)
    own_nodes = {id(key_node) for key_node, _ in node.value}
    loader.flatten_mapping(node)  # keys merged by `<<` come first; the mapping's own keys override them
    result, own = Located(), set()
    result.lines = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is not a scalar", key_node.start_mark)
        key = _without_surrogates(key_node)  # the source text, so that keys such as `2026` or `true` stay strings
        line = key_node.start_mark.line + 1
        if key in own:
            raise UserError(
                f"the key '{key}' is given twice, on lines {result.lines[key]} and {line}",
                where=f"{key_node.start_mark.name}, line {line}",
                fix="Remove one of the two",
            )
        if id(key_node) in own_nodes:
            own.add(key)
        result[key] = loader.construct_object(value_node, deep=True)
        result.lines[key] = line
    return result


def _without_surrogates(node: yaml.ScalarNode) -> str:
    """The text of a scalar; half of a surrogate pair, which is no text, is refused."""
    text: str = node.value
    if found := [character for character in text if 0xD800 <= ord(character) < 0xE000]:
        problem = f"a text holds half of a surrogate pair, U+{ord(found[0]):04X}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return text


def _construct_text(_: _StrictLoader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "`!!str` before what is no text", node.start_mark)
    return _without_surrogates(node)


def _construct_sequence(loader: _StrictLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    """Parse an integer: decimal even with leading zeros; `0o` is octal, `0x` hexadecimal."""
    text = node.value
    try:
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError as error:  # `!!int x`, or more digits than Python converts
        raise yaml.constructor.ConstructorError(None, None, f"not an integer: {error}", node.start_mark) from error
    if not -(2**63) <= value < 2**63:
        problem = f"the number {shortened(text)} is too large"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


def _construct_float(loader: _StrictLoader, node: yaml.ScalarNode) -> float:
    """Parse a number; `1e999` is refused, `.inf` is infinity."""
    try:
        value = float(loader.construct_yaml_float(node))
    except ValueError as error:  # `!!float x`
        raise yaml.constructor.ConstructorError(None, None, "not a number", node.start_mark) from error
    if math.isinf(value) and "inf" not in node.value.lower():
        problem = f"the number {shortened(node.value)} is too large"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


def _check_size(root: yaml.Node | None, *, source: str) -> None:
    """Refuse more than ``MOST_NODES`` nodes, counted with what aliases stand for, and aliases inside themselves.

    Raises:
        UserError: the file is one of these.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise UserError("an alias is inside what it stands for", where=f"{source}, line {_line(node)}")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
            open_nodes.discard(id(node))
        if sizes[id(node)] > MOST_NODES:
            raise UserError(
                f"the file holds more than {MOST_NODES:,} values, counted with what its aliases (`*name`) stand for",
                where=f"{source}, line {_line(node)}",
                fix="Check that it is the file you mean; use fewer aliases",
            )
        return sizes[id(node)]

    if root is not None:
        size(root)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:seq", _construct_sequence)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, *, source: str) -> Located:
    """Parse one YAML mapping; ``source`` names the file in errors.

    Raises:
        UserError: the text is not valid YAML, is not a mapping, repeats a key, is nested too deeply, holds a value that a
            recipe has no use for (dates, binary data, numbers that are too large), or expands to too many values.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = source
        root = loader.get_single_node()
        _check_size(root, source=source)
        data = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise UserError(f"not valid YAML ({error.problem})", where=where, fix="Correct the syntax") from error
    except RecursionError as error:
        raise UserError("the values are nested too deeply", where=source, fix="Correct the file") from error
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # the library's, of odd tags
        raise UserError(
            f"not valid YAML ({type(error).__name__}: {error})", where=source, fix="Correct the syntax"
        ) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"not valid YAML ({error})", where=source, fix="Correct the syntax") from error
    if not isinstance(data, Located):
        raise UserError("the file is not a mapping", where=source, fix="Start it with `key: value` lines")
    return data
