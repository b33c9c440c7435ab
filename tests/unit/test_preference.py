"""The preference objective: golden losses and gradients of all four cells, its arithmetic, metrics and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ctpd.objectives.base import Layout, Units, Weighting
from ctpd.objectives.preference import Preference, PreferenceParams, preference_sums
from ctpd.ops.logps import token_logps
from ctpd.ops.spans import flat_unit_sums, unit_logps
from ctpd.ops.weights import Signal, UnitLayout, WeightParameters, span_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "ctpd_loss.json").read_text())
SIDES = ("chosen", "rejected")
CELLS = {
    "ctpd": PreferenceParams(),
    "ctpd_student_reference": PreferenceParams(reference="student"),
    "ctpd_uniform_weights": PreferenceParams(weights="uniform"),
    "dpo": PreferenceParams(weights="uniform", reference="student"),
}


def golden_logps(logits: Tensor, labels: list[int], *, trained: bool = False) -> Tensor:
    """Log-probabilities through the program's own head: the logits are the hidden states, the head is the identity."""
    head = torch.eye(logits.shape[1], dtype=torch.float64, requires_grad=trained)
    return token_logps(logits, head, torch.tensor(labels), tile_bytes=2 * 8 * logits.shape[1])


def golden_signal(model: str, side: str) -> Tensor:
    """One frozen model's log-probabilities of the aligned spans of one response."""
    data = GOLDEN["sides"][side]
    who = "student" if model.startswith("student") else "teacher"
    logps = golden_logps(torch.tensor(data[f"{model}_logits"], dtype=torch.float64), data[f"{who}_labels"])
    spans = torch.tensor(data[f"{who}_span"])
    starts = torch.tensor([0, len(logps)]), torch.tensor([0, int(spans.max()) + 1])
    return flat_unit_sums(logps, spans, token_starts=starts[0], unit_starts=starts[1])


def golden_weights() -> list[Tensor]:
    signals = {
        Signal(f"teacher_{name}"): torch.cat([golden_signal(name, side) for side in SIDES])
        for name in ("positive", "negative")
    }
    counts = [len(GOLDEN["sides"][side]["weights"]) for side in SIDES]
    parameters = WeightParameters(k=GOLDEN["k"], lower=GOLDEN["L"], upper=GOLDEN["U"])
    is_end = torch.zeros(sum(counts), dtype=torch.bool)
    units = UnitLayout(torch.tensor([0, *counts]).cumsum(0), is_end)
    result = span_weights("teacher", signals, units, parameters)
    return list(result.weights.split(counts))


def pad(rows: list[Tensor], fill: float = 0.0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def close(got: Tensor | float, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("side", SIDES)
def test_golden_weights_and_signals(side: str) -> None:
    """Span log-probabilities, log ratios and weights are the golden ones."""
    data = GOLDEN["sides"][side]
    close(golden_signal("teacher", side), data["teacher_span_logps"])
    close(golden_signal("student", side), data["student_span_logps"])
    close(golden_signal("student_sft", side), data["student_sft_span_logps"])
    close(golden_signal("positive", side) - golden_signal("negative", side), data["log_ratio"])
    close(golden_weights()[SIDES.index(side)], data["weights"])


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("cell", CELLS)
def test_golden_losses_and_gradients(cell: str, trained: bool) -> None:
    """All four cells: loss, rewards and the gradient of every logit, through head, spans, weights and objective."""
    objective, expected = Preference(CELLS[cell]), GOLDEN["expected"][cell]
    assert objective.params.beta == GOLDEN["beta"]
    data = [GOLDEN["sides"][side] for side in SIDES]
    logits = [torch.tensor(d["student_logits"], dtype=torch.float64, requires_grad=True) for d in data]
    logps = [golden_logps(z, d["student_labels"], trained=trained) for z, d in zip(logits, data, strict=True)]
    counts = [len(d["weights"]) for d in data]
    policy = unit_logps(pad(logps), pad([torch.tensor(d["student_span"]) for d in data], -1), num_units=max(counts))
    reference_model = {"teacher": "teacher", "student": "student_sft"}[objective.params.reference]
    units = Units(
        policy=policy,
        mask=torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1),
        reference=pad([golden_signal(reference_model, side) for side in SIDES], 99.0),
        weights=pad(golden_weights(), 99.0) if objective.layout.weighting is not None else None,
    )
    sums = objective(units)
    close(sums.loss, expected["loss"])
    assert sums.count == 1
    for side in SIDES:
        close(sums.metrics[f"rewards/{side}"], expected[f"reward_{side}"])
    grads = torch.autograd.grad(sums.loss, logits)
    for side, grad in zip(SIDES, grads, strict=True):
        close(grad, expected["grad_student_logits"][side])


def random_units(*, num_pairs: int = 5, num_units: int = 4) -> Units:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * num_pairs, num_units)
    policy, reference, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=generator) < 0.7
    return Units(policy=policy * 3, mask=mask, reference=reference, weights=weights.exp())


def test_sums_equal_a_naive_loop_over_pairs() -> None:
    """Loss and every metric of docs/method.md#logged-metrics, pair by pair in plain Python, summed."""
    units, beta = random_units(), 0.7
    sums = preference_sums(units, beta=beta)
    expected: dict[str, float] = dict.fromkeys(sums.metrics, 0.0)
    loss = 0.0
    for i in range(5):
        rewards, logps = [], []
        for row in (i, i + 5):
            counted = [j for j in range(4) if units.mask[row, j]]
            p, r, w = (x[row].tolist() for x in (units.policy, units.reference, units.weights))
            rewards.append(beta * sum(w[j] * (p[j] - r[j]) for j in counted))
            logps.append(sum(p[j] for j in counted))
        margin = rewards[0] - rewards[1]
        loss += math.log1p(math.exp(-margin))
        pair = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": rewards[0] > rewards[1],
            "rewards/margins": margin,
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
            "policy/accuracies": logps[0] > logps[1],
            "saturation": 1 / (1 + math.exp(margin)),
        }
        expected = {name: total + pair[name] for name, total in expected.items()}
    assert sums.count == 5
    close(sums.loss, loss)
    assert {name: float(value) for name, value in sums.metrics.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in sums.metrics.values())


def test_what_the_mask_leaves_out_never_matters() -> None:
    """NaN in uncounted units changes neither loss nor gradients, and gets no gradient."""
    units = random_units()
    poisoned = [x.masked_fill(~units.mask, float("nan")) for x in (units.policy, units.reference, units.weights)]
    results = []
    for policy, reference, weights in [(units.policy, units.reference, units.weights), poisoned]:
        leaf = policy.clone().requires_grad_()
        loss = preference_sums(Units(leaf, units.mask, reference, weights), beta=0.3).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1])
    assert not results[1][1][~units.mask].any()


def test_gradients_are_right() -> None:
    """Analytic against numeric gradients of the policy; a saturated margin neither overflows nor stops the gradient."""
    units = random_units()
    leaf = units.policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda policy: preference_sums(units._replace(policy=policy), beta=0.5).loss, (leaf,)
    )
    far = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    units = Units(far, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1))
    loss = preference_sums(units, beta=0.1).loss
    assert loss.item() == pytest.approx(2000.0)
    torch.testing.assert_close(torch.autograd.grad(loss, far)[0], torch.tensor([[-0.1], [0.1]]))


def test_micro_batches_add_up() -> None:
    """Sums over parts are the sums over the whole: accumulation cannot change a step."""
    units = random_units()
    whole = preference_sums(units, beta=0.4)
    parts = [preference_sums(Units(*(x[rows] for x in units)), beta=0.4) for rows in ([0, 1, 5, 6], [2, 3, 4, 7, 8, 9])]
    close(sum(part.loss for part in parts), whole.loss)
    assert sum(part.count for part in parts) == whole.count
    for name, value in whole.metrics.items():
        close(sum(part.metrics[name] for part in parts), value)


def test_defaults_are_ctpd() -> None:
    """The defaults are the paper's cell: spans, the teacher's weights, the teacher's reference, end span counted."""
    objective = Preference(PreferenceParams())
    assert objective.layout == Layout(
        granularity="spans",
        aggregate="sum",
        end_span=True,
        reference="teacher",
        weighting=Weighting(
            strategy="teacher",
            parameters=WeightParameters(k=1.0, mu=1.0, lower=-0.5, upper=1.5, round_decimals=None),
        ),
    )
    assert objective.sides == SIDES
    assert objective.counts == "pairs"
    assert not list(objective.parameters())


def test_uniform_weights_need_nothing() -> None:
    """`uniform` means no weights: no signal is needed, and the loss is that of weight 1."""
    objective = Preference(PreferenceParams(weights="uniform"))
    assert objective.layout.weighting is None
    units = random_units()
    ones = units._replace(weights=torch.ones_like(units.policy))
    close(objective(units._replace(weights=None)).loss, objective(ones).loss)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weights": "teachr"}, "no weight strategy 'teachr'. Did you mean 'teacher'"),
        ({"granularity": "tokens"}, "cannot go with `weights: teacher` and `reference: teacher`"),
        ({"granularity": "tokens", "weights": "student"}, "cannot go with `reference: teacher`"),
        ({"granularity": "tokens", "weights": "lite", "reference": "student"}, "cannot go with `weights: lite`"),
        ({"beta": 0.0}, "greater than 0"),
    ],
)
def test_bad_cells_are_refused(params: dict[str, Any], message: str) -> None:
    """Unknown strategies and combinations without a meaning are refused, with a way to correct them."""
    with pytest.raises(ValidationError, match=message):
        Preference(PreferenceParams(**params))


def test_a_reference_shifted_to_margin_zero_is_the_students_own() -> None:
    """Adding a constant to each pair's reference, so that its margin is 0 before training, gives the loss with the student's
    reference: all that a teacher's reference does is to choose where on the sigmoid each pair begins."""
    units = random_units()
    units = units._replace(mask=torch.ones_like(units.mask))
    start, teacher = units.policy.detach() + 0.3 * torch.randn_like(units.policy), units.reference
    assert teacher is not None
    assert units.weights is not None
    weights = units.weights
    chosen, rejected = ((start - teacher) * weights).sum(1).chunk(2)
    shifted = teacher.clone()
    shifted[: len(chosen), 0] += (chosen - rejected) / weights[: len(chosen), 0]
    losses = [preference_sums(units._replace(reference=one), beta=0.3).loss for one in (shifted, start)]
    close(losses[0], losses[1].item())
