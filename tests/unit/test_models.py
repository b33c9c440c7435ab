"""The scorer in a model's own forward: full logits' values and gradients, for every family, and the probe's fallback."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
)

from ctpd.core.errors import UserError
from ctpd.model_checks import check_tokens
from ctpd.models import (
    Score,
    add_lora,
    find_tokenizer,
    install_scorer,
    load_model,
    load_tokenizer,
    parameter_counts,
    save_model,
    score,
)
from ctpd.probes import check_causal, configure_scorer, same_logits, scores_without_logits
from tests.fixtures.tiny import CONFIGS, IDS, PREDICTORS, REQUEST, VOCABULARY, tiny_model

WEIGHTS = torch.linspace(-1, 2, len(PREDICTORS))


def full_logps(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits.flatten(0, 1)[REQUEST.predictors]
    return logits.log_softmax(-1).gather(-1, REQUEST.targets[:, None])[:, 0]


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logps * WEIGHTS).sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True))


def assert_same_as_full_logits(model: nn.Module) -> None:
    fused, full = score(model, IDS, REQUEST), full_logps(model)
    torch.testing.assert_close(fused, full, rtol=1e-5, atol=1e-5)
    expected = gradients(model, full)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in gradients(model, fused).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def with_random_adapters(model: Any, targets: str | tuple[str, ...] = "all-linear") -> Any:
    adapted = add_lora(model, r=2, alpha=4, targets=targets, seed=0).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


@pytest.mark.parametrize("name", CONFIGS)
def test_scorer_has_the_values_and_gradients_of_full_logits(name: str) -> None:
    assert_same_as_full_logits(tiny_model(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_scorer_with_lora_has_the_values_and_gradients_of_full_logits(name: str) -> None:
    assert_same_as_full_logits(with_random_adapters(tiny_model(name)))


@pytest.mark.parametrize("name", ["llama", "granite_scale"])
def test_scorer_uses_an_adapter_on_the_head_itself(name: str) -> None:
    model = with_random_adapters(tiny_model(name), targets=("q_proj", "lm_head"))
    assert_same_as_full_logits(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lora", [False, True])
def test_probe_accepts_the_scorer_and_changes_nothing(name: str, lora: bool) -> None:
    """It warns of nothing (a warning is an error here), changes no weight (a new adapter's zeros included), leaves no gradient."""
    model: Any = tiny_model(name)
    if lora:
        model = add_lora(model, r=2, alpha=4, targets="all-linear", seed=0)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    configure_scorer(model)
    base = model.get_base_model() if lora else model
    assert base._scorer_uses_logits is False
    assert model.training
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key
        assert parameter.grad is None


class Doubled(LlamaForCausalLM):
    """A model whose logits are not what its head and its configuration say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_probe_falls_back_to_full_logits_when_a_model_changes_its_logits() -> None:
    torch.manual_seed(0)
    model = install_scorer(Doubled(CONFIGS["llama"]()).eval())
    with pytest.warns(UserWarning, match="does not reproduce Doubled; full logits are used"):
        configure_scorer(model)
    assert_same_as_full_logits(model)


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_a_model_that_sees_what_it_predicts_is_refused(kind: Any) -> None:
    """In a tiny model with random weights the logits differ by less than rounding; as a decoder the same model is fine."""
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder, decoder = (
        install_scorer(AutoModelForCausalLM.from_config(kind(**sizes, intermediate_size=32, is_decoder=is_decoder)))
        for is_decoder in (False, True)
    )
    check_causal(decoder)
    with pytest.raises(UserError, match=r"is not causal: .*that token itself. Use a causal language model"):
        check_causal(encoder)


def test_forward_without_a_request_is_the_models_own() -> None:
    plain, ours = tiny_model(scorer=False), tiny_model()
    torch.testing.assert_close(plain(IDS).logits, ours(IDS).logits, rtol=0, atol=0)
    assert isinstance(ours, LlamaForCausalLM)
    assert type(ours).__name__ == "LlamaForCausalLM"
    assert type(install_scorer(ours)) is type(ours)


def test_padding_on_the_right_does_not_reach_a_score() -> None:
    model = tiny_model("gemma3")
    padded = torch.cat([IDS, torch.zeros(3, 5, dtype=IDS.dtype)], dim=1)
    shifted = PREDICTORS // 10 * 15 + PREDICTORS % 10
    torch.testing.assert_close(score(model, padded, Score(shifted, REQUEST.targets)), score(model, IDS, REQUEST))


def test_a_copy_scores_with_its_own_weights() -> None:
    model = tiny_model()
    other = copy.deepcopy(model)
    torch.testing.assert_close(score(other, IDS, REQUEST), score(model, IDS, REQUEST), rtol=0, atol=0)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(3)
    assert_same_as_full_logits(other)
    assert not torch.allclose(score(other, IDS, REQUEST), score(model, IDS, REQUEST))


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_is_a_plain_directory_with_the_same_scores(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    save_model(model, tmp_path)
    assert not any(path.suffix in {".bin", ".pt", ".py"} for path in tmp_path.iterdir())
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain).__module__.startswith("transformers.")
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    again = load_model(tmp_path, precision="float32", device="cpu")
    torch.testing.assert_close(score(again, IDS, REQUEST), score(model, IDS, REQUEST), rtol=0, atol=0)


def test_saved_adapter_merges_to_the_adapted_model_and_names_no_path(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "base")
    adapted = with_random_adapters(load_model(tmp_path / "base", precision="float32", device="cpu"))
    save_model(adapted, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    merged = load_model(tmp_path / "base", adapters=[tmp_path / "adapter"], precision="float32", device="cpu")
    torch.testing.assert_close(score(merged, IDS, REQUEST), score(adapted, IDS, REQUEST), rtol=1e-5, atol=1e-5)


def test_initial_adapters_depend_on_the_seed_alone() -> None:
    first, second, other = (
        {
            n: p.detach()
            for n, p in add_lora(tiny_model(), r=2, alpha=4, targets="all-linear", seed=s).named_parameters()
        }
        for s in (1, 1, 2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_loading_switches_dropout_off(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.attention_dropout = 0.5
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, precision="float32", device="cpu").train()
    with torch.no_grad():
        torch.testing.assert_close(score(loaded, IDS, REQUEST), score(loaded, IDS, REQUEST), rtol=0, atol=0)
    assert loaded.config.attention_dropout == 0.0


def test_a_saved_model_keeps_the_dropout_of_its_checkpoint(tmp_path: Path) -> None:
    """Also after an adapter was merged into it, and of a configuration with several."""
    model = tiny_model()
    model.config.attention_dropout = 0.5
    save_model(model, tmp_path / "base")
    save_model(with_random_adapters(tiny_model()), tmp_path / "adapter")
    for adapters in ([], [tmp_path / "adapter"]):
        loaded = load_model(tmp_path / "base", adapters=adapters, precision="float32", device="cpu")
        save_model(loaded, tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["attention_dropout"] == 0.5
        assert loaded.config.attention_dropout == 0.0


def test_a_target_beyond_the_logits_is_refused() -> None:
    """Its log-probability would be a finite number of no token."""
    beyond = Score(PREDICTORS, REQUEST.targets.clone().index_fill_(0, torch.tensor([2]), VOCABULARY))
    with pytest.raises(UserError, match=f"the token {VOCABULARY} is beyond the {VOCABULARY} columns"):
        score(tiny_model(), IDS, beyond)


def test_a_row_with_a_token_that_the_model_does_not_have_is_refused() -> None:
    ids = np.array([1, VOCABULARY + 6, 3], dtype=np.int32)
    for model in (tiny_model(), add_lora(tiny_model(), r=2, alpha=4, targets="all-linear", seed=0)):
        with pytest.raises(UserError, match=f"hold the token {VOCABULARY + 6}, and the model has {VOCABULARY} rows"):
            check_tokens(model, ids, where="model")
        check_tokens(model, ids[:1], where="model")


class Unheard(LlamaForCausalLM):
    """A model whose decoder is not called as others' are."""

    def get_decoder(self) -> Any:
        return lambda *args, **kwargs: None


def test_probe_falls_back_to_full_logits_when_a_decoder_cannot_be_called() -> None:
    torch.manual_seed(0)
    model = install_scorer(Unheard(CONFIGS["llama"]()).eval())
    with pytest.warns(UserWarning, match="does not reproduce Unheard; full logits are used"):
        configure_scorer(model)
    assert_same_as_full_logits(model)


def test_tied_weights_are_counted_once() -> None:
    tied, untied = parameter_counts(tiny_model("llama_tied")), parameter_counts(tiny_model("llama"))
    assert untied[1] - tied[1] == VOCABULARY * 16
    trainable, everything = parameter_counts(add_lora(tiny_model(), r=2, alpha=4, targets="all-linear", seed=0))
    assert everything == untied[1] + trainable


@pytest.mark.parametrize("load", [lambda p: load_model(p, precision="float32", device="cpu"), load_tokenizer])
def test_a_directory_without_a_model_is_refused_by_name(load: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load(tmp_path)


def test_frozen_weights_of_two_bytes_train_adapters_of_four(tmp_path: Path) -> None:
    """The adapters' first gradients are those on float32 weights, within the precision of the weights."""
    tiny_model("llama").save_pretrained(tmp_path)
    found = {}
    for precision in ("float32", "bfloat16"):
        loaded = load_model(tmp_path, precision=precision, device="cpu")
        model = with_random_adapters(loaded)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {getattr(torch, precision)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = score(model, IDS, REQUEST)
        assert logps.dtype == torch.float32
        found[precision] = gradients(model, logps)
    for name, gradient in found["bfloat16"].items():
        expected = found["float32"][name]
        assert float((gradient - expected).norm() / expected.norm()) < 0.05, name


def test_four_bit_weights_without_bitsandbytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(UserError, match="needs bitsandbytes, which is not installed"):
        load_model(tmp_path, precision="4bit", device="cpu")


def test_four_bit_weights_train_adapters_and_keep_their_count(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quantization`)")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    plain.save_pretrained(tmp_path / "base")
    save_model(
        with_random_adapters(load_model(tmp_path / "base", precision="float32", device="cpu")), tmp_path / "adapter"
    )
    loaded = load_model(tmp_path / "base", adapters=[tmp_path / "adapter"], precision="4bit", device="cpu")
    assert any(p.dtype == torch.uint8 for p in loaded.parameters())
    assert parameter_counts(loaded)[1] == parameter_counts(plain)[1]
    model = with_random_adapters(loaded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = score(model, IDS, REQUEST)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, logps).values())


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    """Only fast ones have character offsets; ByT5 has only a tokenizer in Python."""
    ByT5Tokenizer().save_pretrained(str(tmp_path))
    for load in (load_tokenizer, find_tokenizer):
        with pytest.raises(UserError, match="a slow one"):
            load(str(tmp_path))


@pytest.mark.parametrize("lora", [False, True])
def test_a_probe_answers_the_same_again_and_changes_nothing(lora: bool) -> None:
    """It changes neither weights, mode, random state nor the way the model is scored."""
    model: Any = tiny_model()
    base = model
    if lora:
        model = add_lora(model, r=2, alpha=4, targets="all-linear", seed=0)
    model.train()
    before, state = {n: p.detach().clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    assert [scores_without_logits(model) for _ in range(2)] == [True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert base._scorer_uses_logits is False
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_are_compared_by_the_precision_of_their_model() -> None:
    logits = torch.tensor([[1.0, -10.0, 3.0]])
    assert same_logits(logits, logits + 5e-4)
    assert not same_logits(logits, logits + 5e-3)
    assert same_logits(logits.bfloat16(), logits.bfloat16() + 0.25)
    assert not same_logits(logits.bfloat16(), logits.bfloat16() + 1.0)
    assert not same_logits(logits, logits * torch.nan)
