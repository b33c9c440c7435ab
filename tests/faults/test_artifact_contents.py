"""Manifests that say too little are damaged artifacts; saved tokenizers hold nothing of the machine that wrote them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctpd.core.errors import DamagedArtifact
from ctpd.core.manifests import MANIFEST
from ctpd.core.store import Store
from ctpd.inspection.weights import inspect_weights
from ctpd.models import load_tokenizer
from ctpd.saving import save_tokenizer
from tests.fixtures.tokenizers import CHATML, tokenizer, with_template
from tests.fixtures.waiting import HANGS

KEY = 32 * "a"
MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda manifest: [manifest],
    "nothing": lambda manifest: None,
    "text": lambda manifest: "x",
    "no files": lambda manifest: {k: v for k, v in manifest.items() if k != "files"},
    "files a list": lambda manifest: manifest | {"files": ["a.txt"]},
    "file without size": lambda manifest: manifest | {"files": {"a.txt": {"sha256": "0"}}},
    "no identity": lambda manifest: manifest | {"identity": {}},
    "no stage": lambda manifest: {k: v for k, v in manifest.items() if k != "stage"},
}


@pytest.mark.parametrize("kind", [*MANIFESTS, "deep", "not JSON"])
def test_a_manifest_that_says_too_little_is_a_damaged_artifact(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.build("weights", KEY, identity={"a": 1}, provenance={}) as folder:
        (folder / "a.txt").write_text("a")
    path = store.path("weights", KEY) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)  # as older versions wrote it, so that nothing but its fields can be wrong
    texts = {"deep": "[" * 100_000, "not JSON": "{"}
    path.write_text(texts[kind] if kind in texts else json.dumps(MANIFESTS[kind](manifest)))
    for read in (
        lambda: inspect_weights(store, KEY),
        *([] if kind == "no identity" else [lambda: store.open("weights", KEY)]),
    ):
        with pytest.raises(DamagedArtifact, match=MANIFEST):
            read()


@pytest.mark.parametrize("kind", ["unigram", "chatml"])
def test_a_saved_tokenizer_is_the_same_whatever_the_environment(kind: str, tmp_path: Path) -> None:
    """`local_files_only` followed HF_HUB_OFFLINE: one key had two contents."""
    original = with_template("byte_bpe", CHATML) if kind == "chatml" else tokenizer(kind)
    original.save_pretrained(str(tmp_path / "original"))
    code = (
        "from pathlib import Path; from ctpd.models import load_tokenizer; from ctpd.saving import save_tokenizer; import sys;"
        "save_tokenizer(load_tokenizer(sys.argv[1]), Path(sys.argv[2]))"
    )
    saved = []
    for offline, folder in (("0", "there"), ("1", "elsewhere")):
        words = [sys.executable, "-c", code, tmp_path / "original", tmp_path / folder / "model"]
        subprocess.run(words, env=os.environ | {"HF_HUB_OFFLINE": offline}, check=True, timeout=HANGS)
        saved.append({file.name: file.read_bytes() for file in (tmp_path / folder / "model").iterdir()})
    assert saved[0] == saved[1]
    config = json.loads(saved[0]["tokenizer_config.json"])
    assert not {"local_files_only", "is_local", "name_or_path"} & config.keys()
    assert str(tmp_path) not in json.dumps(config)
    again = load_tokenizer(tmp_path / "there" / "model")
    assert again("Naïve café 7 </s>")["input_ids"] == original("Naïve café 7 </s>")["input_ids"]
    assert again.chat_template == original.chat_template
    save_tokenizer(again, tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == saved[0]
