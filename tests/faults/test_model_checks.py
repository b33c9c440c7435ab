"""What small files say of a ready-made model is said before the first stage: in one paragraph, or in one line."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from ctpd.core.errors import UserError
from ctpd.models import load_model
from tests.conftest import Cli
from tests.fixtures.ready_made import CONFIG, ROWS, STUDENT, WEIGHTS, edit, lora, notes, rewrite, save, write_recipe
from tests.fixtures.ready_made import folder as folder
from tests.fixtures.tiny import COMMON, CONFIGS, tiny_multimodal
from tests.fixtures.tokenizers import CHATML, with_template

SIZES = {**COMMON, "vocab_size": ROWS}


def test_sound_models_pass_in_silence(folder: Path) -> None:
    assert notes(folder) == []
    assert notes(folder, lora(r=2)) == []


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_weight_is_named_from_the_headers(folder: Path, lost: str) -> None:
    rewrite(folder / STUDENT / WEIGHTS, lambda weights: weights.pop(lost))
    with pytest.raises(UserError, match=rf"student: the checkpoint lacks 1 of the model's weights.*{lost}"):
        notes(folder)


def test_a_weight_of_another_shape_is_named_from_the_headers_and_when_it_is_loaded(folder: Path) -> None:
    name = "model.norm.weight"
    rewrite(folder / STUDENT / WEIGHTS, lambda weights: weights.update({name: torch.zeros(3)}))
    for read in (lambda: notes(folder), lambda: load_model(folder / STUDENT, precision="float32", device="cpu")):
        with pytest.raises(UserError, match=rf"in another shape: {name}"):
            read()


def test_a_weight_that_the_model_does_not_use_is_named_in_a_note(folder: Path) -> None:
    rewrite(folder / STUDENT / WEIGHTS, lambda weights: weights.update({"visual.proj": torch.zeros(3)}))
    assert [note for note in notes(folder) if note.endswith("weights that the model does not use: visual.proj")]


def test_a_missing_weight_of_a_sharded_checkpoint_is_named(folder: Path) -> None:
    model = load_model(folder / STUDENT, precision="float32", device="cpu")
    shutil.rmtree(folder / STUDENT)
    model.save_pretrained(folder / STUDENT, max_shard_size="30KB")
    with_template("byte_bpe", CHATML).save_pretrained(str(folder / STUDENT))
    shards = sorted((folder / STUDENT).glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert notes(folder) == []
    lost = next(iter(load_file(shards[0])))
    rewrite(shards[0], lambda weights: weights.pop(lost))
    with pytest.raises(UserError, match=rf"lacks 1 of.*{lost}"):
        notes(folder)
    shards[0].unlink()
    with pytest.raises(UserError, match=rf"there is no file named '{shards[0].name}'"):
        notes(folder)


def test_weights_that_the_library_joins_are_known_by_their_names_in_the_file(folder: Path) -> None:
    """A mixture of experts has one weight in memory for those of all experts in the file."""
    save(folder / STUDENT, MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)))
    assert any("experts.1" in name for name in load_file(folder / STUDENT / WEIGHTS))
    assert notes(folder) == []


def test_a_tokenizer_with_a_token_beyond_the_embedding_is_refused(folder: Path) -> None:
    tokens = with_template("byte_bpe", CHATML)
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokens) - 1
    save(folder / STUDENT, LlamaForCausalLM(config))
    last = tokens.convert_ids_to_tokens(len(tokens) - 1)
    sizes = rf"the tokenizer has {len(tokens)} tokens and the model {len(tokens) - 1} rows.*is {len(tokens) - 1}, '"
    with pytest.raises(UserError, match=sizes):
        notes(folder)
    assert last not in tokens.all_special_tokens


def plain_in_evaluation(shared: dict[str, Any]) -> None:
    shared["student"]["template"] = {"user": "{content}\n", "assistant": "{content}"}
    shared["evaluation"]["chat_template"] = True


TEMPLATES: dict[str, tuple[str | None, Callable[[dict[str, Any]], object], str]] = {
    "none": (None, lambda shared: None, r"student' has no chat template. Write a plain template"),
    "none, in the evaluation alone": (
        None,
        plain_in_evaluation,
        r"student: the tokenizer has no chat template. Evaluate",
    ),
    "not Jinja's": ("{{ messages }", lambda shared: None, r"student' is no Jinja template \(unexpected '}'\)"),
    "without the question": ("a</s>", lambda shared: None, r"student' renders the prompt without the text"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_no_pair_can_be_rendered_with_is_refused(name: str, folder: Path) -> None:
    text, change, said = TEMPLATES[name]
    (folder / STUDENT / "chat_template.jinja").unlink()
    if text is not None:
        (folder / STUDENT / "chat_template.jinja").write_text(text)
    with pytest.raises(UserError, match=said):
        notes(folder, change)


def test_a_broken_generation_config_is_refused_where_it_says_what_ends_a_response(folder: Path) -> None:
    (folder / STUDENT / "generation_config.json").write_text("{,")
    with pytest.raises(UserError, match=r"student/generation_config.json: the file is no configuration"):
        notes(folder)
    assert notes(folder, lambda shared: shared["student"].update(end_token="</s>")) == []


@pytest.mark.parametrize(
    ("kind", "named"),
    [("Qwen2Tokenizer", "'tokenizer.json', 'vocab.json', 'merges.txt'"), ("GemmaTokenizer", "'tokenizer.json'")],
)
def test_a_tokenizer_without_its_files_is_refused(kind: str, named: str, folder: Path) -> None:
    """transformers makes an empty one of these classes, which reads every text as nothing, or as the unknown token."""
    (folder / STUDENT / "tokenizer.json").unlink()
    edit(folder / STUDENT / "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(UserError, match=f"student: the tokenizer has no vocabulary: there is no file named {named}"):
        notes(folder)


def test_a_padding_token_that_was_added_without_a_row_is_refused(folder: Path) -> None:
    """TRL issue 387: `add_special_tokens` without `resize_token_embeddings`."""
    tokens = with_template("byte_bpe", CHATML)
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokens)
    save(folder / STUDENT, LlamaForCausalLM(config))
    tokens.add_special_tokens({"pad_token": "[PAD]"})
    tokens.save_pretrained(str(folder / STUDENT))
    with pytest.raises(UserError, match=rf"the first token without a row is {len(tokens) - 1}, '\[PAD\]'"):
        notes(folder)


@pytest.mark.parametrize("written", [False, True])
def test_a_special_token_without_a_row_is_refused_where_the_template_writes_it(folder: Path, written: bool) -> None:
    """Gemma 3 270M and 1B have one for images that has no row: no text may hold it, and no template of theirs writes it."""
    tokens = with_template("byte_bpe", CHATML + ("<image>" if written else ""))
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokens)
    save(folder / STUDENT, LlamaForCausalLM(config))
    tokens.add_tokens(["<image>"], special_tokens=True)
    tokens.save_pretrained(str(folder / STUDENT))
    if not written:
        assert notes(folder) == []
        return
    with pytest.raises(UserError, match="the first token without a row is"):
        notes(folder)


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_positions=48, n_embd=16, n_layer=1, n_head=2)),
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=ROWS,
                max_position_embeddings=48,
                hidden_size=16,
                ffn_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                word_embed_proj_dim=16,
            )
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_rows_longer_than_learned_positions_are_refused(folder: Path, model: Callable[[], Any]) -> None:
    save(folder / STUDENT, model())
    with pytest.raises(UserError, match=r"student: `max_tokens: 64` is more than the 48 positions"):
        notes(folder)
    assert notes(folder, lambda shared: shared["data"].update(max_tokens=48)) == []


def test_rows_longer_than_rotary_positions_are_said_with_both_figures(folder: Path) -> None:
    (note,) = notes(folder, lambda shared: shared["data"].update(max_tokens=65))
    assert "student: `max_tokens: 65` is more than the 64 positions" in note


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "of_its_own"}, "of_its_own"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_quantized_weights_without_their_package_are_refused_by_its_name(
    folder: Path, method: dict[str, Any], package: str
) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        pytest.skip(reason=f"{package} is installed")
    edit(folder / STUDENT / CONFIG, quantization_config=method)
    for read in (lambda: notes(folder), lambda: load_model(folder / STUDENT, precision="float32", device="cpu")):
        with pytest.raises(UserError, match=package) as caught:
            read()
        assert caught.value.fix is not None


def test_quantized_weights_are_not_trained(folder: Path) -> None:
    edit(folder / STUDENT / CONFIG, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="the weights of this checkpoint are quantized; neither can they be trained"):
        notes(folder, lora(r=2))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "unheard_of"}, "unheard_of"),
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
)
def test_what_a_library_says_of_a_configuration_is_one_paragraph(
    folder: Path, changed: dict[str, Any], said: str
) -> None:
    edit(folder / STUDENT / CONFIG, **changed)
    for read in (lambda: notes(folder), lambda: load_model(folder / STUDENT, precision="float32", device="cpu")):
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert str(caught.value).startswith(str(folder / STUDENT))
        assert "\n" not in str(caught.value)


def test_a_damaged_file_of_weights_is_one_paragraph(folder: Path) -> None:
    path = folder / STUDENT / WEIGHTS
    path.write_bytes(path.read_bytes()[:2000])
    for read in (lambda: notes(folder), lambda: load_model(folder / STUDENT, precision="float32", device="cpu")):
        with pytest.raises(UserError, match=r"no causal language model could be loaded .*header"):
            read()


def test_the_part_of_a_multimodal_model_that_is_trained_is_said_in_one_line(folder: Path) -> None:
    save(folder / STUDENT, tiny_multimodal("gemma3", vocab_size=ROWS))
    (note,) = notes(folder)
    assert "Gemma3ForConditionalGeneration: its language part is trained; the other" in note
    (note,) = notes(folder, lora(r=2))
    assert "its language part gets adapters" in note


def test_a_plan_shows_the_notes_and_refuses_what_will_not_work(cli: Cli, folder: Path) -> None:
    """So does the command that would run it; a finished stage needs no check."""
    long = write_recipe(folder, lambda shared: shared["data"].update(max_tokens=65))
    planned = cli("run", long, "--plan", "--store", folder / "store")
    assert planned.code == 0, planned.err
    assert "student: `max_tokens: 65` is more than the 64 positions" in " ".join(planned.out.split())
    rewrite(folder / STUDENT / WEIGHTS, lambda weights: weights.pop("lm_head.weight"))
    for words in (("run", long, "--plan"), ("train", long)):
        refused = cli(*words, "--store", folder / "store")
        assert refused.code == 2
        assert "lacks 1 of the model's weights" in " ".join(refused.err.split())
    assert not list((folder / "store").glob("pairs/*"))


def test_an_evaluated_model_is_checked_too(cli: Cli, folder: Path) -> None:
    rewrite(folder / STUDENT / WEIGHTS, lambda weights: weights.pop("lm_head.weight"))
    refused = cli("eval", "--model", folder / STUDENT, "--plan", "--store", folder / "store")
    assert refused.code == 2
    assert "lacks 1 of the model's weights" in " ".join(refused.err.split())
