"""What a recipe may say: frozen dataclasses without behaviour, and the function that reads one.

One complete YAML file is one experiment. `shared` holds everything that is identical for all runs of the comparison.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ctpd.core.config import build, nearest, parse_yaml
from ctpd.core.errors import UserError
from ctpd.core.world import PretrainConfig, WorldConfig


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters: rank `r`, `alpha`, on all linear layers or on the modules named by `targets`.

    `base` is the form of the frozen weights in training: 4 bytes, 2 bytes or half a byte each (QLoRA's NF4, which needs
    bitsandbytes). Adapters are trained in float32. Stored references are those of the weights before they lost
    precision: with 4 bits a first DPO loss is near log 2, not log 2. The adapter is merged into those weights, too, for
    signals, evaluation and export.
    """

    r: int = 16
    alpha: int = 32
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    base: Literal["float32", "bfloat16", "4bit"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a training runs, without its step size: shared by all methods of a comparison."""

    epochs: int = 1
    pairs_per_step: int = 16
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: LoraSpec | None = None
    activation_checkpointing: bool = False
    evaluations_per_epoch: int = 1


@dataclass(frozen=True, kw_only=True)
class SftPhase(Schedule):
    """Supervised fine-tuning on the chosen responses."""

    learning_rate: float
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ContrastivePhase(Schedule):
    """One model of a contrastive pair: DPO (or, for the negative one, DPO with chosen and rejected swapped)."""

    learning_rate: float
    beta: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PlainSpec:
    """The turns of a base model without a chat template; each text holds `{content}` once."""

    user: str
    assistant: str
    system: str = "{content}\n"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A teacher or a student: where it comes from, how it is prompted, and the models trained from it.

    `sft` is a training, the word `skip` (the model is already fine-tuned) or a path; `positive` and `negative` are a
    training or a path (a model, or a LoRA adapter on the SFT model).
    """

    model: str | None = None
    revision: str | None = None
    pretrain: PretrainConfig | None = None
    template: Literal["chat"] | PlainSpec
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    sft: SftPhase | str
    positive: ContrastivePhase | str | None = None
    negative: ContrastivePhase | str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pairs come from: a local file, a hub data set (revision pinned) or the testbed."""

    path: str | None = None
    hub: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    testbed: Literal["train", "eval"] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The pairs and their lengths, in tokens of either model (METHOD 2.7).

    `limit` keeps so many pairs of each split: the first, or with `select: shortest` those with the fewest characters.
    """

    train: Source
    eval: Source | None = None
    max_tokens: int
    max_prompt_tokens: int
    long_prompt: Literal["drop", "cut"] = "drop"
    max_dropped: float = 0.05
    select: Literal["all", "shortest"] = "all"
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """The suite and its protocol.

    `data_root` is a folder that mirrors the hub, for machines without a network. `backend` computes all scores of a
    comparison: `hf` (transformers), or `vllm` where it is installed, which batches by itself. `precision` is the one in
    which models are evaluated, None for `shared.precision`; a record tells it as `dtype`.
    """

    suite: str
    limit: int | None = None
    batch_size: int = 8
    chat_template: bool = False
    data_root: str | None = None
    backend: Literal["hf", "vllm"] = "hf"
    precision: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Everything that is identical for all runs of a comparison."""

    teacher: ModelSpec
    student: ModelSpec
    data: DataSpec
    train: Schedule
    evaluation: EvaluationSpec
    seeds: tuple[int, ...] = (0,)
    precision: Literal["float32", "bfloat16"] = "float32"
    testbed: WorldConfig | None = None


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One method with its parameters; `tuned` holds what was chosen on the development split, step size included.

    In a recipe with a `grid` what the grid gives need not stand here.
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AblationSpec:
    """The run `base` with one parameter varied: row label -> value."""

    base: str
    field: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """A table: named rows, or the rows of an ablation; differences are taken to the row `base`."""

    caption: str
    rows: tuple[str, ...] = ()
    ablation: str | None = None
    base: str | None = None
    note: str | None = None
    published: str | None = None


@dataclass(frozen=True, kw_only=True)
class FsdpSpec:
    """Weights, gradients and optimizer states in shares, one a process.

    `wrap` names the layer classes that are gathered one at a time; empty means the model's own `_no_split_modules`.
    `offload` keeps the shares in the memory of the CPU.
    """

    wrap: tuple[str, ...] = ()
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """On how many processes a recipe is meant to run: execution, in no key.

    With `fsdp` a model in training is shared out over the processes; without, each process holds all of it.
    """

    num_processes: int = 1
    fsdp: FsdpSpec | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment.

    `grid` makes it a search: every run is trained at every point of the one grid, so that each method has the same
    number of trials.
    """

    name: str
    about: str
    shared: Shared
    anchors: Mapping[str, Literal["teacher", "student"]] = field(default_factory=dict)
    runs: Mapping[str, RunSpec]
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ablations: Mapping[str, AblationSpec] = field(default_factory=dict)
    tables: Mapping[str, TableEntry]
    launch: LaunchSpec = field(default_factory=LaunchSpec)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name -> file."""
    folder = Path(str(resources.files("ctpd") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """Read a recipe by shipped name or path, strictly.

    Raises:
        UserError: no such recipe, or anything in it that is unknown, missing, of the wrong type or contradictory.
    """
    shipped = shipped_recipes()
    name = str(recipe)
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"there is no recipe '{name}': no such file, and no shipped recipe of that name.{nearest(name, shipped)}",
            fix=f"Give a path or one of: {', '.join(shipped)}",
        )
    source = name if name in shipped else str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("the file is no UTF-8 text", where=source, fix="Save it as UTF-8") from error
    loaded = build(Recipe, parse_yaml(text, source=source), source=source)
    _check(loaded, source)
    return loaded


def _check(recipe: Recipe, source: str) -> None:
    shared = recipe.shared
    for role, model in (("teacher", shared.teacher), ("student", shared.student)):
        _check_model(model, f"shared.{role}", source)
    for role, data in (("train", shared.data.train), ("eval", shared.data.eval)):
        if data is not None:
            _check_source(data, f"shared.data.{role}", source, world=shared.testbed is not None)
    if shared.data.select == "shortest" and shared.data.limit is None:
        raise UserError("'shared.data' selects the shortest pairs and needs a `limit`", where=source)
    phases = [shared.train, *(p for m in (shared.teacher, shared.student) for p in (m.sft, m.positive, m.negative))]
    if shared.precision == "float32" and any(
        isinstance(phase, Schedule) and phase.lora is not None and phase.lora.base != "float32" for phase in phases
    ):
        raise UserError(
            "`lora.base` is of lower precision than the computation, which `shared.precision` says is float32",
            where=source,
            fix="Write `precision: bfloat16` in `shared`, or leave `base` out",
        )
    needs_world = [m for m in (shared.teacher, shared.student) if m.pretrain is not None]
    if needs_world and shared.testbed is None:
        raise UserError("a model is pretrained on the testbed, and `shared.testbed` is missing", where=source)
    if shared.train.epochs < 1 or shared.train.pairs_per_step < 1 or not shared.seeds:
        raise UserError("`epochs`, `pairs_per_step` and the number of `seeds` must be at least 1", where=source)
    if recipe.launch.num_processes < 1:
        raise UserError("'launch.num_processes' must be at least 1", where=source)
    _check_names(recipe, source)


def _check_model(model: ModelSpec, path: str, source: str) -> None:
    if (model.model is None) == (model.pretrain is None):
        raise UserError(f"'{path}' needs exactly one of `model` and `pretrain`", where=source)
    _check_pinned(model.revision, path, source)
    if model.model is not None and model.revision is None and not looks_local(model.model):
        raise UserError(
            f"'{path}.model' is '{model.model}', which is no local directory, and no `revision` is given",
            where=source,
            fix="Check the path; for a hub model pin its revision (a commit), so that the run can be repeated",
        )


def _check_source(data: Source, path: str, source: str, *, world: bool) -> None:
    if sum(x is not None for x in (data.path, data.hub, data.testbed)) != 1:
        raise UserError(f"'{path}' needs exactly one of `path`, `hub` and `testbed`", where=source)
    if data.hub is not None and (data.revision is None or data.split is None):
        raise UserError(f"'{path}' comes from the hub and needs a `split` and a pinned `revision`", where=source)
    _check_pinned(data.revision, path, source)
    if data.testbed is not None and not world:
        raise UserError(f"'{path}' comes from the testbed, and `shared.testbed` is missing", where=source)


def _check_pinned(revision: str | None, path: str, source: str) -> None:
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"'{path}.revision' is '{revision}', which is no commit; a branch moves, and the run could not be repeated",
            where=source,
            fix="Give the commit, 40 hex digits, which the hub shows under `History`",
        )


def _check_names(recipe: Recipe, source: str) -> None:
    _check_grid(recipe, source)
    names = {**recipe.runs, **recipe.anchors}
    if set(recipe.runs) & set(recipe.anchors):
        raise UserError("a run and an anchor have the same name", where=source, fix="Rename one of them")
    for label, ablation in recipe.ablations.items():
        if ablation.base not in recipe.runs:
            raise UserError(
                f"'ablations.{label}.base' names no run: '{ablation.base}'.{nearest(ablation.base, recipe.runs)}",
                where=source,
            )
    for label, run in recipe.runs.items():
        if "learning_rate" not in {*run.tuned, *recipe.grid}:
            raise UserError(f"'runs.{label}.tuned' lacks `learning_rate`", where=source)
        if twice := {*run.tuned, *run.params} & set(recipe.grid):
            raise UserError(f"'runs.{label}' fixes `{min(twice)}`, which the grid varies", where=source)
    for label, table in recipe.tables.items():
        if label == "report":
            raise UserError("a table may not be named `report`: that file is the report", where=source, fix="Rename it")
        if bool(table.rows) == (table.ablation is not None):
            raise UserError(f"'tables.{label}' needs exactly one of `rows` and `ablation`", where=source)
        if table.ablation is not None and table.ablation not in recipe.ablations:
            raise UserError(
                f"'tables.{label}.ablation' names no ablation: '{table.ablation}'"
                f".{nearest(table.ablation, recipe.ablations)}",
                where=source,
            )
        known = recipe.ablations[table.ablation].values if table.ablation else names
        for row in (*table.rows, *([table.base] if table.base else [])):
            if row not in known:
                raise UserError(f"'tables.{label}' names no row: '{row}'.{nearest(row, known)}", where=source)


def _check_grid(recipe: Recipe, source: str) -> None:
    if recipe.grid and recipe.ablations:
        raise UserError("a recipe has a `grid` or `ablations`, not both", where=source)
    for name, values in recipe.grid.items():
        if not values:
            raise UserError(f"'grid.{name}' has no values", where=source)
    for label, table in recipe.tables.items():
        if recipe.grid and table.base in recipe.runs:
            raise UserError(
                f"'tables.{label}.base' is the run '{table.base}', which the grid makes several rows of",
                where=source,
                fix="Leave `base` out, or take an anchor",
            )


def looks_local(model: str) -> bool:
    """Whether a model name is meant as a path: it exists, or is written like one."""
    return Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
