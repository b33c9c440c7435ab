"""The keys of a file with their meaning, type, range and default, read from the JSON Schema of the file's type."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctpd.core.errors import UserError, nearest

ENTRY = "NAME"  # in a dotted key, the place of a name that the user gives, such as a run's
REQUIRED, LEFT_OUT, EMPTY, OF_EACH = WORDS_OF_DEFAULTS = ("required", "left out", "empty", "that of each key")
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        key: dotted; `NAME` stands for a name that the user gives.
        about: what it says, in one line.
        type: in words.
        range: the values that are accepted, in words; empty where all of the type are.
        default: as YAML, or a word: `required`, `left out`, `empty`; empty for a method and for a suite.
        block: the type of the block of keys that may be given here; None if there is none.
    """

    key: str
    about: str
    type: str
    range: str
    default: str
    block: str | None

    @property
    def name(self) -> str:
        """The key itself, without the blocks that it lies in."""
        return self.key.rpartition(".")[2]

    @property
    def depth(self) -> int:
        """Number of blocks that the key lies in."""
        return self.key.count(".")

    @property
    def meaning(self) -> tuple[str, ...]:
        """What is equal for two keys that say the same in two blocks."""
        return (self.name, self.about, self.type, self.range, self.default)


def keys_of(schema: Mapping[str, Any], *, below: str = "") -> list[Key]:
    """Every key of a file's JSON Schema, each block before its own keys.

    Args:
        schema: of a pydantic model, with its `$defs`.
        below: a dotted key that all keys lie in; empty for none.
    """
    return list(_walk(schema, schema["$defs"], f"{below}." if below else ""))


def keys_of_methods(schema: Mapping[str, Any]) -> list[Key]:
    """Every method and its parameters (`METHOD.PARAMETER`), from the JSON Schema of a recipe."""
    found: list[Key] = []
    for case in schema["$defs"]["RunSpec"]["allOf"]:
        method = case["if"]["properties"]["method"]["const"]
        run = case["then"]["properties"]
        block, params = _block(run["params"], schema["$defs"])
        about = f"Parameters of a run with `method: {method}`, in its `params`; numbers may stand in `tuned` instead."
        found.append(Key(method, about, "block", "", "", block))
        for name in sorted(run["tuned"]["properties"].keys() - params.get("properties", {}).keys()):
            node = run["tuned"]["properties"][name]
            about = f"{node['description']} It stands in `tuned`, or in the `space` of the recipe's `tune`."
            found.append(Key(f"{method}.{name}", about, _type(node), _range(node), REQUIRED, None))
        found += _walk(params, schema["$defs"], f"{method}.")
    return found


def find(query: str, keys: Sequence[Key]) -> list[Key]:
    """The keys that a query means: those that end with it, the shortest first.

    Args:
        query: a dotted key or its end. The user's own names match `NAME`, `columns[0]` is `columns`, and what follows
            `params` or `tuned` is a parameter of some method.
        keys: where to look.

    Raises:
        UserError: no key ends with it; the nearest one is named.
    """
    words = re.sub(r"^runs\.(.*\.)?(params|tuned)\.|\[\d*\]", "", query).split(".")
    exact = [one for one in keys if one.key == ".".join(words)]
    ending = [one for one in keys if _ends_with(one.key.split("."), words)]
    found = exact + sorted((one for one in ending if one not in exact), key=lambda one: one.depth)
    if not found:
        names = [one.key for one in keys]
        names += [] if len(words) > 1 else [one.name for one in keys]
        raise UserError(
            f"there is no key '{query}'.{nearest(query, dict.fromkeys(names))}", fix="List all with `ctpd help`"
        )
    return found


def inside(block: Key, keys: Iterable[Key]) -> list[Key]:
    """The keys of a block, without those of the blocks in it."""
    pattern = re.compile(rf"{re.escape(block.key)}(\.{ENTRY})?\.[^.]+")
    return [one for one in keys if pattern.fullmatch(one.key)]


def _ends_with(parts: Sequence[str], words: Sequence[str]) -> bool:
    end = parts[-len(words) :]
    if len(end) < len(words) or words[-1] != parts[-1]:
        return False
    return all(word == part or part == ENTRY for word, part in zip(words, end, strict=True))


def _walk(block: Mapping[str, Any], defs: Mapping[str, Any], below: str) -> Iterator[Key]:
    for name, node in block.get("properties", {}).items():
        inner, keys = _block(node, defs)
        yield Key(
            key=below + name,
            about=" ".join(node.get("description", "").split()),
            type=_type(node),
            range=_range(node),
            default=_default(name, node, block),
            block=inner,
        )
        if inner is not None:
            yield from _walk(keys, defs, f"{below}{name}.{f'{ENTRY}.' if 'additionalProperties' in node else ''}")


def _block(node: Mapping[str, Any], defs: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The type of the block that may stand here, also as an item of a list or mapping, and its schema."""
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/")
        return name, defs[name]
    inner = [*node.get("anyOf", []), node.get("items"), node.get("additionalProperties")]
    for one in inner:
        if isinstance(one, Mapping) and (found := _block(one, defs))[0] is not None:
            return found
    return None, {}


def _type(node: Mapping[str, Any]) -> str:
    if "$ref" in node:
        return "block"
    if "const" in node or "enum" in node:
        return _or([f"`{value}`" for value in node.get("enum", [node.get("const")])])
    if "anyOf" in node:
        types = list(dict.fromkeys(_type(one) for one in node["anyOf"] if one.get("type") != "null"))
        return _or([one for one in types if one != "integer" or "number" not in types])
    if node.get("type") == "array":
        return f"list of {_type(node['items'])}"
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        return f"mapping: name to {_type(values) if isinstance(values, Mapping) else 'any value'}"
    return _WORDS.get(node.get("type", ""), "any value")


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _range(node: Mapping[str, Any]) -> str:
    inner = [one for one in (node.get("items"), node.get("additionalProperties")) if isinstance(one, Mapping)]
    ranges = [_own_range(node)]
    ranges += [f"each {text}" for one in inner if (text := _range(one))]
    ranges += [_range(one) for one in node.get("anyOf", [])]
    return "; ".join(dict.fromkeys(filter(None, ranges)))


def _own_range(node: Mapping[str, Any]) -> str:
    if "minimum" in node and "maximum" in node:
        parts = [f"{node['minimum']:,} to {node['maximum']:,}"]
    else:
        parts = [" and ".join(f"{word} {node[name]:,}" for name, word in _BOUNDS.items() if name in node)]
    parts += [f"at least {node[name]} {what}" for name, what in _SIZES.items() if name in node]
    parts += ["not empty"] if "minLength" in node and not node.keys() & {"pattern", "enum"} else []
    parts += [f"matches `{node['pattern']}`"] if "pattern" in node else []
    return "; ".join(filter(None, parts))


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
_SIZES = {"minItems": "item", "minProperties": "entry"}


def _default(name: str, node: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    if name in block.get("required", []):
        return REQUIRED
    if "default" not in node:
        return OF_EACH if "$ref" in node else EMPTY
    value = node["default"]
    if value is None:
        return LEFT_OUT
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)
