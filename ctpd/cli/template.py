"""The recipe that `ctpd init` writes: complete, commented, with the paper's settings as a start."""

import shlex
from pathlib import Path

import yaml

from ctpd.core.errors import UserError
from ctpd.core.names import LONGEST_NAME, unfit_name, unfit_text
from ctpd.core.printing import printable
from ctpd.recipe.schema import schema_file

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
    template: chat  # a base model has none: {{user: "{{content}}\\n", assistant: "{{content}}\\n"}}
    sft: skip  # an instruct model is fine-tuned already; for a base model give a training like the ones below
    positive: {{learning_rate: 2e-6, beta: 0.3, epochs: 1, pairs_per_step: 16}}
    negative: {{learning_rate: 2e-6, beta: 0.3, epochs: 1, pairs_per_step: 16}}
  student:
{student_model}
    template: chat
    sft: {{learning_rate: 4e-6, epochs: 1, pairs_per_step: 128}}
    positive: {{learning_rate: 1e-6, beta: 0.1, epochs: 1, pairs_per_step: 16}}  # for TIS-DPO
    negative: {{learning_rate: 1e-6, beta: 0.1, epochs: 1, pairs_per_step: 16}}
  data:
    train: {{path: {data}}}
    max_tokens: 512
    max_prompt_tokens: 256
    long_prompt: cut
  train: {{epochs: 1, pairs_per_step: 16, schedule: cosine, warmup_ratio: 0.1}}  # add lora: {{r: 16, alpha: 32}} to save memory
  evaluation: {{suite: card, batch_size: 8}}  # offline: data_root, a folder that mirrors the hub
  precision: bfloat16
  seeds: [0]
untrained: {{Teacher: teacher, Student: student}}
runs:
  DPO: {{method: dpo, tuned: {{learning_rate: 1e-6, beta: 0.1}}}}
  TIS-DPO: {{method: tis_dpo, tuned: {{learning_rate: 1e-6, beta: 0.1}}}}
  CTPD: {{method: ctpd, tuned: {{learning_rate: 1e-6, beta: 0.1}}}}
tables:
  main: {{caption: Main results, rows: [Teacher, Student, DPO, TIS-DPO, CTPD], base: DPO}}
"""


def write_recipe(to: Path, *, teacher: str, student: str, data: Path) -> None:
    """Write a recipe for a pair of models and a file of pairs.

    Args:
        to: a file that does not exist yet.
        teacher, student: a directory, or a hub id with its revision after an `@`.
        data: the pairs.

    Raises:
        UserError: `to` exists, or the data do not.
    """
    if to.exists():
        raise UserError(f"the file '{to}' exists already", fix="Give another name with --to")
    if not data.is_file():
        raise UserError(f"the data file '{data}' does not exist", fix="Correct --data")
    if not to.parent.is_dir():
        raise UserError(f"the folder '{to.parent}' does not exist", fix="Make it, or give another name with --to")
    about = f"Preference distillation from {teacher} to {student}."
    text = _TEMPLATE.format(
        schema=_schema(to),
        title=" ".join(f"{teacher} teaches {student} with the pairs of {data}.".split()),
        command=" ".join(shlex.join(["ctpd", "run", str(to)]).split()),
        name=_quoted(to.stem if unfit_name(to.stem) is None else printable(to.stem)[:LONGEST_NAME]),
        about=_quoted(about if unfit_text(about) is None else printable(about)),
        data=_quoted(str(data)),
        teacher_model=_model(teacher),
        student_model=_model(student),
    )
    to.write_text(text, encoding="utf-8")


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
    name, _, revision = (model, "", "") if Path(model).expanduser().exists() else model.partition("@")
    lines = [f"    model: {_quoted(name)}", *([f"    revision: {_quoted(revision)}"] if revision else [])]
    return "\n".join(lines)
