"""Export a trained model as a directory that transformers or PEFT can load."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctpd.core.errors import UserError, listed
from ctpd.core.store import Artifact, Store
from ctpd.pipeline.references import ADAPTER_CONFIG, MODEL_FOLDER, cached_digest
from ctpd.pipeline.stages.train import CHAIN

SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BASE = "base"  # in the export of an adapter with its base
ADAPTER_WEIGHTS, GENERATION_CONFIG = "adapter_model.safetensors", "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class ExportForm:
    """In which form a model is exported.

    Attributes:
        merge: whole weights for a LoRA training, the adapter merged into them.
        with_base: of a LoRA training the adapter, with the model that it belongs to in a folder of its own beside it.
        dtype: of the weights; None leaves them as they were trained.
    """

    merge: bool = False
    with_base: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None


def export_model(store: Store, key: str, *, to: Path, form: ExportForm) -> str:
    """Copy a model out of the store, with its tokenizer and the template it was trained with; say what was written.

    Args:
        key: the beginning of the key of a `train` or `pretrain` artifact.
        to: a directory that does not exist yet.
        form: whole weights or an adapter, and their number format.

    Raises:
        UserError: no such artifact, one without a model, `to` exists, or an adapter whose base is in no directory.
    """
    artifact = store.find(key)
    folder = store.verify(artifact.stage, artifact.key)
    if not (folder / MODEL_FOLDER).is_dir():
        raise UserError(
            f"the artifact {artifact.stage}/{artifact.key[:12]} holds no model", fix="Give the key of a training"
        )
    if to.exists():
        raise UserError(f"the directory '{to}' exists already", fix="Give a new one")
    chain_file = folder / CHAIN  # only an adapter has one: its base model, the adapters before it and its tokenizer
    if chain_file.exists():
        chain = json.loads(chain_file.read_text(encoding="utf-8"))
        said = _export_adapter(store, folder / MODEL_FOLDER, chain, to=to, form=form)
    else:
        said = _export_whole(folder / MODEL_FOLDER, to=to, form=form)
    return " ".join([said, *_write_template(store, artifact, to), *_join_end_tokens(store, artifact, to)])


def _export_whole(model: Path, *, to: Path, form: ExportForm) -> str:
    if form.dtype is None:
        shutil.copytree(model, to)
    else:
        from ctpd.models import load_model, load_tokenizer, save_model
        from ctpd.saving import copy_processor, save_tokenizer

        save_model(load_model(model, precision=form.dtype, device="cpu"), to)
        save_tokenizer(load_tokenizer(model), to)
        copy_processor(str(model), revision=None, to=to)
    whole = " Its weights are whole: there was nothing to merge, and no base." if form.merge or form.with_base else ""
    return f"Wrote the model to {to}.{whole}"


def _export_adapter(store: Store, adapter: Path, chain: Mapping[str, Any], *, to: Path, form: ExportForm) -> str:
    precision = form.dtype or "float32"
    if form.merge:
        _save_merged(store, chain, further=[adapter], to=to, precision=precision)
        said = f"Wrote the merged model to {to}."
    else:
        base = _base_of(store, chain, to=to, form=form)
        shutil.copytree(adapter, to)
        _name_base(to, base, revision=None if form.with_base else chain["revision"])
        if form.dtype is not None:
            _convert(to / ADAPTER_WEIGHTS, form.dtype)
        if form.with_base:
            _save_merged(store, chain, further=[], to=to / BASE, precision=precision)
            _save_tokenizer(store, chain, to / BASE)
        said = f"Wrote the adapter to {to}. Its base is {base}."
        if not form.with_base and chain["revision"] is None and not Path(base).is_dir():
            return f"{said} That directory does not exist here, and so the tokenizer was not brought."
    _save_tokenizer(store, chain, to)
    return said


def _save_tokenizer(store: Store, chain: Mapping[str, Any], to: Path) -> None:
    from ctpd.models import load_tokenizer
    from ctpd.saving import copy_processor, save_tokenizer

    revision = chain["tokenizer_revision"]
    folder = _resolve(store, chain["tokenizer"], chain, revision=revision)
    save_tokenizer(load_tokenizer(folder, revision=revision), to)
    copy_processor(str(folder), revision=revision, to=to)


def _base_of(store: Store, chain: Mapping[str, Any], *, to: Path, form: ExportForm) -> str:
    """Where PEFT finds the model that an adapter belongs to: an absolute path, or a hub id.

    Raises:
        UserError: it is a model with earlier adapters merged into it, which lies nowhere.
    """
    if form.with_base:
        return str((to / BASE).absolute())
    if chain["adapters"]:
        number = len(chain["adapters"])
        raise UserError(
            f"the adapter belongs to a model that is in no directory: to '{chain['base']}' with {number} earlier "
            f"adapter{'s' if number > 1 else ''} merged into it",
            fix="Give `--with-base`, which writes that model beside the adapter, or `--merge` for one whole model",
        )
    base = str(chain["base"])
    return str(_resolve(store, base, chain, revision=None).absolute()) if base.startswith("store:") else base


def _name_base(adapter: Path, base: str, *, revision: str | None) -> None:
    path = adapter / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _convert(weights: Path, dtype: str) -> None:
    """Write the tensors of a file in another number format."""
    from safetensors.torch import load_file, save_file

    from ctpd.models import DTYPES

    save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(weights).items()}, weights)


def _save_merged(store: Store, chain: Mapping[str, Any], *, further: list[Path], to: Path, precision: str) -> None:
    """Write the base of a chain with its adapters, and ``further`` ones, merged into it."""
    from ctpd.models import load_model, save_model

    adapters = [_resolve(store, name, chain, revision=None) for name in chain["adapters"]]
    base = _resolve(store, chain["base"], chain, revision=chain["revision"])
    merged: Any = load_model(
        base, adapters=[*adapters, *further], precision="float32", device="cpu", revision=chain["revision"]
    )
    if precision != "float32":  # merged in float32, and rounded once
        from ctpd.models import DTYPES

        merged = merged.to(DTYPES[precision])
    save_model(merged, to)


def _resolve(store: Store, name: str, chain: Mapping[str, Any], *, revision: str | None) -> Path:
    """The folder or hub id of one part of a model; `store:STAGE/KEY` names an artifact of this store.

    Raises:
        UserError: the path no longer exists, or its files are not those of the training.
    """
    if name.startswith("store:"):
        stage, _, key = name.removeprefix("store:").partition("/")
        return store.open(stage, key) / MODEL_FOLDER
    if revision is None and not Path(name).is_dir():
        raise UserError(
            f"the adapter was trained on the model in '{name}', and this directory does not exist",
            fix="Put the model back there, or export the adapter alone, without --merge and --with-base",
        )
    digest = chain.get("digests", {}).get(name)  # chains of older versions have none
    if digest is not None and cached_digest(Path(name)) != digest:
        raise UserError(
            f"the files in '{name}' are not those that the adapter was trained on",
            fix="Put those back there, or export the adapter alone, without --merge and --with-base",
        )
    return Path(name)


def _write_template(store: Store, artifact: Artifact, to: Path) -> list[str]:
    """Give the export's tokenizer the plain template that its model was trained with; what to say of it."""
    from ctpd.models import load_tokenizer
    from ctpd.saving import save_tokenizer
    from ctpd.text.jinja import chat_template
    from ctpd.text.render import PlainTemplate, TemplatedTokenizer

    plain = _plain_template(store, artifact)
    if plain is None or not (to / "tokenizer_config.json").is_file():
        return []
    tokenizer: Any = load_tokenizer(to)
    templated = TemplatedTokenizer(tokenizer, PlainTemplate(**plain), name="model")
    tokenizer.chat_template = chat_template(PlainTemplate(**plain), adds_bos=templated.adds_bos)
    if not _reads_alike(tokenizer, templated, has_system=plain.get("system") is not None):
        return ["The plain template of the recipe cannot be written as a chat template of this tokenizer."]
    for folder in (to, to / BASE):
        if folder.is_dir():
            save_tokenizer(tokenizer, folder)
    return ["`apply_chat_template` writes the plain template of the recipe."]


def _join_end_tokens(store: Store, artifact: Artifact, to: Path) -> list[str]:
    """Let the exported model stop where its training's responses end: `eos_token_id` of its `generation_config`.

    Settings of sampling stay as they are, unless they are invalid.
    """
    from transformers import GenerationConfig

    ends = _end_tokens(store, artifact)
    said = set()
    for path in (folder / GENERATION_CONFIG for folder in (to, to / BASE)):
        if not ends or not path.is_file():
            continue
        config = GenerationConfig.from_pretrained(path.parent)  # nosec B615 # a folder
        given = config.eos_token_id
        known = [] if given is None else [given] if isinstance(given, int) else list(given)
        if new := [end for end in ends if end not in known]:
            config.eos_token_id = [*known, *new]
            said.add(
                f"`eos_token_id` of its generation_config has {listed(new)} too, which ends its training's responses."
            )
            said |= set(_made_valid(config, where=str(path.parent)))
            config.save_pretrained(path.parent)
    return sorted(said)


def _made_valid(config: Any, *, where: str) -> Iterator[str]:
    """Correct settings of sampling that the library would not save; what to say of it.

    Without `do_sample` they are meant for sampling; beside `do_sample: false` they act nowhere.
    """
    if _is_valid(config):
        return
    if config.do_sample is None:
        config.do_sample = True
        yield "Its settings of sampling lacked `do_sample: true`, which was added."
    else:
        for name in SAMPLING:
            setattr(config, name, None)
        yield "Its settings of sampling beside `do_sample: false` were left out."
    if not _is_valid(config):
        raise UserError("the model's generation_config is not valid", where=where, fix="Correct it in the base model")


def _is_valid(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _end_tokens(store: Store, artifact: Artifact) -> list[int]:
    """The tokens with which the responses of a training end; none where its pairs are gone."""
    from ctpd.pipeline.rows import token_rows
    from ctpd.text.prepared_files import read_prepared

    try:
        identity = store.manifest(artifact.stage, artifact.key)["identity"]
        stage, _, key = identity["pairs"].partition("/")
        prepared = read_prepared(store.open(stage, key))
        rows = token_rows(prepared, identity["config"]["role"])
    except (UserError, LookupError, OSError):
        return []
    return sorted({int(token) for token in rows.input_ids[rows.row_starts[1:][prepared.has_end] - 1]})


def _plain_template(store: Store, artifact: Artifact) -> dict[str, str] | None:
    """The plain template of a training, from the manifests; None for a chat template, or where it is not known."""
    try:
        identity = store.manifest(artifact.stage, artifact.key)["identity"]
        stage, _, key = identity["pairs"].partition("/")
        template = store.manifest(stage, key)["identity"][identity["config"]["role"]]["template"]
    except (UserError, LookupError):
        return None
    from ctpd.recipe import PlainSpec

    return None if template == "chat" else PlainSpec.model_validate(template).model_dump()


def _reads_alike(tokenizer: Any, templated: Any, *, has_system: bool) -> bool:
    """Whether the tokenizer's chat template gives the tokens that were trained on, for a conversation with all roles."""
    from ctpd.text.pairs import Message

    prompt = [Message("user", "Where is it?"), Message("assistant", "Where?"), Message("user", "The  key, 1 of 2.\n")]
    prompt = [Message("system", "Be brief."), *prompt] if has_system else prompt
    response = "It is here."
    frames = templated.frames([prompt], where=["the export"])
    expected = templated.encode([(prompt, response)], frames=frames, where=["the export"]).ids.tolist()
    messages = [message._asdict() for message in [*prompt, Message("assistant", response)]]
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    opening = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    num_prompt = int(templated.prompt_tokens(frames)[0])
    alone = tokenizer(frames[0].before, add_special_tokens=False)["input_ids"]
    return list(found) == expected and len(opening) == num_prompt and list(opening)[-len(alone) :] == list(alone)
