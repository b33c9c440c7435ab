"""The types of a recipe. One YAML file describes one experiment; `ctpd.recipe.load` reads and checks it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, Field, model_validator

from ctpd.core.config import Config, Number, Positive, PositiveInt, Seed, Text
from ctpd.core.errors import UserError
from ctpd.core.text_encoding import text_codec
from ctpd.testbed.config import PretrainConfig, WorldConfig
from ctpd.text.config import Columns, Form, Layout, PairsConfig
from ctpd.train.config import FsdpSpec, Schedule

Precision = Literal["float32", "bfloat16"]


def _holds_content(text: str) -> str:
    if text.count("{content}") != 1:
        found = text.count("{content}")
        raise ValueError(f"the text {text!r} must contain {{content}} exactly once, and contains it {found} times")
    return text


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, which does not change, and no branch."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def checked_commit(revision: str) -> str:
    """The revision, which is a commit.

    Raises:
        UserError: it is a branch or a tag.
    """
    if not is_commit(revision):
        raise UserError(
            f"'{revision}' is not a commit; a branch changes, and the run could not be repeated",
            fix="Give the commit, 40 hex digits, which the hub shows under `History`",
        )
    return revision


def _is_unique(seeds: tuple[int, ...]) -> tuple[int, ...]:
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(f"the seed {seed} is given twice")
    return seeds


def _are_two(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(seeds) < 2:
        raise ValueError("at least two seeds are needed: with one, the choice would follow its luck")
    return seeds


ARGUMENTS = frozenset(
    (
        *("self", "conversation", "conversations", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    )
)
"""The parameters of transformers' `apply_chat_template` and of the function that renders for it, which ctpd sets."""


def checked_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Variables of a chat template, none of which has the name of an argument of the function that renders it.

    Raises:
        UserError: one has.
    """
    for name in variables:
        if name in ARGUMENTS:
            raise UserError(
                f"'{name}' is no variable of a template but an argument of transformers' `apply_chat_template`, which ctpd sets",
                fix="Leave it out, and name only what the text of the chat template reads, such as `enable_thinking`",
            )
    return variables


Turn = Annotated[str, AfterValidator(_holds_content), Field(json_schema_extra={"pattern": r"\{content\}"})]
Commit = Annotated[str, AfterValidator(checked_commit), Field(json_schema_extra={"pattern": "^[0-9a-f]{40}$"})]


Codec = Annotated[Text, AfterValidator(text_codec)]


class SftPhase(Schedule):
    """Supervised fine-tuning on the chosen responses."""

    learning_rate: Positive
    """Peak learning rate."""
    seed: Seed = 0
    """Seed of the order of the pairs and of the adapters' initial weights."""


class ContrastivePhase(Schedule):
    """One model of a contrastive pair: DPO (or, for the negative one, DPO with chosen and rejected swapped)."""

    learning_rate: Positive
    """Peak learning rate."""
    beta: Positive = 0.1
    """Factor of the margin in DPO's loss."""
    seed: Seed = 0
    """Seed of the order of the pairs and of the adapters' initial weights."""


class PlainSpec(Config):
    """The turns of a base model without a chat template; each text contains `{content}` once."""

    user: Turn
    """A user's turn, for example `"### Question:\\n{content}\\n\\n"`."""
    assistant: Turn
    """The assistant's turn; its text before `{content}` is the generation prompt."""
    system: Turn = "{content}\n"
    """A system message."""


class ModelSpec(Config):
    """A teacher or a student: where it comes from, how it is prompted, and the models trained from it."""

    model: Text | None = None
    """A directory, or a model of the hub, which needs a `revision`. Either this or `pretrain`."""
    revision: Commit | None = None
    """The commit of a hub model: 40 hex digits."""
    pretrain: PretrainConfig | None = None
    """A testbed model, pretrained here from scratch. Either this or `model`."""
    template: Literal["chat"] | PlainSpec
    """How messages become text: the tokenizer's own chat template, or the turns of a base model that has none."""
    template_variables: Annotated[Mapping[str, Any], AfterValidator(checked_variables)] = Field(default_factory=dict)
    """Variables that the chat template reads, such as `enable_thinking: false`, in training and in evaluation."""
    system: Literal["message", "merge"] = "message"
    """A system message in a chat template: a message of its own, or the beginning of the first user message (`merge`),
    for templates without a system role."""
    end_token: Text | None = None
    """The token that ends a response in a chat template. Left out, the first special token that the template writes behind
    one; where it writes none, the first `eos_token_id` of the model's `generation_config`, or the tokenizer's EOS token."""
    think_end_token: Text | None = None
    """The text that ends a model's reasoning, such as `</think>`: what it generates up to there is not scored in an
    evaluation with `chat_template: true`."""
    sft: SftPhase | Text
    """Supervised fine-tuning first: a training, the word `skip` (the model is already fine-tuned), or the path of a model."""
    positive: ContrastivePhase | Text | None = None
    """The model that prefers chosen responses: a training, or the path of a model or of a LoRA adapter on the SFT model."""
    negative: ContrastivePhase | Text | None = None
    """The model that prefers rejected responses: a training, or the path of a model or of a LoRA adapter on the SFT model."""
    reversed: bool = False
    """Train SFT model and contrastive pair on reversed preferences, chosen for rejected: a teacher that misleads, for studies of the reference."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("exactly one of `model` and `pretrain` is needed")
        of_chat = {"system": self.system != "message", "end_token": self.end_token is not None}
        given = [name for name, is_given in of_chat.items() if is_given]
        if given and self.template != "chat":
            raise ValueError(f"`{given[0]}` needs `template: chat`")
        return self


class Source(Config):
    """Where pairs come from: a local file, a hub data set (revision pinned) or the testbed."""

    path: Text | None = None
    """Local files: one of jsonl, json, csv (these also compressed, as in `.jsonl.gz` or `.csv.zst`) or parquet; a folder of
    such files of one kind, which are read in the order of their names; or a pattern, such as `data/train-*.parquet`."""
    encoding: Codec | None = None
    """The encoding of the texts in `path`, by its name in Python: `cp1252`, `utf-16`, `gbk`; left out, UTF-8."""
    hub: Text | None = None
    """A data set of the hub; it needs a `split` and a `revision`."""
    name: Text | None = None
    """The hub data set's configuration, where it has several."""
    split: Text | None = None
    """The hub data set's split."""
    revision: Commit | None = None
    """The commit of the hub data set: 40 hex digits."""
    testbed: Literal["train", "eval"] | None = None
    """The testbed's pairs of this split."""
    columns: Columns | None = None
    """The columns that hold a pair, where they have other names than `prompt`, `chosen`, `rejected` and `system`."""
    form: Form | None = None
    """`transcript`: texts are conversations, `Human: ... Assistant: ...` with an empty line before each turn. `text`: a text
    is one text, even if it looks so. Left out, such texts are refused."""
    ignore: tuple[Text, ...] = ()
    """Columns that are left out on purpose: a filled one that belongs to a conversation, such as `system_prompt` or
    `history`, is refused where it is neither read nor named here."""

    @property
    def layout(self) -> Layout:
        """How its rows hold pairs."""
        return Layout(columns=self.columns, form=self.form)

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if sum(x is not None for x in (self.path, self.hub, self.testbed)) != 1:
            raise ValueError("exactly one of `path`, `hub` and `testbed` is needed")
        if self.hub is not None and (self.revision is None or self.split is None):
            raise ValueError("pairs from the hub need a `split` and a pinned `revision`")
        if self.encoding is not None and (self.path is None or self.path.lower().endswith(".parquet")):
            raise ValueError("`encoding` is that of text files; Parquet, the hub and the testbed have UTF-8")
        if self.testbed is not None and (self.ignore or self.layout != Layout()):
            raise ValueError(
                "`columns`, `form` and `ignore` are for a `path` or `hub`: the testbed's pairs have one form"
            )
        return self


class DataSpec(PairsConfig):
    """The pairs, and their lengths in tokens of either model."""

    train: Source
    """The pairs to train on."""
    eval: Source | None = None
    """Pairs for the evaluation loss; left out, none is computed."""


class EvaluationSpec(Config):
    """The suite and its protocol."""

    suite: Text
    """A shipped suite (`testbed`, `card`, `paper`), or the path of a YAML file."""
    limit: PositiveInt | None = None
    """Number of documents of each task to evaluate; results are then partial. Default: all."""
    batch_size: PositiveInt = 8
    """Requests in one forward pass."""
    chat_template: bool = False
    """Render requests with the tokenizer's chat template."""
    data_root: Text | None = None
    """A folder that mirrors the hub, for machines without a network; `testbed` for the testbed's own documents."""
    backend: Literal["hf", "vllm"] = "hf"
    """What computes all scores of a comparison: transformers, or vLLM where it is installed, which batches by itself."""
    precision: Precision | None = None
    """Number format in which models are evaluated; left out, `shared.precision`. A record calls it `dtype`."""
    allow_code: tuple[Text, ...] = ()
    """Tasks of the suite that may run code: functions of the user's own task folder, or code that a model generates."""


class Shared(Config):
    """Everything that is identical for all runs of a comparison."""

    teacher: ModelSpec
    """The teacher, with its SFT model (the reference) and its contrastive pair."""
    student: ModelSpec
    """The student, which every run trains."""
    data: DataSpec
    """The pairs and their lengths."""
    train: Schedule
    """How every run is trained."""
    evaluation: EvaluationSpec
    """How every model is evaluated."""
    seeds: Annotated[tuple[Seed, ...], MinLen(1), AfterValidator(_is_unique)] = (0,)
    """Every run is trained once with each of these seeds."""
    precision: Precision = "float32"
    """Number format of the computation; weights in training are float32."""
    testbed: WorldConfig | None = None
    """The testbed's synthetic data; needed if a model or the pairs come from it."""

    @model_validator(mode="after")
    def _reasoning_has_an_end(self) -> Self:
        for role, model in (("teacher", self.teacher), ("student", self.student)):
            thinks = model.template_variables.get("enable_thinking") is True
            if thinks and model.think_end_token is None and self.evaluation.chat_template:
                raise ValueError(
                    f"the {role}'s `enable_thinking: true` needs its `think_end_token`, such as </think>: its reasoning would "
                    "be scored as the answer"
                )
        return self


Space = Mapping[str, Annotated[tuple[Number, ...], MinLen(1)]]
"""Parameter -> the values that are tried."""


class TuneSpec(Config):
    """Hyper-parameter search: every run is trained at the same number of points of its own space, and the best is chosen."""

    trials: Annotated[int, Ge(2)]
    """Trials of each run; a run whose space has fewer points gets them all, and the tables say so."""
    seeds: Annotated[
        tuple[Seed, ...], AfterValidator(_is_unique), AfterValidator(_are_two), Field(json_schema_extra={"minItems": 2})
    ] = (1000, 1001)
    """Each trial is trained with each of these seeds; at least two, and none of `shared.seeds`."""
    suite: Text
    """The suite of development documents that a trial is evaluated on, with the protocol of `shared.evaluation`; none of its tasks may be in the suite of the study."""
    limit: PositiveInt | None = None
    """Number of development documents of each task; the flag `--limit` does not change it. Default: all."""
    space: Space
    """Values to try: of `learning_rate`, and, in the place of the methods' own values, of parameters that they declare to be tuned. One value fixes a parameter."""


class RunSpec(Config):
    """One method with its parameters."""

    method: Text
    """The method's name."""
    params: Mapping[str, Any] = Field(default_factory=dict)
    """Parameters of the method that define the run; the others have the method's defaults."""
    tuned: Mapping[str, Number] = Field(default_factory=dict)
    """Parameters chosen on development documents, `learning_rate` included. A recipe with `tune` chooses them itself."""
    tune: bool = True
    """In a recipe with `tune`: false leaves the run out of it; it has `tuned` instead."""
    space: Space = Field(default_factory=dict)
    """In a recipe with `tune`: values to try for this run, in addition to those of `tune.space` or in their place; any numeric parameter of the method."""


class AblationSpec(Config):
    """The run `base` with one parameter varied."""

    base: Text
    """The name of a run."""
    field: Text
    """The parameter that is varied: one of the method's, or `learning_rate`. The base may give it in `params` or `tuned`."""
    values: Annotated[Mapping[str, Any], MinLen(1)]
    """Row label -> value of the parameter."""
    tune: bool = False
    """In a recipe with `tune`: true gives each row trials of its own; default: the values chosen for the base."""


class TableEntry(Config):
    """A table: named rows, or the rows of an ablation."""

    caption: str
    """Shown above the table."""
    rows: tuple[Text, ...] = ()
    """Names of runs and of untrained rows. Either this or `ablation`."""
    ablation: Text | None = None
    """The ablation whose rows are shown."""
    base: Text | None = None
    """The row to which differences are taken; left out, none are shown."""
    note: str | None = None
    """Shown below the table."""
    published: Text | None = None
    """A published table to show beside this one, labelled as such."""


class LaunchSpec(Config):
    """How a recipe is meant to be executed; not part of any key."""

    num_processes: PositiveInt = 1
    """Processes, one for each GPU."""
    fsdp: FsdpSpec | None = None
    """FSDP: shard the trained model over the processes; default: DDP, each process holds the whole model."""


class Recipe(Config):
    """One experiment."""

    name: Text
    """The experiment's name, as in the title of its report."""
    about: str
    """What it shows, in a sentence."""
    shared: Shared
    """Everything that is identical for all runs."""
    untrained: Mapping[str, Literal["teacher", "student"]] = Field(default_factory=dict)
    """Rows without a training of their own: name -> the teacher or the student as they are after SFT."""
    runs: Mapping[str, RunSpec]
    """The rows that are trained: name -> method and parameters."""
    tune: TuneSpec | None = None
    """Hyper-parameter search before the runs: the same number of trials for each, on development documents."""
    ablations: Mapping[str, AblationSpec] = Field(default_factory=dict)
    """Runs with one parameter varied, as rows of a separate table."""
    tables: Annotated[Mapping[str, TableEntry], MinLen(1)]
    """The tables of the report: name -> rows."""
    launch: LaunchSpec = Field(default_factory=LaunchSpec)
    """How the recipe is meant to be executed; not part of any key."""


def ablation_run(ablation: str, label: str) -> str:
    """The name of the run that shows one value of an ablation."""
    return f"{ablation}: {label}"
