"""The command `ctpd help`: what a key of a recipe, of a method's parameters or of a suite means."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from ctpd.cli.main import COMMANDS
from ctpd.cli.options import execution
from ctpd.core.errors import UserError
from ctpd.core.printing import json_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable

    from ctpd.inspection.reference import Reference
    from ctpd.recipe.reference import Key

_MOST = 8  # keys of one meaning that are listed
_LEAST_WIDTH = 40  # columns of the terminal for the meaning of a key


@click.command("help")
@click.argument("key", required=False)
@execution("json")
def explain(key: str | None, *, as_json: bool) -> None:
    """What KEY of a recipe, a method or a suite means: type, range, default. Without KEY, list all.

    KEY is dotted (`shared.train.epochs`), the end of one (`epochs`), or a method with a parameter (`ctpd.mu`).
    """
    from ctpd.inspection.reference import reference
    from ctpd.recipe.reference import find, inside

    known = reference()
    try:
        found = known.all if key is None else find(key, known.all)
    except UserError as error:
        if key in COMMANDS:
            raise UserError(f"'{key}' is a command and no key", fix=f"See `ctpd {key} --help`") from error
        raise
    if as_json:
        click.echo(json_text([_plain(one, inside(one, known.all) if key else ()) for one in found]))
        return
    from ctpd.cli.terminal import rendered

    click.echo(rendered(*(_tree(known) if key is None else _cards(found, known.all))))


def _plain(key: "Key", inner: "Sequence[Key]") -> dict[str, object]:
    plain: dict[str, object] = dataclasses.asdict(key)
    return plain | ({"keys": [dataclasses.asdict(one) for one in inner]} if inner else {})


def _tree(known: "Reference") -> "Iterator[RenderableType]":
    """Every key with its first sentence; a block that comes again is not opened again."""
    from ctpd.cli.terminal import heading, table
    from ctpd.recipe.reference import ENTRY

    parts = (("Recipe", known.recipe), ("Methods and their params", known.methods), ("Suite", known.suite))
    for title, keys in parts:
        rows: list[tuple[str, str]] = []
        opened: dict[str, str] = {}
        closed: list[str] = []
        for one in keys:
            if any(one.key.startswith(f"{block}.") for block in closed):
                continue
            about = one.about.partition(". ")[0].rstrip(".")
            if one.block in opened and one.depth:
                closed.append(one.key)
                about += f" (keys: as `{opened[one.block]}`)"
            elif one.block:
                opened[one.block] = one.key
            within = ENTRY in one.key.split(".")
            rows.append(("  " * (one.depth + 1 - within) + (f"{ENTRY}." if within else "") + one.name, about))
        yield heading(title)
        yield table(["", ""], rows)
        yield ""
    yield "`ctpd help KEY` says type, range and default of one, as in `ctpd help shared.train.epochs` or `ctpd help ctpd.mu`."


def _cards(found: "Sequence[Key]", known: "Sequence[Key]") -> "Iterator[RenderableType]":
    """Each meaning once, under all keys that have it; of a block its keys, too."""
    from rich.text import Text

    from ctpd.cli.terminal import heading, indented, table
    from ctpd.recipe.reference import inside

    cards: dict[tuple[str, ...], list[Key]] = {}
    for one in found:
        cards.setdefault((*one.meaning, one.block or ""), []).append(one)
    for number, card in enumerate(cards.values()):
        one = card[0]
        yield from [""] if number else []
        yield from (heading(same.key) for same in card[:_MOST])
        if len(card) > _MOST:
            yield f"and {len(card) - _MOST} more"
        yield indented(Text(one.about))
        facts = [("type", one.type), ("range", one.range), ("default", one.default)]
        yield indented(table(["", ""], [fact for fact in facts if fact[1]]))
        if inner := inside(one, known):
            yield ""
            yield indented(_keys(inner))


def _keys(keys: "Sequence[Key]") -> "RichTable":
    """The keys of a block; on a terminal too narrow for five columns, their facts lie below their meanings."""
    from rich.text import Text

    from ctpd.cli.terminal import columns, table

    heads = ("key", "type", "range", "default", "meaning")
    rows = [(one.name, one.type, one.range or "-", one.default, one.about) for one in keys]
    widths = [max(map(len, column)) + 2 for column in zip(heads[:-1], *(row[:-1] for row in rows), strict=True)]
    if sum(widths) + _LEAST_WIDTH <= columns():
        return table(heads, rows)
    cells = [
        Text.assemble(
            one.about, "\n", (", ".join(filter(None, (one.type, one.range, f"default: {one.default}"))), "dim")
        )
        for one in keys
    ]
    return table(["key", "meaning"], [(one.name, cell) for one, cell in zip(keys, cells, strict=True)])
