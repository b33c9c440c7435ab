"""A trained model as a plain directory that transformers, PEFT and everybody else load."""

import json
import shutil
from pathlib import Path

from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.pipeline.references import MODEL_FOLDER
from ctpd.pipeline.stages.train import CHAIN


def export_model(store: Store, key: str, *, to: Path, merge: bool) -> str:
    """Copy a model out of the store; say what was written.

    Args:
        key: the beginning of a key of a `train` or `pretrain` artifact.
        to: a directory that does not exist yet.
        merge: write whole weights for a LoRA training; without it the adapter alone is written.

    Raises:
        UserError: no such artifact, one without a model, or `to` exists.
    """
    artifact = store.find(key)
    folder = store.verify(artifact.stage, artifact.key)
    model = folder / MODEL_FOLDER
    if not model.is_dir():
        raise UserError(
            f"the artifact {artifact.stage}/{artifact.key[:12]} holds no model", fix="Give the key of a training"
        )
    if to.exists():
        raise UserError(f"the directory '{to}' exists already", fix="Give a new one")
    chain_file = folder / CHAIN  # an adapter's: where its base, the adapters below it and its tokenizer are
    if not chain_file.exists() or not merge:
        shutil.copytree(model, to)
        kind = "adapter" if chain_file.exists() else "model"
        return f"Wrote the {kind} to {to}." + (" Use --merge for whole weights." if kind == "adapter" else "")
    from ctpd.models import load_model, load_tokenizer, save_model

    chain = json.loads(chain_file.read_text(encoding="utf-8"))
    adapters = [_resolve(store, name) for name in chain["adapters"]]
    merged = load_model(
        _resolve(store, chain["base"]),
        adapters=[*adapters, model],
        precision="float32",
        device="cpu",
        revision=chain["revision"],
    )
    save_model(merged, to)
    load_tokenizer(_resolve(store, chain["tokenizer"]), revision=chain["tokenizer_revision"]).save_pretrained(str(to))
    return f"Wrote the merged model to {to}."


def _resolve(store: Store, name: str) -> Path:
    """`store:STAGE/KEY` is an artifact of this store; anything else a path or hub id."""
    if not name.startswith("store:"):
        return Path(name)
    stage, _, key = name.removeprefix("store:").partition("/")
    return store.open(stage, key) / MODEL_FOLDER
