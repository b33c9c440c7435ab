"""SFT, DPO and TIS-DPO against golden numbers of the public implementations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.dpo import DPO, DPOParams
from baselines.sft import SFT, SFTParams
from baselines.tis_dpo import TISDPO, TISDPOParams
from ctpd.objectives.base import Layout, Units, Weighting
from ctpd.ops.logps import token_logps
from ctpd.ops.spans import unit_logps
from ctpd.ops.weights import Signal, UnitLayout, WeightParameters, span_weights

VECTORS = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parents[1] / "fixtures" / "baselines_preference.json").read_text())[
        "vectors"
    ]
}
IGNORED = -100


def close(got: Tensor | float, expected: Any, *, vector: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=VECTORS[vector]["tol"],
        atol=VECTORS[vector]["tol"],
    )


def policy_units(logits_RTV: Tensor, labels_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Unit log-probabilities of the labelled tokens, one unit each, and the mask; ``logits[:, t]`` predicts label t."""
    scored = labels_RT != IGNORED
    width = logits_RTV.shape[-1]
    logps = token_logps(logits_RTV[scored], torch.eye(width, dtype=torch.float64), labels_RT[scored])
    logps_RT = torch.zeros(scored.shape, dtype=torch.float64).masked_scatter(scored, logps)
    unit_RT = (scored.cumsum(1) - 1).masked_fill(~scored, -1)
    num_units = int(scored.sum(1).max())
    return unit_logps(logps_RT, unit_RT, num_units=num_units), torch.arange(num_units) < scored.sum(1, keepdim=True)


def shifted(inputs: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Logits and labels of the convention `row t predicts label t`; the last row predicts nothing."""
    logits = torch.tensor(inputs[name], dtype=torch.float64, requires_grad=name == "policy_logits")
    return logits, torch.tensor(inputs["labels_unshifted"])[:, 1:]


def test_golden_dpo() -> None:
    """Loss, rewards, log-probabilities and the gradient of every logit of two DPO pairs."""
    inputs, expected = VECTORS["dpo"]["inputs"], VECTORS["dpo"]["expected"]
    logits, labels = shifted(inputs, "policy_logits")
    policy, mask = policy_units(logits[:, :-1], labels)
    reference, _ = policy_units(shifted(inputs, "reference_logits")[0][:, :-1], labels)
    objective = DPO(DPOParams(beta=VECTORS["dpo"]["params"]["beta"]))
    sums = objective(Units(policy=policy, mask=mask, reference=reference))
    close((policy * mask).sum(1), expected["policy_logps"], vector="dpo")
    close((reference * mask).sum(1), expected["reference_logps"], vector="dpo")
    close(sums.loss / sums.count, expected["loss_mean"], vector="dpo")
    for side in ("chosen", "rejected"):
        close(sums.metrics[f"rewards/{side}"], sum(expected[f"{side}_rewards"]), vector="dpo")
    grad = torch.autograd.grad(sums.loss / sums.count, logits)[0]
    close(grad, expected["grad_policy_logits"], vector="dpo")


def test_golden_tis_dpo() -> None:
    """The same with given token weights; the end token, which the public code weighs 0, is left out."""
    name = "tisdpo.token_level_False"
    inputs, expected = VECTORS[name]["inputs"], VECTORS[name]["expected"]
    logits, labels = shifted(inputs, "policy_logits")
    policy, mask = policy_units(logits[:, :-1], labels)
    reference, _ = policy_units(shifted(inputs, "reference_logits")[0][:, :-1], labels)
    weights_RT = torch.tensor(inputs["weights"], dtype=torch.float64)[:, 1:]
    weights = torch.zeros_like(policy).masked_scatter(mask, weights_RT[labels != IGNORED])
    objective = TISDPO(TISDPOParams(beta=VECTORS[name]["params"]["beta"]))
    counted = mask & (weights > 0)
    sums = objective(Units(policy=policy, mask=counted, reference=reference, weights=weights))
    close(sums.loss / sums.count, expected["loss_mean"], vector=name)
    for side in ("chosen", "rejected"):
        close(sums.metrics[f"rewards/{side}"], sum(expected[f"{side}_rewards"]), vector=name)
    close(torch.autograd.grad(sums.loss / sums.count, logits)[0], expected["grad_policy_logits"], vector=name)


def bigram_logps(weight: list[list[float]], ids: list[int], num_prompt: int) -> Tensor:
    """The response's log-probabilities under a model whose logits depend on the last token alone."""
    rows = torch.tensor(weight, dtype=torch.float64)[torch.tensor(ids[num_prompt - 1 : -1])]
    return token_logps(rows, torch.eye(rows.shape[1], dtype=torch.float64), torch.tensor(ids[num_prompt:]))


def test_golden_tis_dpo_weight_estimation() -> None:
    """The public code's token weights are our log ratio rounded to two decimals, with the opposite sign."""
    name = "tisdpo.weight_estimation"
    inputs, expected = VECTORS[name]["inputs"], VECTORS[name]["expected"]["raw_weights"]
    signals: dict[str, list[Tensor]] = {"student_positive": [], "student_negative": []}
    for prompt, response in zip(inputs["prompts"], inputs["responses"], strict=True):
        ids = [1, *(ord(c) - ord("a") + 2 for c in prompt + response)]
        for signal, model in zip(signals, ("bigram_logits_model_1", "bigram_logits_model_2"), strict=True):
            signals[signal].append(bigram_logps(inputs[model], ids, 1 + len(prompt)))
    starts = torch.tensor([0, *(len(response) for response in inputs["responses"])]).cumsum(0)
    result = span_weights(
        "student",
        {Signal(name): torch.cat(rows) for name, rows in signals.items()},
        UnitLayout(starts, torch.zeros(int(starts[-1]), dtype=torch.bool)),
        WeightParameters(round_decimals=2),
    )
    close(-result.log_ratio, [x for row in expected for x in row], vector=name)


def test_golden_sft_sums() -> None:
    """Cross-entropy of the labelled tokens: the sum, and the count that makes it a token mean."""
    inputs, expected = VECTORS["ce.dskd"]["inputs"], VECTORS["ce.dskd"]["expected"]
    logits = torch.tensor(inputs["student_logits"], dtype=torch.float64)
    policy, mask = policy_units(logits, torch.tensor(inputs["label"]))
    sums = SFT(SFTParams())(Units(policy=policy, mask=mask))
    close(sums.loss, expected["ce_sum"], vector="ce.dskd")
    assert int(sums.count) == expected["n_tokens"]
    close(sums.loss / sums.count, expected["ce_token_mean"], vector="ce.dskd")


def test_golden_sft_per_sequence() -> None:
    """The public DPO code's SFT is the same sum, divided by sequences."""
    name = "sft.sum_per_sequence"
    logits, labels = shifted(VECTORS[name]["inputs"], "policy_logits")
    policy, mask = policy_units(logits[:, :-1], labels)
    expected = VECTORS[name]["expected"]
    sums = SFT(SFTParams())(Units(policy=policy, mask=mask))
    close(sums.loss / len(policy), expected["loss_mean_over_sequences"], vector=name)
    close(sums.metrics["logps/chosen"], -sum(expected["losses"]), vector=name)
    for row, loss in enumerate(expected["losses"]):
        close(SFT(SFTParams())(Units(policy[row : row + 1], mask[row : row + 1])).loss, loss, vector=name)


def test_sft_gradient_is_minus_one_on_counted_units() -> None:
    """The gradient of the sum is -1 for each counted token and 0 elsewhere, NaN or not."""
    policy = torch.tensor([[-1.0, float("nan")], [-2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    sums = SFT(SFTParams())(Units(policy=policy, mask=mask))
    assert sums.loss.item() == 6.0
    assert torch.autograd.grad(sums.loss, policy)[0].tolist() == [[-1.0, 0.0], [-1.0, -1.0]]


@pytest.mark.parametrize(
    ("objective", "layout", "counts", "sides"),
    [
        (SFT(SFTParams()), Layout(granularity="tokens"), "tokens", ("chosen",)),
        (
            DPO(DPOParams()),
            Layout(granularity="spans", reference="initial"),
            "pairs",
            ("chosen", "rejected"),
        ),
        (
            TISDPO(TISDPOParams(k=2.0, mu=0.5, lower=-1.0, upper=1.0, round_decimals=2)),
            Layout(
                granularity="tokens",
                end_span=False,
                reference="initial",
                weighting=Weighting(
                    strategy="student",
                    parameters=WeightParameters(k=2.0, mu=0.5, lower=-1.0, upper=1.0, round_decimals=2),
                ),
            ),
            "pairs",
            ("chosen", "rejected"),
        ),
    ],
    ids=["sft", "dpo", "tis_dpo"],
)
def test_baselines_are_the_cells_of_the_method(
    objective: Any, layout: Layout, counts: str, sides: tuple[str, ...]
) -> None:
    """What each baseline asks of the pipeline is its row in docs/method.md#preference-objective."""
    assert (objective.layout, objective.counts, objective.sides) == (layout, counts, sides)
    assert isinstance(objective.params, objective.params_type)
