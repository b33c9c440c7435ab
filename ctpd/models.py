"""The only module that loads `transformers` models and tokenizers, and the scorer installed in a model's own `forward`.

Shape legend: R rows of a batch, T tokens of the longest row, N scored tokens, H hidden size, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ctpd.adapters import check_adapter, outside_language_part, quiet_peft, refuse_tied
from ctpd.checkpoints import dropout_as_given, find_file, first_line, four_bits, load_checkpoint, load_config, loading
from ctpd.core.errors import UserError, listed
from ctpd.core.temporary import temporary_folder
from ctpd.core.userfiles import exists, user_path
from ctpd.ops.finite import refuse_non_finite_weights
from ctpd.ops.logit_rows import Head, LogitRows, is_sharded
from ctpd.ops.shared_rows import PackedLayout
from ctpd.ops.tiles import LogitTransform

_TOKENIZER = "tokenizer.json"
_CONVERTED = (
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
)  # read by classes that have other names for their files
_COPY = f"Copy all files of the model's tokenizer into its directory, {_TOKENIZER} above all"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Outputs(NamedTuple):
    """What one forward pass gives to the callable that is passed as ``score``.

    Attributes:
        every: the rows of logits of all R * T positions, computed tile by tile on demand.
        embed: token ids -> input embeddings, without gradient.
    """

    every: LogitRows
    embed: Callable[[Tensor], Tensor]


class Score(NamedTuple):
    """Which tokens to score: `predictors[n]` is the flat index (row * T + position) of what predicts `targets[n]`."""

    predictors: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]

    def __call__(self, outputs: Outputs) -> Float[Tensor, " N"]:
        """Their log-probabilities.

        Raises:
            UserError: a target is no column of the logits (on a CPU; on another device the kernel fails).
        """
        outputs.every.head.check(self.targets)
        return outputs.every.select(self.predictors).logps(self.targets)


class _Scoring:
    """Mixed into a loaded model's class: `forward(input_ids, score=use)` returns `use(outputs)`, not logits.

    The loss is computed inside `forward` so that the hooks of PEFT, accelerate and FSDP apply to it: FSDP gathers the
    sharded weights for that time.
    """

    def forward(self, *args: Any, score: Callable[[Outputs], Any] | None = None, **kwargs: Any) -> Any:
        if score is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        kwargs.pop("return_dict", None)
        model: Any = self
        embed = _constant_embeddings(model)
        if model._scorer_uses_logits:
            logits_RTV = super().forward(*args, **kwargs, use_cache=False).logits  # type: ignore[misc]
            identity = Head(nn.Identity(), logits_RTV.shape[-1])
            return score(Outputs(LogitRows(logits_RTV.flatten(0, 1), identity), embed))
        hidden_RTH = model.get_decoder()(*args, **kwargs, use_cache=False).last_hidden_state
        embeddings = model.get_output_embeddings()
        if is_sharded(embeddings):
            embeddings.unshard()  # its weight is read and its forward never called, so no hook gathers it
        head = Head(embeddings, model.config.get_text_config().vocab_size, _logit_transform(model.config))
        return score(Outputs(LogitRows(hidden_RTH.flatten(0, 1), head), embed))


def _constant_embeddings(model: Any) -> Callable[[Tensor], Tensor]:
    def embed(ids: Tensor) -> Tensor:
        with torch.no_grad():
            embeddings: Tensor = model.get_input_embeddings()(ids)
        return embeddings

    return embed


def _logit_transform(config: Any) -> LogitTransform:
    text = config.get_text_config()
    scale = 1.0
    if getattr(text, "logit_scale", None):
        scale *= text.logit_scale
    if getattr(text, "lm_head_multiplier", None):
        scale *= text.lm_head_multiplier
    if getattr(text, "logits_scaling", None):
        scale /= text.logits_scaling
    return LogitTransform(scale=scale, softcap=getattr(text, "final_logit_softcapping", None))


def install_scorer(model: PreTrainedModel) -> PreTrainedModel:
    """Give ``model.forward`` the keyword ``score``. Only the class is swapped: hooks, copies and saving stay as they are."""
    instance: Any = model
    cls = type(model)
    if not issubclass(cls, _Scoring):
        instance.__class__ = type(cls.__name__, (_Scoring, cls), {"__module__": cls.__module__})
    instance._scorer_uses_logits = False
    return model


def score(
    model: nn.Module, input_ids: Int[Tensor, "R T"], request: Score, *, layout: PackedLayout | None = None
) -> Float[Tensor, " N"]:
    """Log-probabilities of the requested tokens, float32, without a `[R, T, V]` tensor.

    Rows are padded on the right, where a causal model's earlier positions cannot look; so no attention mask is needed.

    Args:
        model: with the scorer installed.
        input_ids: the rows; packed sequences [P, W] with a ``layout``.
        request: predictors (flat indices into ``input_ids``) and targets.
        layout: where the rows of pairs with a common prompt are in packed sequences; the model must have been prepared
            by `ctpd.train.sharing.enable_prompt_sharing`.
    """
    logps_N: Tensor = model(input_ids=input_ids, score=request, **packed_arguments(layout, input_ids))
    return logps_N


def packed_arguments(layout: PackedLayout | None, input_ids: Int[Tensor, "R T"]) -> dict[str, Any]:
    """The further arguments of a model's `forward` for packed sequences; none for one sequence a row."""
    if layout is None:
        return {}
    # A four-dimensional mask is passed on to attention unchanged, and our attention function ignores it.
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return {"position_ids": layout.positions, "attention_mask": unused, "packed_layout": layout}


def load_tokenizer(folder: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer that has a token for padding or for the end of a text.

    Args:
        folder: a directory with the tokenizer's files, or a hub id.
        revision: the pinned revision of a hub id.

    Raises:
        UserError: there is none, or only a slow one, which has no character offsets.
    """
    tokenizer = _fast_tokenizer(folder, revision=revision, where=str(folder), fix=_COPY)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token", where=str(folder), fix="Set `eos_token` in its files")
    return tokenizer


def generation_end(folder: str | Path, *, revision: str | None = None) -> int | None:
    """The first `eos_token_id` of a model's `generation_config`; None if it says none.

    Args:
        folder: a directory, or a hub id.
        revision: the pinned revision of a hub id.
    """
    path = find_file(str(folder), GENERATION_CONFIG_NAME, revision=revision, local=False)
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the file is no configuration ({first_line(error)})", where=path, fix="Copy the model's files again"
        ) from error
    if isinstance(found, list):
        found = next(iter(found), None)
    return found if isinstance(found, int) else None


def find_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer that a user names: a folder, a `tokenizer.json`, or a hub id with `@revision` or without.

    Raises:
        UserError: there is none, or only a slow one.
    """
    path = user_path(location)
    fix = "Give a folder with a tokenizer.json, such a file, or a hub id, `name@revision` to pin it"
    if exists(path) and path.is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)))
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise UserError(f"the file is no tokenizer.json ({first_line(error)})", where=location, fix=fix) from error
    name, _, revision = (str(path), "", "") if exists(path) else location.partition("@")
    return _fast_tokenizer(name, revision=revision or None, where=location, fix=fix)


def _fast_tokenizer(
    folder: str | Path, *, revision: str | None, where: str, fix: str | None
) -> PreTrainedTokenizerBase:
    with loading("tokenizer", where, fix=fix):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), revision=revision, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is a slow one, which has no character offsets", where=where, fix=fix)
    _refuse_empty(tokenizer, str(folder), revision=revision, where=where)
    return tokenizer


def _refuse_empty(tokenizer: Any, folder: str, *, revision: str | None, where: str) -> None:
    """Refuse a tokenizer without a vocabulary, which transformers makes for some classes where the files are missing.

    Such a one gives no tokens, or the unknown token for any text.
    """
    names: dict[str, str] = tokenizer.vocab_files_names

    def is_there(name: str) -> bool:
        return find_file(folder, name, revision=revision, local=True) is not None

    whole = names.get("tokenizer_file", _TOKENIZER)
    parts = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
    missing = [] if any(map(is_there, (whole, *_CONVERTED))) else [name for name in parts if not is_there(name)]
    if not missing and len(tokenizer) > len(tokenizer.added_tokens_decoder):
        return
    absent = [] if is_there(whole) else [whole, *missing]
    raise UserError(
        f"the tokenizer has no vocabulary{f': there is no file named {listed(absent)}' if absent else ''}",
        where=where,
        fix=_COPY,
    )


def load_model(
    folder: str | Path, *, adapters: Sequence[Path] = (), precision: str, device: str, revision: str | None = None
) -> PreTrainedModel:
    """Load a causal language model, merge its adapters in order, switch dropout off, install the scorer.

    Args:
        folder: a model directory or a hub id.
        adapters: LoRA adapter directories, each on the model that the ones before it give.
        precision: of the weights: `float32`, `bfloat16`, or `4bit` (NF4, of the merged weights in bfloat16).
        device: torch device.
        revision: the pinned revision of a hub id.

    Raises:
        UserError: the directory does not exist or holds no causal language model, weights are missing or not in
            safetensors files, or it needs code of its own; 4 bits without bitsandbytes.
        NotFinite: a weight is NaN or infinite.
    """
    if precision == "4bit" and adapters:
        with temporary_folder("merged") as merged:
            whole = load_model(folder, adapters=adapters, precision="bfloat16", device="cpu", revision=revision)
            save_model(whole, Path(merged))
            return load_model(merged, precision=precision, device=device)
    options = four_bits(device) if precision == "4bit" else {"dtype": DTYPES[precision]}
    model = load_checkpoint(str(folder), revision=revision, options=options)
    for adapter in adapters:
        model = _merged(model, adapter)
    if precision != "4bit":  # `device_map` has put those on the device, and they cannot be moved
        move: Any = model.to  # transformers' wrapper hides the signature of `nn.Module.to`
        move(device)
    refuse_non_finite_weights(model, where=str(adapters[-1] if adapters else folder))
    model.eval()
    install_scorer(model)
    return model


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    with loading("adapter", str(adapter), fix="Give a LoRA adapter that was trained on this model"), quiet_peft():
        adapted = PeftModel.from_pretrained(model, str(adapter))
        check_adapter(adapted, adapter)
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def model_sizes(folder: str | Path, *, revision: str | None = None) -> tuple[int, int]:
    """(columns of the logits, hidden size) of a model, from its configuration alone."""
    config = load_config(str(folder), revision=revision).get_text_config()
    return config.vocab_size, config.hidden_size


def add_lora(model: PreTrainedModel, *, r: int, alpha: int, targets: str | Sequence[str], seed: int) -> PeftModel:
    """Freeze ``model`` and put adapters on its linear layers; their initial weights depend on ``seed`` alone.

    Of a multimodal model the language part alone gets adapters.

    Raises:
        UserError: no layer has a name among ``targets``, or one is tied to another weight.
    """
    torch.manual_seed(seed)
    modules = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules,
        exclude_modules=outside_language_part(model),
        task_type="CAUSAL_LM",
    )
    with loading("adapter", f"`lora.targets: {targets}`", fix="Name other layers of the model in `lora.targets`"):
        with quiet_peft():
            adapted = get_peft_model(model, config)
        refuse_tied(adapted)
    return adapted


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The full weights of a model that FSDP has sharded; None if it is not sharded.

    A collective call: every rank must make it; only rank 0's result is filled.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {
        name: value for name, value in state.items() if name in own and isinstance(value, Tensor)
    }  # tied weights once


def save_model(model: nn.Module, folder: Path, *, state: dict[str, Tensor] | None = None) -> None:
    """Write a model, or only its adapter, as a transformers or PEFT directory without anything of this machine.

    Args:
        state: the result of `whole_state`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # PEFT writes a set
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    else:
        library_model: Any = model
        library_model.config.use_cache = True
        with dropout_as_given(model):
            library_model.save_pretrained(str(folder), state_dict=state)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, tied ones once."""
    # bitsandbytes packs two weights of 4 bits into a byte, and remembers their shape.
    shapes = [(getattr(p, "quant_state", None) or p, p.requires_grad) for p in model.parameters()]
    sizes = [(math.prod(weight.shape), trains) for weight, trains in shapes]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def weight_mebibytes(model: nn.Module) -> float:
    """Memory of the weights in MiB."""
    return math.fsum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
