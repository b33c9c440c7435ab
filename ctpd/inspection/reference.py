"""The reference of every key: recipes, the parameters of methods, suites; and the page made of it, docs/reference.md."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ctpd.recipe.reference import WORDS_OF_DEFAULTS, Key, inside, keys_of, keys_of_methods
from ctpd.recipe.schema import model_schema, schema_file
from harness.suites import Suite

PIPE = "\\|"  # in a cell of a Markdown table
SUITE = "suite"  # the keys of a suite's file are shown below this name

_HEAD = """\
# Reference

Every key of a recipe, of a method's parameters and of a suite. `make schema` writes this page from the types; `ctpd help KEY` prints
the same in a terminal. A dotted key such as `shared.train.epochs` is `epochs` inside `train` inside `shared`; `NAME` stands for a name
that you choose. A key whose default is "left out" may be left out, and says what holds then.
"""


class Reference(NamedTuple):
    """The keys of the three kinds."""

    recipe: list[Key]
    methods: list[Key]
    suite: list[Key]

    @property
    def all(self) -> list[Key]:
        """The keys of all kinds, in this order."""
        return [*self.recipe, *self.methods, *self.suite]


def reference(schema: Mapping[str, Any] | None = None) -> Reference:
    """The reference, without torch: a recipe's and the methods' keys come from the shipped JSON Schema.

    Args:
        schema: of a recipe; None for the shipped one (`ctpd.recipe.schema.schema_file`).
    """
    known = json.loads(schema_file().read_text(encoding="utf-8")) if schema is None else schema
    suite = keys_of(model_schema(Suite), below=SUITE)
    about = "A suite's file: the columns of a table."
    return Reference(keys_of(known), keys_of_methods(known), [Key(SUITE, about, "file", "", "", "Suite"), *suite])


def page(found: Reference) -> str:
    """docs/reference.md: a table for each block, with the keys that have the same block in the heading."""
    top = [one for one in found.recipe if one.depth == 0]
    parts = [_HEAD, "## Recipe", _table(top), *_blocks(found.recipe)]
    parts += [
        "## Parameters of methods",
        "A run's `params`; numbers may stand in `tuned` instead.",
        *_methods(found.methods),
    ]
    parts += ["## Suite", _table(inside(found.suite[0], found.suite)), *_blocks(found.suite[1:])]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _blocks(keys: Sequence[Key]) -> list[str]:
    parts = []
    for block in dict.fromkeys(one.block for one in keys if one.block):
        having = [one for one in keys if one.block == block]
        parts += [f"### {', '.join(f'`{_name(one)}`' for one in having)}", _table(inside(having[0], keys))]
    return parts


def _methods(keys: Sequence[Key]) -> list[str]:
    parts = []
    for method in (one for one in keys if one.depth == 0):
        parts += [f"### `{method.key}`", _table(inside(method, keys))]
    return parts


def _name(key: Key) -> str:
    return key.key.removeprefix(f"{SUITE}.")


def _table(keys: Sequence[Key]) -> str:
    rows = [(f"`{one.name}`", one.type, one.range, _code(one.default), one.about) for one in keys]
    lines = ["| key | type | range | default | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', PIPE) for cell in row)} |" for row in rows)])


def _code(default: str) -> str:
    """A default as code, a word about it as text."""
    return default if default in WORDS_OF_DEFAULTS else f"`{default}`"
