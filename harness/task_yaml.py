"""The YAML files that define lm-eval tasks, read as data: no function that they name is imported."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml


class Tagged(str):
    """A value with a tag of its own, such as `!function module.name`: its tag and its text."""

    __slots__ = ("tag",)
    tag: str

    def __new__(cls, tag: str, text: str) -> "Tagged":
        """Keep both."""
        value = super().__new__(cls, text)
        value.tag = tag
        return value


class _Loader(yaml.SafeLoader):
    """Reads values with tags as their text."""


def _tagged(loader: _Loader, suffix: str, node: yaml.Node) -> Tagged:
    return Tagged(suffix, str(node.value) if isinstance(node, yaml.ScalarNode) else "")


for _prefix in ("!", "tag:yaml.org,2002:python"):
    _Loader.add_multi_constructor(_prefix, _tagged)


def parse(text: str) -> Any:
    """The contents of a file.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_Loader)  # nosec B506 # a SafeLoader


def included(config: Mapping[str, Any]) -> list[str]:
    """The files that a definition includes; later ones override earlier ones, and the definition all of them."""
    names = config.get("include") or []
    return [names] if isinstance(names, str) else list(names)


def members(config: Mapping[str, Any]) -> Iterator[str]:
    """The tasks and groups of a group, those inside members that are written out included."""
    found = config.get("task")
    for member in found if isinstance(found, list) else []:
        if isinstance(member, Mapping):
            yield from (str(member[key]) for key in ("task", "group") if isinstance(member.get(key), str))
            yield from members(member)
        else:
            yield str(member)


def leaves(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no mapping and no list, with the keys that lead to it, the outermost first."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*keys, str(name)))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, keys)
    else:
        yield keys, value
