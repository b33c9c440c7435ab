"""`ctpd export --merge` of an adapter that was trained on a local model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.export import export_model
from ctpd.models import add_lora, save_model
from ctpd.pipeline.references import MODEL_FOLDER, Model, external_model
from ctpd.pipeline.stages.train import CHAIN
from tests.fixtures.tiny import tiny_model
from tests.fixtures.tokenizers import tokenizer

KEY = "a" * 32


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one adapter, trained on the model that the recipe names by the relative path `models/base`."""
    monkeypatch.chdir(tmp_path)
    base = Path("models") / "base"
    save_model(tiny_model(scorer=False), base)
    tokenizer("byte_bpe").save_pretrained(str(base))
    reference = external_model(str(base), revision=None, role="student")
    store = Store(tmp_path / "store")
    adapted = add_lora(tiny_model(scorer=False), r=2, alpha=4, targets="all-linear", seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    with store.build("train", KEY, identity={}, provenance={}) as folder:
        save_model(adapted, folder / MODEL_FOLDER)
        (folder / CHAIN).write_text(json.dumps(Model(reference, reference).chain()))
    return store


def test_the_merged_model_is_the_same_from_every_working_directory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(store, KEY, to=tmp_path / "here", merge=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "merged" in export_model(store, KEY, to=tmp_path / "there", merge=True)
    here, there, base = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there", "models/base"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert any(not torch.equal(here[name], base[name]) for name in here)
    assert (tmp_path / "there" / "tokenizer.json").is_file()


def test_a_base_model_that_was_moved_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "models" / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"trained on the model in '.*models/base', and this directory does not exist"):
        export_model(store, KEY, to=tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
    assert "Use --merge" in export_model(store, KEY, to=tmp_path / "out", merge=False)
