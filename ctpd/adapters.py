"""LoRA adapters as PEFT makes and reads them: where they may be, and whether a file holds all of one."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from ctpd.checkpoints import check_weights, language_part
from ctpd.core.errors import UserError, listed

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings about what is checked here in its stead."""
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 renamed; the warning is theirs and changes nothing.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # `check_adapter` refuses them
        # Settings for experts, which PEFT writes itself, and no layer that `all-linear` means is one.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `refuse_tied` does
        yield


def outside_language_part(model: PreTrainedModel) -> str | None:
    """A pattern of the modules of a multimodal model that get no adapter; None where it is text alone."""
    parts = language_part(model)
    if parts is None:
        return None
    inside = "|".join(re.escape(name) for name, module in model.named_modules() if any(module is p for p in parts))
    return rf"(?!(?:{inside})(?:\.|$)).*"


def refuse_tied(adapted: PeftModel) -> None:
    """Refuse an adapter on a weight that two modules share: it would act in one of them, and be merged into both.

    Raises:
        UserError: it is on the input or the output embedding, and these are tied.
    """
    model: Any = adapted.get_base_model()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if ends[1] is None or getattr(ends[0], "weight", None) is not getattr(ends[1], "weight", None):
        return
    names = [name for name, module in model.named_modules() if module in ends and isinstance(module, BaseTunerLayer)]
    if names:
        raise UserError(
            f"the adapter has {listed(names)} for a target, whose weight is both the input and the output embedding of "
            "this model (`tie_word_embeddings`): trained, the adapter would act in one of the two, and merged in both",
            fix="Leave it out of `lora.targets` (`all-linear` does), or train all weights",
        )


def check_adapter(adapted: PeftModel, folder: Path) -> None:
    """Compare the names and shapes in an adapter's file with those that its configuration asks for.

    Args:
        adapted: the model with the adapter, whatever its weights are.
        folder: the adapter's directory.

    Raises:
        UserError: weights are missing, which PEFT would draw at random; the file is no safetensors file; the adapter is
            on a weight that is tied to another.
    """
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name: tuple(weight.shape) for name, weight in state.items()}
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    report = {
        "missing_keys": wanted.keys() - found.keys(),
        "mismatched_keys": [(name,) for name in wanted.keys() & found.keys() if wanted[name] != found[name]],
        "unexpected_keys": found.keys() - wanted.keys() - adapted.state_dict().keys(),  # a whole embedding may be there
    }
    check_weights(report, where=str(folder), what="adapter")
    refuse_tied(adapted)
