"""Prompt sharing: packed pairs give the numbers of separate rows, in every family, or the model is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import FalconH1Config, Lfm2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from baselines.dpo import DPO, DPOParams
from ctpd.models import Score, add_lora, install_scorer, score
from ctpd.ops.shared_rows import MOST_OF_SEPARATE, PackedLayout, pack_pairs, packed_attention
from ctpd.probes import check_causal, other_mixing, same_results, scores_without_logits
from ctpd.text.blocks import TokenRows
from ctpd.train.batches import UnitBatch, to_device
from ctpd.train.collator import ScoredRows
from ctpd.train.config import Schedule
from ctpd.train.fit import Fit, FitSettings, Optimization, fit
from ctpd.train.scoring import (
    Measure,
    ScoringSettings,
    _batches_of,
    logps_with_boundary,
    scoring_pass,
    token_logps,
    top_k,
)
from ctpd.train.sharing import SHARING, can_share_prompts, enable_prompt_sharing
from ctpd.train.trainer import Training, UnitPass
from tests.fixtures.tiny import COMMON, CONFIGS, VOCABULARY, pairs_with_prompts, tiny_model

SHARING_FAMILIES = [name for name in CONFIGS if name != "gemma2_softcap"]


def both_ways(rows: ScoredRows, items: list[int]) -> tuple[UnitBatch, UnitBatch]:
    separate = rows.collate(items)
    shared = dataclasses.replace(rows, shares_prompts=True).collate(items)
    assert separate.tokens.layout is None
    assert shared.tokens.layout is not None
    return separate, shared


def test_every_token_of_every_row_is_found_in_the_packed_sequences() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        num_pairs, width = rng.integers(1, 5), 12
        ids = rng.integers(1, 4, (2 * num_pairs, width))  # few symbols: responses begin alike by chance, too
        common = rng.integers(0, width, num_pairs)
        for pair, length in enumerate(common):
            ids[num_pairs + pair, :length] = ids[pair, :length]
        lengths = rng.integers(2, width + 1, 2 * num_pairs)
        lengths[0] = width
        ids[np.arange(width) >= lengths[:, None]] = 0
        packed = pack_pairs(ids, lengths)
        if packed is None:
            continue
        sequences, shared = packed
        assert sequences.size <= MOST_OF_SEPARATE * ids.size
        for row, length in enumerate(lengths):
            index = shared.unpack[row, :length].numpy()
            assert (sequences.reshape(-1)[index] == ids[row, :length]).all()
            assert (shared.positions.reshape(-1)[index].numpy() == np.arange(length)).all()
            assert len(set(index.tolist())) == length
            assert (index // sequences.shape[1] == row % num_pairs).all()
        # every packed token belongs to some row, and only padding to none
        used = {int(p) for row, length in enumerate(lengths) for p in shared.unpack[row, :length]}
        assert used == set(np.flatnonzero(sequences.reshape(-1)).tolist())


def test_rows_without_a_common_beginning_are_left_apart() -> None:
    ids = np.arange(1, 25).reshape(2, 12)
    assert pack_pairs(ids, np.array([12, 12])) is None


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_options: Any
) -> tuple[Tensor, None]:
    size = query.shape[2]
    causal = torch.ones(size, size, dtype=torch.bool).tril() if mask is None else mask
    weights = (query @ key.transpose(2, 3)).masked_fill(~causal, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("common", [3, 6, 9], ids=["all queries of the second rows", "their own alone", "equal rows"])
def test_attention_of_packed_rows_and_its_gradients_are_those_of_one_masked_sequence(
    common: int, window: int | None
) -> None:
    """The definition: a token sees the tokens before it of a row that both are in."""
    lengths = np.array([9, 7, 9, 7] if common == 9 else [9, 7, 8, 9])
    ids = np.arange(1, 37).reshape(4, 9)
    ids[2:, :common] = ids[:2, :common]
    ids[np.arange(9) >= lengths[:, None]] = 0
    packed = pack_pairs(ids, lengths)
    assert packed is not None
    shared = packed[1]
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, 2, packed[0].shape[1], 4, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    visible = torch.zeros(2, packed[0].shape[1], packed[0].shape[1], dtype=torch.bool)
    for row, length in enumerate(lengths):
        index = shared.unpack[row, :length] % packed[0].shape[1]
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            visible[row % 2, index[i], index[first : i + 1]] = True
    is_token = torch.from_numpy(packed[0] > 0)
    visible[~is_token] = True  # padding may attend to anything; it is not compared
    expected, _ = naive_attention(*states, visible[:, None])
    found, _ = packed_attention(naive_attention, *states, layout=shared, sliding_window=window)
    torch.testing.assert_close(found[is_token], expected[is_token])
    weights = torch.randn(found[is_token].shape, dtype=torch.float64, generator=generator)
    for one, other in zip(
        torch.autograd.grad((found[is_token] * weights).sum(), states),
        torch.autograd.grad((expected[is_token] * weights).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SHARING_FAMILIES)
def test_shared_prompts_give_the_values_and_gradients_of_separate_rows(name: str, adapters: bool) -> None:
    model: Any = tiny_model(name)
    if adapters:
        model = add_lora(model, r=2, alpha=4, targets="all-linear", seed=0)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
    assert enable_prompt_sharing(model)
    forward_pass = UnitPass(DPO(DPOParams()))
    found = []
    for batch in both_ways(pairs_with_prompts(5), [4, 0, 2, 1]):
        model.zero_grad()
        sums = forward_pass(model, batch)
        sums.loss.backward()
        found.append((sums, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (separate, expected), (shared, gradients) = found
    torch.testing.assert_close(shared.loss, separate.loss, rtol=1e-5, atol=1e-5)
    for metric, value in separate.metrics.items():
        torch.testing.assert_close(shared.metrics[metric], value, rtol=1e-5, atol=1e-5)
    assert expected
    for parameter_name, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter_name], gradient, rtol=1e-3, atol=1e-5, msg=parameter_name)


def test_separate_rows_of_a_prepared_model_are_scored_as_before() -> None:
    prepared, plain = tiny_model("gemma3"), tiny_model("gemma3")
    assert enable_prompt_sharing(prepared)
    ids = torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))
    request = Score(torch.tensor([1, 8, 15, 28]), torch.tensor([5, 6, 7, 8]))
    assert torch.equal(score(prepared, ids, request), score(plain, ids, request))
    left_padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    outputs = [
        m(input_ids=ids[:2, :4], attention_mask=left_padded).logits[left_padded.bool()] for m in (prepared, plain)
    ]
    assert torch.equal(*outputs)


def test_a_model_with_attention_of_its_own_keeps_it_and_separate_rows() -> None:
    model = tiny_model("gemma2_softcap")
    assert not enable_prompt_sharing(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_whose_shared_rows_differ_is_refused_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rotary = type(model.model.rotary_emb)
    original = rotary.forward
    counted = lambda self, x, position_ids: original(self, x, torch.arange(x.shape[1])[None])  # noqa: E731
    monkeypatch.setattr(rotary, "forward", counted)  # positions are counted; position_ids are ignored
    assert not enable_prompt_sharing(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    assert can_share_prompts(model)
    assert model.config._attn_implementation == "sdpa", "a probe changes nothing"
    for _ in range(2):
        assert enable_prompt_sharing(model)
        assert model.config._attn_implementation == SHARING
        assert can_share_prompts(model)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_padding_token_with_a_zero_embedding_refuses_no_model(padding: int) -> None:
    """A trial whose rows began with it had gradients beyond float32 in deep models: `eps ** -0.5` in each layer."""
    sizes = COMMON | {"num_hidden_layers": 3, "pad_token_id": padding}
    torch.manual_seed(0)
    model = install_scorer(LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-30)))
    assert not model.get_input_embeddings().weight[padding].any()
    assert scores_without_logits(model)
    assert can_share_prompts(model)
    check_causal(model)


HYBRIDS: dict[str, Any] = {
    "convolutions by layer": lambda: Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
    "state spaces beside attention": lambda: FalconH1Config(
        **COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model_that_mixes_positions_otherwise_is_refused_however_little_it_does_so_now(name: str) -> None:
    """Near its initialisation a convolution hardly moves a log-probability: a probe alone would pass it."""
    config = HYBRIDS[name]()
    model = install_scorer(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config))
    assert other_mixing(model) is not None
    assert not enable_prompt_sharing(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_only_the_mask_applies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 16 tokens are fewer than any real window; the probe shortens windows."""
    model = tiny_model("gemma3")
    model.config.sliding_window = 512
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # only the mask knows
    assert not enable_prompt_sharing(model)
    assert model.config.sliding_window == 512
    original = tiny_model("gemma3")
    assert enable_prompt_sharing(original)
    assert original.config.sliding_window == original.model.layers[0].self_attn.sliding_window == 4


def test_any_error_of_the_probe_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise IndexError("a mask of another shape")

    monkeypatch.setattr("ctpd.train.sharing.packed_attention", fails)
    assert not enable_prompt_sharing(model)
    assert model.config._attn_implementation == "sdpa"


def test_in_16_bits_a_missing_gradient_is_noticed() -> None:
    model = tiny_model().bfloat16()
    ids = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    request = Score(torch.tensor([2, 5, 11]), torch.tensor([3, 4, 5]))

    def whole() -> Tensor:
        return score(model, ids, request)

    def first_as_constant() -> Tensor:
        parameter = next(model.parameters())
        constants = {"model.embed_tokens.weight": parameter.detach() + 0 * parameter}
        logps: Tensor = functional_call(model, constants, (), {"input_ids": ids, "score": request})
        return logps

    assert same_results(model, whole, whole)
    assert not same_results(model, whole, first_as_constant)


def trained(folder: Path, rows: ScoredRows, *, micro_batch_tokens: int = 10**6) -> tuple[Fit, nn.Module]:
    model = tiny_model()
    assert enable_prompt_sharing(model)
    settings = FitSettings(
        device="cpu",
        micro_batch_tokens=micro_batch_tokens,
        checkpoint_seconds=1e9,
        report_to=(),
        progress=lambda done, total: None,
    )
    schedule = Schedule(epochs=2, pairs_per_step=8, activation_checkpointing=True)
    objective = DPO(DPOParams())
    training = Training(model=model, objective=objective, rows=rows, forward_pass=UnitPass(objective))
    optimization = Optimization(schedule=schedule, learning_rate=1e-3, seed=3, precision="float32")
    return fit(training, optimization, folder=folder, settings=settings), model


def test_a_training_is_the_same_with_and_without_sharing_however_a_step_is_cut(tmp_path: Path) -> None:
    rows = pairs_with_prompts(24)
    sharing = dataclasses.replace(rows, shares_prompts=True)
    plain, model = trained(tmp_path / "a", rows)
    for number, tokens in enumerate((10**6, 60)):
        done, other = trained(tmp_path / f"b{number}", sharing, micro_batch_tokens=tokens)
        for one, two in zip(plain.history, done.history, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert two["rewards/margins"] == pytest.approx(one["rewards/margins"], abs=1e-4)
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)


def test_layout_is_moved_like_the_rest_of_a_batch() -> None:
    _, batch = both_ways(pairs_with_prompts(3), [0, 1, 2])
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, UnitBatch)
    assert moved.num_pairs == 3
    layout = moved.tokens.layout
    assert isinstance(layout, PackedLayout)
    assert all(part.is_meta for part in layout)


MEASURES: dict[str, Measure] = {
    "log-probabilities": token_logps,
    "top": top_k(3, 2.0),
    "with boundary": logps_with_boundary([1, 5, 9]),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_scoring_pass_over_packed_pairs_keeps_what_one_over_rows_keeps(name: str) -> None:
    model = tiny_model("gemma3")
    assert enable_prompt_sharing(model)
    rows = pairs_with_prompts(7, prompt=(9, 14))
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, ids, _out: read.append(ids[0].numel()))
    found = []
    for shares in (False, True):
        read.clear()
        settings = ScoringSettings(max_tokens=70, progress=lambda done, total: None, shares_prompts=shares)
        kept = scoring_pass(model, rows.tokens, measure=MEASURES[name], settings=settings)
        found.append((kept, sum(read)))
    hook.remove()
    (separate, num_separate), (shared, num_shared) = found
    assert num_shared <= MOST_OF_SEPARATE * num_separate
    assert separate.keys() == shared.keys()
    for key, values in separate.items():
        np.testing.assert_allclose(shared[key], values, rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_scoring_pass_packs_no_pairs_where_that_would_compute_more() -> None:
    """A long and a short response: sorted alone they are padded less than as pairs of one prompt token."""
    lengths = np.tile([4, 40], 8)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    unit = np.zeros(starts[-1], dtype=np.int32)
    unit[starts[:-1]] = -1
    settings = ScoringSettings(max_tokens=80, progress=lambda done, total: None, shares_prompts=True)
    batches, packed = _batches_of(TokenRows(np.zeros_like(unit), starts, unit), settings)
    assert not packed
    assert sorted(np.concatenate(batches).tolist()) == list(range(16))
