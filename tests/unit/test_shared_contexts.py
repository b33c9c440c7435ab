"""Common prefixes of requests are computed once; scores and texts equal those of lm-eval's own model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from ctpd.decoding import MaskedModel, Unsupported, greedy_tokens, is_plainly_greedy
from harness.backends import SharedContextLM
from harness.branching import BranchingModel
from harness.prefixes import GROUP_COST, Request, common, cost, pack, plain_cost, plan
from tests.fixtures.tokenizers import tokenizer, with_bos

SHAPE: dict[str, Any] = {
    "vocab_size": 460,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention"]
SHARING: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gemma2, window and caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=16, layer_types=MIXED)
    ),
    "gemma3, window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=8, query_pre_attn_scalar=16, layer_types=MIXED)
    ),
    "mistral, window in all layers": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
    "gpt2, absolute positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=460,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.4,
        )
    ),
}
SHOTS = "Question: what is it?\nAnswer: yes, it is. no, it is not.\n\n" * 2


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return SHARING[name]().eval()


def asked() -> list[Instance]:
    """Letters and answers after few-shot examples, two beginnings of one sentence, an empty context, long prompts, a repeat."""
    pairs = []
    for number in range(6):
        context = f"{SHOTS}Question: number {number * 37}" + " over" * (number % 3) + "\nAnswer:"
        pairs += [(context, f" {letter}") for letter in "ABCD"]
        pairs += [(context, answer) for answer in (" yes", " no, it is not", " the lazy dog", " the lazy fox jumps")]
        pairs += [(context + option, " has 7 apples") for option in (" Tom", " the brown fox")]
    pairs += [("", "the quick"), ("", "a lazy dog"), ("x" * 300, " y"), ("x" * 300, " yes no"), pairs[0]]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def stock(model: PreTrainedModel, tok: Any, batch_size: int = 4) -> HFLM:
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tok), batch_size=batch_size, softmax_dtype="float32")


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("tok", [tokenizer("byte_bpe"), with_bos("byte_bpe")], ids=["byte_bpe", "bos"])
def test_log_likelihoods_are_those_of_separate_passes(name: str, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the requests, with the greedy flags, for windows shorter than a prompt and prompts that are cut."""
    monkeypatch.setattr("harness.prefixes.GROUP_COST", 64)
    model = made(name)
    ours = SharedContextLM(model, tok, batch_size=4, progress=None)
    assert ours.unshared is None
    requests = asked()
    found, expected = ours.loglikelihood(requests), stock(model, tok).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_far_fewer_tokens_are_computed_and_the_prefix_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.prefixes.GROUP_COST", 64)
    model, tok = made("llama"), tokenizer("byte_bpe")
    ours = SharedContextLM(model, tok, batch_size=4, progress=None)
    sizes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
    requests = asked()[:-5]
    ours.loglikelihood(requests)
    shared = sum(rows * width for rows, width in sizes)
    sizes.clear()
    stock(model, tok).loglikelihood(requests, disable_tqdm=True)
    assert shared < 0.35 * sum(rows * width for rows, width in sizes)


def test_progress_and_the_response_cache_get_every_request_once() -> None:
    model, tok = made("llama"), tokenizer("byte_bpe")
    seen: list[tuple[int, int]] = []
    requests = asked()
    SharedContextLM(model, tok, batch_size=4, progress=lambda *counts: seen.append(counts)).loglikelihood(requests)
    assert seen == [(done, len(requests)) for done in range(len(requests) + 1)]

    heard = []

    class Hook(CacheHook):
        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            heard.append((attr, req, res))

    ours = SharedContextLM(model, tok, batch_size=4, progress=None)
    ours.set_cache_hook(Hook(None))
    answers = ours.loglikelihood(requests)
    expected = [("loglikelihood", request.args, answer) for request, answer in zip(requests, answers, strict=True)]
    assert sorted(heard, key=repr) == sorted(expected, key=repr)


def test_a_model_without_4d_masks_is_called_plainly_and_the_reason_recorded() -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=460, hidden_size=32, n_layer=2, n_head=2)).eval()
    tok = tokenizer("byte_bpe")
    ours = SharedContextLM(model, tok, batch_size=4, progress=None)
    assert ours.unshared is not None
    requests = asked()
    assert ours.loglikelihood(requests) == stock(model, tok).loglikelihood(requests, disable_tqdm=True)


def test_a_model_that_ignores_its_arguments_is_refused() -> None:
    """It accepts every argument and gives different logits, which only the probe finds."""

    class IgnoresPositions(LlamaForCausalLM):
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    with pytest.raises(Unsupported, match="logits differ"):
        BranchingModel(IgnoresPositions(LlamaConfig(**SHAPE)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of kind linear_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "length of the whole batch"),
        ({"attn_implementation": "flex_attention"}, "takes no mask of ours"),
    ],
)
def test_unsupported_models_are_recognised_by_their_configuration(changes: dict[str, Any], reason: str) -> None:
    config = LlamaConfig(**SHAPE, **{k: v for k, v in changes.items() if k != "layer_types"})
    model = LlamaForCausalLM(config)
    if "layer_types" in changes:
        model.config.layer_types = changes["layer_types"]
    with pytest.raises(Unsupported, match=reason):
        BranchingModel(model)


def test_scores_in_bfloat16_are_within_its_noise() -> None:
    model, tok = made("llama").to(torch.bfloat16), tokenizer("byte_bpe")
    requests = asked()
    ours = SharedContextLM(model, tok, batch_size=4, progress=None)
    assert ours.unshared is None
    found, expected = ours.loglikelihood(requests), stock(model, tok).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=0.03, abs=0.5)


def test_a_row_holds_each_common_token_once_and_a_token_sees_its_own_branch() -> None:
    requests = {0: Request((5, 6, 7, 8, 9), 2), 1: Request((5, 6, 7, 3), 1), 2: Request((5, 6, 7, 4, 1, 2), 3)}
    row = pack(requests, skip=1)
    assert row.tokens == (6, 7, 4, 1, 8)
    assert row.positions == (1, 2, 3, 4, 3)
    assert row.branches == ((0, 2, -1), (2, 4, 1), (4, 5, 1))
    assert dict(row.readings) == {1: (1,), 2: (1, 2, 3), 0: (1, 4)}
    assert row.kept == 4


def test_few_shot_examples_of_many_documents_become_a_prefix_and_few_documents_none() -> None:
    shots = tuple(range(100, 400))
    documents = [Request((*shots, number, 50 + number, letter), 1) for number in range(10) for letter in (1, 2, 3, 4)]
    (group,) = plan(documents)
    assert group.prefix == shots[:288]  # a multiple of the grain
    assert len(group.rows) == 10
    assert cost([group]) == 288 + 10 * 14
    assert plain_cost(documents) == 10 * 302
    assert (len(shots) // 32 * 32) < GROUP_COST  # two documents do not pay for a pass of their own
    assert [group.prefix for group in plan(documents[:8])] == [()]


def test_every_request_is_in_one_row_whatever_they_have_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(200):
        tokens = torch.randint(0, 2, (int(torch.randint(2, 90, (1,), generator=generator)),), generator=generator)
        scored = int(torch.randint(1, len(tokens), (1,), generator=generator))
        requests.append(Request(tuple([0] * 40 + tokens.tolist()), scored))
    groups = plan(requests)
    found = [index for group in groups for row in group.rows for index, _ in row.readings]
    assert sorted(found) == list(range(200))
    for group in groups:
        for row in group.rows:
            for index, nodes in row.readings:
                request = requests[index]
                read = request.tokens[:-1]
                assert common(group.prefix, read) == len(group.prefix)
                assert tuple(row.tokens[node] for node in nodes) == read[-request.scored :]
                assert [row.positions[node] for node in nodes] == list(range(len(read) - request.scored, len(read)))


def prompts(number: int = 11) -> list[str]:
    return [SHOTS[: 30 * (1 + i % 3)] + f"Question: number {i * 31}\nAnswer:" for i in range(number)]


@pytest.mark.parametrize("name", SHARING)
def test_greedy_texts_are_those_of_lm_evals_own_model(name: str) -> None:
    """Stop strings within and across tokens, rows that stop at different times, two kinds of settings."""
    model, tok = made(name), tokenizer("byte_bpe")
    ours = SharedContextLM(model, tok, batch_size=4, progress=None)
    free = stock(model, tok).generate_until(requests_of(prompts(), ["\n\n\n"]), disable_tqdm=True)
    spanning = free[0][4:9]  # five characters from the middle of a text: no token by itself
    requests = requests_of(prompts(), ["\n\n", spanning, "no"]) + requests_of(prompts(3), spanning, room=9)
    texts = ours.generate_until(requests)
    assert texts == stock(model, tok).generate_until(requests, disable_tqdm=True)
    assert texts[0] == free[0].split("\n\n")[0].split(spanning)[0].split("no")[0]
    assert len(texts[0]) < len(free[0])


def requests_of(texts: list[str], until: Any, room: int = 24) -> list[Instance]:
    options = {"until": until, "max_gen_toks": room, "do_sample": False}
    return [Instance("generate_until", {}, (text, dict(options)), number) for number, text in enumerate(texts)]


def test_prompts_that_do_not_fit_are_cut_as_lm_eval_cuts_them() -> None:
    model, tok = made("llama"), tokenizer("byte_bpe")
    requests = requests_of([SHOTS * 4 + "Answer:", "x" * 200, "short"], ["\n\n"])
    ours = SharedContextLM(model, tok, batch_size=3, progress=None)
    assert ours.generate_until(requests) == stock(model, tok).generate_until(requests, disable_tqdm=True)
    assert ours.num_truncated == 2


def test_finished_rows_leave_the_batch() -> None:
    model = MaskedModel(made("llama"))
    rows: list[int] = []
    model.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    given = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    whole = greedy_tokens(model, given, room=[6] * 4, finished=lambda tokens: False)
    rows.clear()
    last = {tokens[1] for tokens in whole[:3]} - {whole[3][1]}
    short = greedy_tokens(model, given, room=[6] * 4, finished=lambda tokens: len(tokens) == 2 and tokens[1] in last)
    assert [len(tokens) for tokens in short].count(2) >= 2
    assert rows[0] == 4
    assert rows[-1] < 4
    for tokens, longer in zip(short, whole, strict=True):
        assert tokens == longer[: len(tokens)]


def test_settings_that_move_the_choice_of_tokens_are_left_to_transformers() -> None:
    model, tok = made("llama"), tokenizer("byte_bpe")
    assert is_plainly_greedy(model.generation_config)
    model.generation_config.repetition_penalty = 1.5
    assert not is_plainly_greedy(model.generation_config)
    requests = requests_of(prompts(4), ["\n\n"])
    ours = SharedContextLM(model, tok, batch_size=4, progress=None).generate_until(requests)
    assert ours == stock(model, tok).generate_until(requests, disable_tqdm=True)
