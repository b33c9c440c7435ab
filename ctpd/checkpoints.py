"""Checkpoints as transformers loads them: only weights from safetensors files, all of them, and no code of their own.

A multimodal checkpoint is loaded whole; its language part alone can be trained.
"""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForMultimodalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from ctpd.core.errors import CtpdError, UserError, listed
from ctpd.core.printing import printable

disable_progress_bar()  # the pipeline shows its own

_DROPOUT = "_dropout_of_checkpoint"
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
)
_GIVE = "Give a directory with config.json and safetensors weights, or a hub id with its revision"


def load_checkpoint(folder: str, *, revision: str | None, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint, with all of its weights and without dropout; only its language part can be trained.

    Args:
        folder: a directory or a hub id.
        revision: the pinned revision of a hub id.
        options: of `from_pretrained`: dtype, or a quantization.

    Raises:
        UserError: there is no causal language model of transformers' own, one of its weights is missing, or a library
            that its weights need is not there.
    """
    with loading("causal language model", folder, fix=_GIVE):
        config = load_config(folder, revision=revision)
        check_quantization(config)
        dropout = _without_dropout(config)
        loaded: Any = model_class(config).from_pretrained(
            folder,
            config=config,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by their names
            **options,
        )
    model: PreTrainedModel
    model, found = loaded  # with `output_loading_info` the library returns both
    check_weights(found, where=folder)
    setattr(model, _DROPOUT, dropout)
    if (parts := language_part(model)) is not None:
        model.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)
    return model


class Skeleton(NamedTuple):
    """The model of a checkpoint without its weights: on torch's meta device, where a weight has a shape and no values.

    Attributes:
        model: of the class that the checkpoint is loaded as.
        found: what the library says of names and shapes of the weights, as `check_weights` reads it; None where no
            headers are to be had, or the weights are quantized.
    """

    model: PreTrainedModel
    found: Mapping[str, Any] | None


def load_skeleton(
    folder: str, *, revision: str | None, local: bool = False, needs_weights: bool = True
) -> Skeleton | None:
    """What configuration, index and headers of a checkpoint say; reads no weight.

    Args:
        folder: a directory or a hub id.
        revision: the pinned revision of a hub id.
        local: read of the hub only what its cache holds.
        needs_weights: refuse a directory without any file of weights; else its configuration is enough.

    Returns:
        None for a hub id whose configuration cannot be had now.

    Raises:
        UserError: as `load_checkpoint`, but for missing weights.
    """
    if revision is not None and find_file(folder, "config.json", revision=revision, local=local) is None:
        return None
    with loading("causal language model", folder, fix=_GIVE):
        config = load_config(folder, revision=revision, local_files_only=local)
        check_quantization(config)
        read = not quantization(config) and (needs_weights or holds_weights(folder))
        tensors = _headers(folder, revision=revision) if read else None
        made: Any = model_class(config)
        if tensors is None:
            with torch.device("meta"):
                return Skeleton(made.from_config(config), None)
        kind = made._model_mapping[type(config)]
        # The library's own conversions and comparisons, on weights that have no values.
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return Skeleton(model, found)


def _headers(folder: str, *, revision: str | None) -> dict[str, torch.Tensor] | None:
    """Name and shape of every weight in the safetensors files, as meta tensors; None if a file is not on this machine."""
    index, whole = (
        find_file(folder, name, revision=revision, local=True) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    names = {SAFE_WEIGHTS_NAME}
    if whole is None and index is not None:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    files = {name: find_file(folder, name, revision=revision, local=True) for name in sorted(names)}
    if None in files.values():
        if revision is not None:
            return None
        missing = [name for name, path in files.items() if path is None]
        raise OSError(f"there is no file named {listed(missing)}")
    tensors = {}
    for path in files.values():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
    return tensors


def holds_weights(folder: str) -> bool:
    """Whether a directory has weights in any format; of a hub model, which has no directory here, it is assumed."""
    path = Path(folder)
    return not path.is_dir() or any(file.name.endswith(_WEIGHTS) for file in path.iterdir())


def find_file(folder: str, name: str, *, revision: str | None, local: bool) -> str | None:
    """The path of a checkpoint's file; None if there is none, or the hub cannot be reached."""
    found: str | None = cached_file(
        folder,
        name,
        revision=revision,
        local_files_only=local,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def load_config(folder: str, *, revision: str | None, **options: Any) -> Any:
    """The configuration of a checkpoint.

    Args:
        folder: a directory or a hub id.
        revision: the pinned revision of a hub id.
        options: of `from_pretrained`.
    """
    return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False, **options)


def model_class(config: Any) -> Any:
    """The automatic class that loads a checkpoint whole: a multimodal one as it was saved, others as a language model."""
    text_alone = config.get_text_config() is config or config.is_encoder_decoder
    if not text_alone and type(config) in AutoModelForMultimodalLM._model_mapping:
        whole: Any = AutoModelForMultimodalLM._model_mapping[type(config)]
        if whole.__name__ in (config.architectures or [whole.__name__]):
            return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def language_part(model: nn.Module) -> list[nn.Module] | None:
    """The modules of a multimodal model that read and write text; None for a model of text alone.

    Raises:
        UserError: the model does not say which they are.
    """
    whole: Any = model
    if whole.config.get_text_config() is whole.config:
        return None
    decoder = whole.get_decoder()
    if decoder in (whole, whole.base_model):
        raise UserError(
            f"{type(model).__name__} does not say which of its parts is the language model",
            fix="Use a checkpoint of the language model alone",
        )
    return [decoder, whole.get_input_embeddings(), whole.get_output_embeddings()]


@contextlib.contextmanager
def loading(what: str, where: str, *, fix: str | None) -> Iterator[None]:
    """Say in one paragraph what a library raises while it loads something, with the library's own words.

    Args:
        what: "causal language model", "adapter" or "tokenizer".
        where: its directory or hub id.
        fix: how to mend it, where the library's words do not say.

    Raises:
        UserError: the library raised an error; running out of memory and errors of ours pass.
    """
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # its reports of missing weights become one sentence of ours
    try:
        yield
    except (CtpdError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(
            f"the {what} needs a package that is not there ({first_line(error)})", where=where, fix=_INSTALL
        ) from error
    except Exception as error:  # of any of the libraries, each of which has its own
        if asks_for_code(error):
            raise custom_code(what, where) from error
        raise UserError(f"no {what} could be loaded ({first_line(error)})", where=where, fix=fix) from error
    finally:
        logging.set_verbosity(said)


_INSTALL = "Install it into the environment of ctpd, or give the checkpoint with weights that are not quantized"


def quantization(config: Any) -> Any:
    """The `quantization_config` of a checkpoint whose weights are quantized; None if they are not."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )


def check_quantization(config: Any) -> None:
    """Ask the library whether it can read a checkpoint's quantized weights here; reads none.

    Raises:
        ImportError: a package is missing; the library's words name it.
        ValueError: the library does not know the kind of quantization.
    """
    given = quantization(config)
    if given is None:
        return
    given = given if isinstance(given, dict) else given.to_dict()
    if not AutoHfQuantizer.supports_quant_method(given):  # the library would read the weights as if not quantized
        raise ValueError(f"transformers does not know the quantization {given.get('quant_method')!r}")
    quantizer = AutoHfQuantizer.from_config(dict(given), pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True)


def asks_for_code(error: BaseException) -> bool:
    """Whether a library refused to load something because it comes with Python code of its own."""
    return "custom code" in str(error) or "remote_code" in str(error)


def custom_code(what: str, where: str) -> UserError:
    """The error for a model or tokenizer with code of its own."""
    return UserError(
        f"the {what} comes with Python code of its own (`auto_map` in its configuration), and ctpd runs no such code",
        where=where,
        fix="Use a model whose class is part of transformers",
    )


def check_weights(found: Mapping[str, Any], *, where: str, what: str = "checkpoint") -> None:
    """Refuse a checkpoint that leaves weights of its model unset: the library would draw them at random.

    Args:
        found: what `from_pretrained` says of its loading.
        where: the checkpoint.
        what: "checkpoint" or "adapter".

    Raises:
        UserError: weights are missing, or have another shape than the model's.
    """
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise UserError(
            f"the {what} lacks {len(missing)} of the model's weights, or has them in another shape: {_some(missing)}",
            where=where,
            fix=f"Bring the whole {what}; with a missing weight every load would give another model",
        )
    if unexpected := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{where}: the {what} holds weights that the model does not use: {_some(unexpected)}", stacklevel=3
        )


def _some(names: Sequence[str], *, most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(map(printable, names[:most])) + (f" and {more} more" if more > 0 else "")


def four_bits(device: str) -> dict[str, Any]:
    """How the library loads weights as QLoRA has them (Dettmers et al. 2023)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "`lora.base: 4bit` needs bitsandbytes, which is not installed",
            fix="Install it, `pip install 'ctpd[quantization]'`, or take `base: bfloat16`",
        )
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"dtype": torch.bfloat16, "quantization_config": quantized, "device_map": {"": device}}


def _without_dropout(config: Any) -> dict[str, dict[str, float]]:
    """Switch dropout off in a configuration; what was switched off in the whole and in its text part."""
    found = {}
    for part, values in _parts(config).items():
        names = {name for name in vars(values) if name.endswith(("dropout", "pdrop"))}
        found[part] = {n: v for n in sorted(names) if isinstance(v := getattr(values, n), float) and v > 0}
    for part, given in found.items():
        for name in given:
            setattr(_parts(config)[part], name, 0.0)
    return found


def _parts(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {"": config} if text is config else {"": config, "text": text}


@contextlib.contextmanager
def dropout_as_given(model: nn.Module) -> Iterator[None]:
    """The configuration with the dropout of its checkpoint, for as long as the model is saved."""
    whole: Any = model
    given: dict[str, dict[str, float]] = getattr(model, _DROPOUT, {})
    changed = [(_parts(whole.config)[part], name, value) for part in given for name, value in given[part].items()]
    try:
        for values, name, value in changed:
            setattr(values, name, value)
        yield
    finally:
        for values, name, _ in changed:
            setattr(values, name, 0.0)


def first_line(error: BaseException) -> str:
    """What a library said, for a message of one paragraph: the first line, or the next after one that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[1]}"
    return f"{type(error).__name__}: {said[:300]}" if isinstance(error, LookupError) else said[:300]
