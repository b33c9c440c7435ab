"""The command group `inspect`: pairs, aligned spans, tokenizers and weights."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctpd.cli.options import Decorator, execution, prepare, refuse
from ctpd.core.printing import json_text

if TYPE_CHECKING:
    from ctpd.core.store import Store

_SHOWN = 3


@click.group()
def inspect() -> None:
    """Show pairs as models read them, aligned spans, tokenizers and weights.

    A TOKENIZER is a folder with a tokenizer.json, such a file, or a hub id, `name@revision` to pin it. The teacher's
    comes first.
    """


_DATA_HELP = "Pairs: a file, a folder or a pattern, as `path` in a recipe; their responses are read."


def _texts(function: Any) -> Any:
    """The options that say which texts to read."""
    options: tuple[Decorator, ...] = (
        click.option("--data", type=click.Path(path_type=Path), help=_DATA_HELP),
        click.option("--text", "texts", multiple=True, help="A text; may be repeated."),
        click.option("--limit", type=click.IntRange(min=1), help="With --data: only so many pairs."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@inspect.command()
@click.argument("teacher")
@click.argument("student")
@_texts
@click.option(
    "--show", type=click.IntRange(min=0), default=_SHOWN, show_default=True, help="Draw the spans of so many texts."
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with the same as one file.")
@execution("offline", "json")
def spans(
    teacher: str,
    student: str,
    *,
    data: Path | None,
    texts: tuple[str, ...],
    limit: int | None,
    show: int,
    html: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Align the tokens of TEACHER and STUDENT on texts: spans in colour, their types, and their fidelity."""
    given = _read(data, texts, limit=limit)
    sides = _tokenizers(teacher, student, offline=offline)
    from ctpd.cli import draw, page
    from ctpd.inspection.tokenizers import compare_tokenizers, drawn_spans

    found = compare_tokenizers(given, teacher=sides[0], student=sides[1])
    drawn = drawn_spans(given, teacher=sides[0], student=sides[1], limit=show)
    if html is not None:
        _write(html, page.spans_page(found, drawn, teacher=teacher, student=student))
    if as_json:
        click.echo(json_text({**found.plain(), "drawn": drawn}))
        return
    for number, text in enumerate(drawn, start=1):
        click.echo(draw.spans(text, title=f"text {number}") + "\n")
    if drawn:
        click.echo(draw.legend() + "\n")
    click.echo(draw.summary(found, teacher=teacher, student=student))
    if html is not None:
        click.echo(f"\nWritten to {html}")


@inspect.command()
@click.argument("teacher")
@click.argument("student")
@_texts
@execution("offline", "json")
def tokenizers(
    teacher: str,
    student: str,
    *,
    data: Path | None,
    texts: tuple[str, ...],
    limit: int | None,
    offline: bool,
    as_json: bool,
) -> None:
    """The mismatch of TEACHER and STUDENT as a table in Markdown: vocabularies, span types, fidelity."""
    given = _read(data, texts, limit=limit)
    sides = _tokenizers(teacher, student, offline=offline)
    from ctpd.cli import draw
    from ctpd.inspection.tokenizers import compare_tokenizers, vocabulary_facts

    found = compare_tokenizers(given, teacher=sides[0], student=sides[1])
    facts = vocabulary_facts(teacher=sides[0], student=sides[1])
    if as_json:
        click.echo(json_text({**found.plain(), "vocabularies": facts}))
        return
    click.echo(draw.markdown(found, facts, teacher=teacher, student=student))


@inspect.command()
@click.argument("recipe")
@click.option("--show", type=click.IntRange(min=1), default=_SHOWN, show_default=True, help="So many pairs.")
@execution("store", "offline", "json")
def pairs(recipe: str, *, show: int, store: Path, offline: bool, as_json: bool) -> None:
    """The first pairs of RECIPE as each model reads them: prompt, responses, end, and what of it is scored."""
    prepare(offline=offline)
    import dataclasses

    from ctpd.app import Experiment
    from ctpd.cli import draw
    from ctpd.core.store import Store
    from ctpd.inspection.pairs import read_pairs

    found = read_pairs(Experiment(recipe).stages.pairs, Store(store), show=show, source=recipe)
    if as_json:
        click.echo(json_text([dataclasses.asdict(pair) for pair in found]))
        return
    click.echo("\n\n".join(draw.pair(pair, number=number) for number, pair in enumerate(found, start=1)))
    click.echo(draw.pair_legend())


@inspect.command()
@click.argument("source", metavar="RECIPE|TOKENIZER")
@click.option("--data", type=click.Path(path_type=Path), help="With a TOKENIZER: pairs to render.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many pairs.")
@click.option(
    "--variable",
    multiple=True,
    metavar="NAME=VALUE",
    help="With a TOKENIZER: a variable of the template; may be repeated.",
)
@click.option("--merge-system", is_flag=True, help="With a TOKENIZER: as `system: merge` in a recipe.")
@click.option("--end-token", help="With a TOKENIZER: as `end_token` in a recipe.")
@execution("store", "offline", "json")
def template(source: str, *, data: Path | None, limit: int | None, store: Path, offline: bool, **values: Any) -> None:
    """How the models of RECIPE, or a TOKENIZER's chat template, render conversations, and where the template itself differs.

    A row is the prompt as the template renders it for generation, the response as it is, and the end of the turn. Without
    --data a TOKENIZER renders a few conversations that templates are known to treat differently.
    """
    prepare(offline=offline)
    import dataclasses

    from ctpd.cli import draw
    from ctpd.inspection.templates import SHAPES, recipe_templates, report_template

    if is_recipe(source):
        refuse("data", "variable", "merge_system", "end_token", because="the RECIPE says it")
        from ctpd.app import Experiment
        from ctpd.core.store import Store

        found = recipe_templates(Experiment(source).stages.pairs, Store(store), limit=limit, source=source)
    else:
        if data is None:
            refuse("limit", because="it counts the pairs of --data")
        pairs = list(SHAPES.values()) if data is None else _usable(data, limit)
        found = {"tokenizer": report_template(_chat_side(source, **values), pairs)}
    if values["as_json"]:
        click.echo(json_text({name: dataclasses.asdict(one) for name, one in found.items()}))
        return
    click.echo("\n\n".join(draw.template(one, title=name) for name, one in found.items()))


def is_recipe(source: str) -> bool:
    """Whether a name is that of a recipe, shipped or a file of YAML."""
    from ctpd.recipe import shipped_recipes

    return source in shipped_recipes() or (Path(source).suffix in (".yaml", ".yml") and Path(source).is_file())


def _usable(data: Path, limit: int | None) -> Any:
    from ctpd.pipeline.peeks import layout_of
    from ctpd.pipeline.stages.pairs import read_usable_file

    pairs = read_usable_file(data, layout=layout_of(data)).pairs
    return list(islice((pair for pair in pairs if pair.chosen and pair.rejected), limit))


def _chat_side(source: str, *, variable: tuple[str, ...], merge_system: bool, end_token: str | None, **_: Any) -> Any:
    from ctpd.cli.options import variables
    from ctpd.models import find_tokenizer
    from ctpd.text.render import ChatTemplate, TemplatedTokenizer
    from ctpd.text.templates import EndToken

    tokenizer: Any = find_tokenizer(source)
    end = None if end_token is None else EndToken(end_token, "recipe")
    chat = ChatTemplate(tokenizer, variables(variable, option="--variable"), end=end, merge_system=merge_system)
    return TemplatedTokenizer(tokenizer, chat, name="tokenizer")


@inspect.command()
@click.argument("recipe")
@execution("store", "only", "seed", "json")
def weights(recipe: str, *, store: Path, only: tuple[str, ...], seed: tuple[int, ...], as_json: bool) -> None:
    """The importance weights of RECIPE's runs, or of the weights artifact with this KEY (its beginning is enough)."""
    from ctpd.cli import draw
    from ctpd.core.store import Store
    from ctpd.inspection.weights import inspect_weights

    opened = Store(store)
    keys = _weight_keys(recipe, opened, only=only, seed=seed)
    found = {", ".join(names): inspect_weights(opened, key) for key, names in keys.items()}
    if as_json:
        click.echo(json_text(found))
        return
    click.echo("\n\n".join(draw.weights(title, one) for title, one in found.items()))


def _weight_keys(recipe: str, store: "Store", *, only: tuple[str, ...], seed: tuple[int, ...]) -> dict[str, list[str]]:
    """Key of a weights artifact -> the runs that use it; runs whose weights are not built yet are named on stderr."""
    from ctpd.core.errors import UserError
    from ctpd.core.printing import command, printable
    from ctpd.recipe import shipped_recipes

    if recipe not in shipped_recipes() and not Path(recipe).is_file():
        try:
            artifact = store.find(recipe if "/" in recipe else f"weights/{recipe}")
        except UserError as error:
            raise UserError(
                f"'{recipe}' is no recipe and no key of importance weights in {store.root}",
                fix=f"Give a shipped recipe, a path, or the beginning of a key from `{command('store', 'du', store=store.root)}`",
            ) from error
        if artifact.stage != "weights":
            raise UserError(f"the artifact holds no importance weights but {artifact.stage}", where=str(artifact.path))
        refuse("only", "seed", because="a KEY is one artifact, not a recipe with runs and seeds")
        return {artifact.key: [f"weights/{artifact.key[:12]}"]}
    from ctpd.app import Experiment

    experiment = Experiment(recipe, only=only, seeds=seed, store=store)
    stages = list(experiment.outlook.weights.items())
    keys: dict[str, list[str]] = {}
    missing = []
    for title, stage in stages:
        if title in experiment.weights and store.has(stage.kind, stage.key):
            keys.setdefault(stage.key, []).append(title)
        else:
            missing.append(title)
    if not keys:
        what = "none of its runs has importance weights"
        if stages:
            what = f"no importance weights of it are in the store {store.root}"
        training = command("train", recipe, store=store.root)
        raise UserError(what, where=recipe, fix=f"Run `{training}` first, or give another --store")
    if missing:
        click.echo(f"Not built yet: {printable('; '.join(missing))}.", err=True)
    return keys


def _read(data: Path | None, texts: tuple[str, ...], *, limit: int | None) -> list[str]:
    if (data is None) == (not texts):
        raise click.UsageError("Give --data or --text, one of them.")
    if data is None:
        refuse("limit", because="it counts the pairs of --data")
        return list(texts)
    from ctpd.inspection.tokenizers import read_responses

    return read_responses(data, limit=limit)


def _tokenizers(teacher: str, student: str, *, offline: bool) -> tuple[Any, Any]:
    prepare(offline=offline)
    from ctpd.models import find_tokenizer

    return find_tokenizer(teacher), find_tokenizer(student)


def _write(path: Path, text: str) -> None:
    from ctpd.core.errors import UserError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the page cannot be written ({error.strerror})", where=str(path), fix="Give a file in a folder that exists"
        ) from error
