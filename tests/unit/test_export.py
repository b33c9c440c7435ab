"""`ctpd export`: of an adapter that was trained on a local model, with its base, its tokenizer and its template."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, GenerationConfig

from ctpd.core.errors import UserError
from ctpd.core.store import Store
from ctpd.export import ExportForm, export_model
from ctpd.models import add_lora, save_model
from ctpd.pipeline.references import MODEL_FOLDER, Model, external_model
from ctpd.pipeline.stages.train import CHAIN
from ctpd.text.config import PairsConfig
from ctpd.text.pairs import Message, Pair, ReadPairs
from ctpd.text.prepare import Preparation
from ctpd.text.prepared_files import write_prepared
from ctpd.text.render import ChatTemplate, PlainTemplate, TemplatedTokenizer
from tests.fixtures.tiny import tiny_model, tiny_multimodal
from tests.fixtures.tokenizers import CHATML, tokenizer, with_bos, with_template

KEY, PAIRS = "a" * 32, "c" * 32


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one adapter, trained on the model that the recipe names by the relative path `models/base`."""
    monkeypatch.chdir(tmp_path)
    base = Path("models") / "base"
    save_model(tiny_model(scorer=False), base)
    tokenizer("byte_bpe").save_pretrained(str(base))
    return store_of_an_adapter(tmp_path, base)


def store_of_an_adapter(tmp_path: Path, base: Path, model: Any = None) -> Store:
    reference = external_model(str(base), revision=None, role="student")
    store = Store(tmp_path / "store")
    adapted = add_lora(model or tiny_model(scorer=False), r=2, alpha=4, targets="all-linear", seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    identity = {"config": {"role": "student"}, "pairs": f"pairs/{PAIRS}"}
    template = {"user": "Q: {content}\n", "assistant": 'A\'s "é😀": {content}\n', "system": "{content}\n"}
    with store.build("pairs", PAIRS, identity={"student": {"template": template}}, provenance={}) as folder:
        _write_pairs(folder)
    with store.build("train", KEY, identity=identity, provenance={}) as folder:
        save_model(adapted, folder / MODEL_FOLDER)
        (folder / CHAIN).write_text(json.dumps(Model(reference, reference).chain()))
    return store


def _write_pairs(folder: Path) -> None:
    """Two pairs, whose responses end with `<|im_end|>`."""
    chatty = with_template("byte_bpe", CHATML)
    side = TemplatedTokenizer(chatty, ChatTemplate(chatty, variables={}), name="student")
    pairs = [Pair(str(i), (Message("user", "Who?"),), "He.", "She.") for i in range(2)]
    config = PairsConfig(max_tokens=64, max_prompt_tokens=32)
    write_prepared(Preparation({"train": ReadPairs(pairs)}, config, teacher=side, student=side), folder)


def test_the_merged_model_is_the_same_from_every_working_directory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(store, KEY, to=tmp_path / "here", form=ExportForm(merge=True))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "merged" in export_model(store, KEY, to=tmp_path / "there", form=ExportForm(merge=True))
    here, there, base = (
        load_file(tmp_path / name / "model.safetensors") for name in ("here", "there", "models/base")
    )  # fmt: skip
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert any(not torch.equal(here[name], base[name]) for name in here)
    assert (tmp_path / "there" / "tokenizer.json").is_file()


def test_a_base_model_that_has_changed_since_the_training_is_refused(store: Store, tmp_path: Path) -> None:
    config = tmp_path / "models" / "base" / "generation_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match=r"the files in '.*models/base' are not those that the adapter was trained on"):
        export_model(store, KEY, to=tmp_path / "out", form=ExportForm(merge=True))
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_was_moved_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "models" / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"trained on the model in '.*models/base', and this directory does not exist"):
        export_model(store, KEY, to=tmp_path / "out", form=ExportForm(merge=True))
    assert not (tmp_path / "out").exists()
    said = export_model(store, KEY, to=tmp_path / "out", form=ExportForm())
    assert "does not exist here, and so the tokenizer was not brought" in said


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(1, 9)[None]).logits
    return found


@pytest.fixture
def expected(store: Store, tmp_path: Path) -> torch.Tensor:
    """Of the adapter merged into its base."""
    export_model(store, KEY, to=tmp_path / "merged", form=ExportForm(merge=True))
    return logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers' old name
@pytest.mark.parametrize("form", [ExportForm(), ExportForm(with_base=True)])
def test_peft_loads_an_adapter_which_names_or_brings_its_base(
    store: Store, tmp_path: Path, expected: torch.Tensor, form: ExportForm
) -> None:
    """Issue 12: `base_model_name_or_path` was null, and there was no tokenizer."""
    out = tmp_path / "out"
    said = export_model(store, KEY, to=out, form=form)
    base = out / "base" if form.with_base else tmp_path / "models" / "base"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert f"Its base is {base}." in said
    found = logits(AutoPeftModelForCausalLM.from_pretrained(out))[
        ..., : expected.shape[-1]
    ]  # PEFT adds rows for all tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]


def test_an_adapter_on_other_adapters_needs_its_base_brought(store: Store, tmp_path: Path) -> None:
    chain_file = store.path("train", KEY) / CHAIN
    chain = json.loads(chain_file.read_text())
    other = "b" * 32
    with store.build("train", other, identity={}, provenance={}) as folder:
        shutil.copytree(store.path("train", KEY) / MODEL_FOLDER, folder / MODEL_FOLDER)
        (folder / CHAIN).write_text(json.dumps({**chain, "adapters": [f"store:train/{KEY}"]}))
    with pytest.raises(UserError, match=r"1 earlier adapter merged into it.*--with-base"):
        export_model(store, other, to=tmp_path / "out", form=ExportForm())
    assert not (tmp_path / "out").exists()
    export_model(store, other, to=tmp_path / "out", form=ExportForm(with_base=True))
    export_model(store, KEY, to=tmp_path / "first", form=ExportForm(merge=True))
    first, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "first", tmp_path / "out" / "base")
    )
    assert all(torch.equal(first[name], base[name]) for name in first)


@pytest.mark.parametrize("form", [{}, {"merge": True}, {"with_base": True}])
def test_weights_are_written_in_the_number_format_that_is_asked_for(
    store: Store, tmp_path: Path, form: dict[str, bool]
) -> None:
    export_model(store, KEY, to=tmp_path / "out", form=ExportForm(dtype="bfloat16", **form))
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == 1 + form.get("with_base", False)
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["byte_bpe", "gemma_bpe", "byte_bpe with BOS"])
def test_the_plain_template_of_the_recipe_is_the_exports_chat_template(store: Store, tmp_path: Path, kind: str) -> None:
    """`apply_chat_template` gives the tokens that were trained on."""
    name, _, bos = kind.partition(" with ")
    (with_bos if bos else tokenizer)(name).save_pretrained(str(tmp_path / "models" / "base"))
    store.remove("train", KEY)
    store.remove("pairs", PAIRS)
    store_of_an_adapter(tmp_path, tmp_path / "models" / "base")
    said = export_model(store, KEY, to=tmp_path / "out", form=ExportForm(merge=True))
    assert "`apply_chat_template` writes the plain template of the recipe." in said
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    template = PlainTemplate("Q: {content}\n", 'A\'s "é😀": {content}\n', "{content}\n")
    templated = TemplatedTokenizer(found, template, name="student")
    prompt, response = [Message("system", "Be {brief}."), Message("user", "Where is 'it'?")], "Here."
    frames = templated.frames([prompt], where=["x"])
    trained = templated.encode([(prompt, response)], frames=frames, where=["x"]).ids.tolist()
    messages = [message._asdict() for message in [*prompt, Message("assistant", response)]]
    assert found.apply_chat_template(messages, return_dict=False) == trained
    opening = found.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert trained[: len(opening)] == opening
    with pytest.raises(Exception, match="No text for the role tool"):
        found.apply_chat_template([{"role": "tool", "content": "x"}])


FORMS = [ExportForm(merge=True), ExportForm(with_base=True)]


@pytest.mark.parametrize("form", FORMS, ids=["merged", "with base"])
def test_an_exported_model_stops_where_its_training_ends_a_response(
    store: Store, tmp_path: Path, form: ExportForm
) -> None:
    """TRL issue 2059: its `generation_config` had the base's end token alone."""
    end = tokenizer("byte_bpe").convert_tokens_to_ids("<|im_end|>")
    said = export_model(store, KEY, to=tmp_path / "out", form=form)
    assert f"has '{end}' too" in said
    out = tmp_path / "out" / ("base" if form.with_base else "")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, end]
    assert GenerationConfig.from_pretrained(out).do_sample is None


SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (SAMPLED, SAMPLED),
        ({"do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.6, "top_p": 0.9}, SAMPLED),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False}),
    ],
    ids=["valid", "greedy", "without do_sample", "contradictory"],
)
def test_settings_of_sampling_are_left_alone_unless_they_are_invalid(
    store: Store, tmp_path: Path, given: dict[str, Any], written: dict[str, Any]
) -> None:
    """The library refuses to write a changed one with a temperature and without sampling."""
    base = tmp_path / "models" / "base"
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], **given}))
    store.remove("train", KEY)
    store.remove("pairs", PAIRS)
    store_of_an_adapter(tmp_path, base)
    export_model(store, KEY, to=tmp_path / "out", form=ExportForm(merge=True))
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: value for name, value in found.items() if name in SAMPLED} == written
    assert found["eos_token_id"] == [2, 3, tokenizer("byte_bpe").convert_tokens_to_ids("<|im_end|>")]


def test_an_exported_multimodal_model_is_whole_and_brings_its_processor(store: Store, tmp_path: Path) -> None:
    base = tmp_path / "models" / "vision"
    save_model(tiny_multimodal(), base)
    tokenizer("byte_bpe").save_pretrained(str(base))
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    store.remove("train", KEY)
    store.remove("pairs", PAIRS)
    store_of_an_adapter(tmp_path, base, tiny_multimodal())
    export_model(store, KEY, to=tmp_path / "out", form=ExportForm(merge=True))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == (
        base / "preprocessor_config.json"
    ).read_text()
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "Gemma3ForConditionalGeneration"
