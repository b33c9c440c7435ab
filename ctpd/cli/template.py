"""The recipe that `ctpd init` writes: complete, commented, with the paper's settings as a start, sized for the data."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from ctpd.core.config import validate
from ctpd.core.errors import UserError, nearest
from ctpd.core.names import LONGEST_NAME, unfit_name, unfit_text
from ctpd.core.printing import printable
from ctpd.core.text_encoding import text_codec
from ctpd.core.userfiles import exists, user_path
from ctpd.pipeline.peeks import first_rows, recognised
from ctpd.pipeline.sources import count_rows, data_files
from ctpd.recipe import shipped_recipes
from ctpd.recipe.load import looks_local
from ctpd.recipe.model import is_commit
from ctpd.recipe.schema import schema_file
from ctpd.text.config import Columns, Layout
from ctpd.text.unread import refuse_unread

PAIRS_PER_STEP, SFT_PAIRS_PER_STEP = 16, 128  # the paper's, where the data are enough
LEAST_STEPS = 20
_NOT_COUNTED = "its rows were not counted: see that a training has enough steps"

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# The line above is for editors: they complete and check this file by the schema of the installed ctpd, which has no public address.
# {title}
#   {command} --plan     # look at the stages first
#   {command}
name: {name}
about: {about}
shared:
  teacher:
{teacher_model}
{teacher_template}
{teacher_sft}
    positive: {{learning_rate: 2e-6, beta: 0.3, {schedule}}}
    negative: {{learning_rate: 2e-6, beta: 0.3, {schedule}}}
  student:
{student_model}
{student_template}
    sft: {{learning_rate: 4e-6, {sft_schedule}}}
    positive: {{learning_rate: 1e-6, beta: 0.1, {schedule}}}  # for TIS-DPO
    negative: {{learning_rate: 1e-6, beta: 0.1, {schedule}}}
  data:
    train: {{path: {data}{layout}}}  # {counted}
    max_tokens: 512
    max_prompt_tokens: 256
    long_prompt: cut
  train: {{{schedule}, schedule: cosine, warmup_ratio: 0.1}}  # add lora: {{r: 16, alpha: 32}} to save memory
  evaluation: {{suite: card, batch_size: 8, chat_template: {chat}}}  # offline: data_root, a folder that mirrors the hub
  precision: bfloat16
  seeds: [0]
untrained: {{Teacher: teacher, Student: student}}
runs:
  DPO: {{method: dpo, tuned: {{learning_rate: 1e-6, beta: 0.1}}}}
  TIS-DPO: {{method: tis_dpo, tuned: {{learning_rate: 1e-6, beta: 0.1}}}}
  CTPD: {{method: ctpd, params: {{k: 1.0, mu: 1.0, lower: -0.5, upper: 1.5}}, tuned: {{learning_rate: 1e-6, beta: 0.1}}}}
tables:
  main: {{caption: Main results, rows: [Teacher, Student, DPO, TIS-DPO, CTPD], base: DPO}}
"""


def write_recipe(
    to: Path,
    *,
    teacher: str,
    student: str,
    data: Path,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> str:
    """Write a recipe for a pair of models and one or several files of pairs.

    Args:
        to: a file that does not exist yet.
        teacher, student: a directory, or a hub id with its revision after an `@`.
        data: the pairs: a file, a folder or a pattern.
        columns: our name -> the file's column, for a file in no form that is recognised.
        encoding: that of texts that are not UTF-8.

    Returns:
        What was found in the data, in one sentence.

    Raises:
        UserError: `to` exists, or the data do not or hold no pair; they are in no form that is recognised; a hub id has
            no commit as its revision.
    """
    if to.exists():
        raise UserError(f"the file '{to}' exists already", fix="Give another name with --to")
    codec = None if encoding is None else text_codec(encoding)
    data_files(data, encoding=codec)
    if not to.parent.is_dir():
        raise UserError(f"the folder '{to.parent}' does not exist", fix="Make it, or give another name with --to")
    pairs = count_rows(data, encoding=codec)
    if pairs == 0:
        raise UserError("the file holds no pair", where=str(data), fix="Correct --data")
    given = validate(Columns, columns, source="--column") if columns else None
    found = recognised(data, columns=given, encoding=codec)
    schedule, sft_schedule = (_schedule(pairs, most=most) for most in (PAIRS_PER_STEP, SFT_PAIRS_PER_STEP))
    chat = {"teacher": _has_chat_template(teacher), "student": _has_chat_template(student)}
    sft = "skip  # an instruct model is fine-tuned already; for a base model give a training like the ones below"
    about = f"Preference distillation from {teacher} to {student}."
    text = _TEMPLATE.format(
        schema=_schema(to),
        title=" ".join(f"{teacher} teaches {student} with the pairs of {data}.".split()),
        command=" ".join(shlex.join(["ctpd", "run", str(to)]).split()),
        name=_quoted(to.stem if unfit_name(to.stem) is None else printable(to.stem)[:LONGEST_NAME]),
        about=_quoted(about if unfit_text(about) is None else printable(about)),
        data=_quoted(str(data)),
        layout=("" if encoding is None else f", encoding: {_quoted(encoding)}") + _layout(found.layout),
        teacher_model=_model(teacher),
        student_model=_model(student),
        teacher_template=_template(chat["teacher"]),
        student_template=_template(chat["student"]),
        teacher_sft=f"    sft: {sft}" if chat["teacher"] else f"    sft: {{learning_rate: 4e-6, {sft_schedule}}}",
        schedule=schedule,
        sft_schedule=sft_schedule,
        counted=_NOT_COUNTED if pairs is None else f"{pairs:,} pairs",
        chat="true" if all(chat.values()) else "false",
    )
    to.write_text(text, encoding="utf-8")
    return f"{printable(str(data))}: {'' if pairs is None else f'{pairs:,} rows; '}{printable(found.sentence())}.{_unread(data, found.layout, codec)}"


def _unread(data: Path, layout: Layout, encoding: str | None) -> str:
    """What a plan of the recipe will refuse until it is decided: a column of the conversation that is not read."""
    try:
        refuse_unread(first_rows(data, encoding=encoding), source=str(data), layout=layout)
    except UserError as error:
        return printable(f" Before a plan: {error.what}. {error.fix}.")
    return ""


def _layout(layout: Layout) -> str:
    """What the data source says of its rows, behind its path."""
    given = {} if layout.columns is None else layout.columns.given
    columns = ", ".join(f"{name}: {_quoted(column)}" for name, column in given.items())
    return (f", columns: {{{columns}}}" if columns else "") + ("" if layout.form is None else f", form: {layout.form}")


def copy_recipe(name: str, to: Path) -> None:
    """Copy a shipped recipe's file; its first line, the schema for editors, is that of the installed ctpd.

    Args:
        name: of a shipped recipe.
        to: a file that does not exist yet.

    Raises:
        UserError: there is no such recipe, `to` exists, or its folder does not.
    """
    _, _, rest = shipped_text(name).partition("\n")
    if not to.parent.is_dir():
        raise UserError(f"the folder '{to.parent}' does not exist", fix="Make it, or give another name with --to")
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(f"# yaml-language-server: $schema={_schema(to)}\n{rest}")
    except FileExistsError as error:
        raise UserError(f"the file '{to}' exists already", fix="Give another name with --to") from error


def shipped_text(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        UserError: there is no such recipe.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(
            f"there is no shipped recipe '{name}'.{nearest(name, shipped)}", fix="List them with `ctpd recipes`"
        )
    return shipped[name].read_text(encoding="utf-8")


def _schedule(pairs: int | None, *, most: int) -> str:
    """Epochs and pairs a step for a file of so many pairs: at least about ``LEAST_STEPS`` steps, where that can be.

    A step has a power of two of pairs, ``most`` at the largest; a twentieth of the pairs may be dropped.
    """
    if pairs is None:
        return f"epochs: 1, pairs_per_step: {most}"
    usable = max(1, math.floor(0.95 * pairs))
    per_step = most
    while per_step > 1 and usable // per_step < LEAST_STEPS:
        per_step //= 2
    return f"epochs: {max(1, math.ceil(LEAST_STEPS / (usable // per_step)))}, pairs_per_step: {per_step}"


def _template(has_chat: bool) -> str:
    if has_chat:
        return "    template: chat"
    return '    template: {user: "{content}\\n", assistant: "{content}\\n"}  # the model has no chat template'


def _has_chat_template(model: str) -> bool:
    """Whether the files of a local model have a chat template; a hub model is taken to have one."""
    folder = user_path(model)
    if not folder.is_dir():
        return True
    config = folder / "tokenizer_config.json"
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("chat_template") is not None
    except (OSError, ValueError):
        return False


def _quoted(text: str) -> str:
    """A text as YAML's quoted form, whatever it holds: `2026` is no number then, and a colon no key."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _schema(to: Path) -> str:
    """The installed schema: relative to the recipe where it lies below it (an environment in the project), else as a URI."""
    schema, folder = schema_file().resolve(), to.parent.resolve()
    if schema.is_relative_to(folder) and " " not in str(schema):
        return schema.relative_to(folder).as_posix()
    return schema.as_uri()


def _model(model: str) -> str:
    """The lines of a model, which the recipe can be loaded with.

    Raises:
        UserError: a hub id without a commit.
    """
    name, _, revision = (model, "", "") if exists(user_path(model)) else model.partition("@")
    if not (is_commit(revision) if revision else looks_local(name)):
        raise UserError(
            f"the directory '{model}' does not exist, and as a hub id it lacks a commit",
            fix=f"For the hub's model give `{name}@COMMIT`, 40 hex digits; else correct the path",
        )
    lines = [f"    model: {_quoted(name)}", *([f"    revision: {_quoted(revision)}"] if revision else [])]
    return "\n".join(lines)
