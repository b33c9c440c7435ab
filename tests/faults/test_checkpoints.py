"""Checkpoints that would give random weights, run somebody's code or load a pickle are refused in one paragraph."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctpd.core.errors import UserError
from ctpd.models import find_tokenizer, load_model, load_tokenizer, save_model
from tests.fixtures.tiny import tiny_model
from tests.fixtures.tokenizers import tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model("llama", scorer=False), tmp_path / "model")
    tokenizer("byte_bpe").save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def load(folder: Path) -> torch.nn.Module:
    return load_model(folder, precision="float32", device="cpu")


def code_of_its_own(folder: Path, file: str, key: str, classes: str | list[str | None]) -> Path:
    """Python beside the model that would leave a mark if it ran, named in a configuration file."""
    mark = folder.parent / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    content = json.loads((folder / file).read_text())
    content |= {"auto_map": {key: classes}, "model_type": "of_its_own"}
    content.pop("tokenizer_class", None)
    (folder / file).write_text(json.dumps(content))
    return mark


def test_a_missing_weight_is_named_and_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "mlp" in name)
    del weights[name]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 of the model's weights.*{name}"):
        load(folder)


def test_a_weight_that_the_model_does_not_use_is_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS) | {"visual.proj": torch.zeros(2)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"does not use: visual\.proj"):
        load(folder)


def test_code_of_a_model_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands on standard input."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = code_of_its_own(folder, "config.json", "AutoConfig", "own.Own")
    with pytest.raises(UserError, match="Python code of its own"):
        load(folder)
    assert not mark.exists()


def test_code_of_a_tokenizer_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = code_of_its_own(folder, "tokenizer_config.json", "AutoTokenizer", [None, "own.Own"])
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "of_its_own"}
    (folder / "config.json").write_text(json.dumps(config))
    for read in (lambda: load_tokenizer(folder), lambda: find_tokenizer(str(folder))):
        with pytest.raises(UserError):
            read()
    assert not mark.exists()


def test_a_model_that_has_only_a_pickle_is_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="safetensors"):
        load(folder)
