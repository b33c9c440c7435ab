"""Export a trained model as a directory that transformers or PEFT can load."""

import json
import shutil
from pathlib import Path

from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.pipeline.references import MODEL_FOLDER
from ctpd.pipeline.stages.train import CHAIN


def export_model(store: Store, key: str, *, to: Path, merge: bool) -> str:
    """Copy a model out of the store; return a sentence that says what was written.

    Args:
        key: the beginning of the key of a `train` or `pretrain` artifact.
        to: a directory that does not exist yet.
        merge: merge LoRA adapters into the base weights; otherwise only the last adapter is written.

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
    chain_file = folder / CHAIN  # only an adapter has one: its base model, the adapters before it and its tokenizer
    if not chain_file.exists() or not merge:
        shutil.copytree(model, to)
        if chain_file.exists():
            return f"Wrote the adapter to {to}. Use --merge to merge it into the base model."
        return f"Wrote the model to {to}." + (" It has no adapters: there was nothing to merge." if merge else "")
    from ctpd.models import load_model, load_tokenizer, save_model
    from ctpd.saving import save_tokenizer

    chain = json.loads(chain_file.read_text(encoding="utf-8"))
    adapters = [_resolve(store, name, revision=None) for name in chain["adapters"]]
    merged = load_model(
        _resolve(store, chain["base"], revision=chain["revision"]),
        adapters=[*adapters, model],
        precision="float32",
        device="cpu",
        revision=chain["revision"],
    )
    save_model(merged, to)
    tokenizer = _resolve(store, chain["tokenizer"], revision=chain["tokenizer_revision"])
    save_tokenizer(load_tokenizer(tokenizer, revision=chain["tokenizer_revision"]), to)
    return f"Wrote the merged model to {to}."


def _resolve(store: Store, name: str, *, revision: str | None) -> Path:
    """The folder or hub id of one part of a model; `store:STAGE/KEY` names an artifact of this store.

    Raises:
        UserError: the path no longer exists.
    """
    if name.startswith("store:"):
        stage, _, key = name.removeprefix("store:").partition("/")
        return store.open(stage, key) / MODEL_FOLDER
    if revision is None and not Path(name).is_dir():
        raise UserError(
            f"the adapter was trained on the model in '{name}', and this directory does not exist",
            fix="Put the model back there, or export the adapter alone, without --merge",
        )
    return Path(name)
