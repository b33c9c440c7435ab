"""GOLD against golden numbers of TRL: groups, merged distributions, and the losses with their gradients."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from baselines.gold import GOLD, GOLDParams, Members, log_factors
from ctpd.core.errors import UserError
from ctpd.objectives.distillation import ModelFacts
from ctpd.ops.logit_rows import Head, LogitRows
from ctpd.text.align import align_spans
from tests.fixtures.distillation import IGNORED, VECTORS, batch_of, leaf, single, tokens, total

LOSSES = ["gold.observed", "gold.bayesian", "gold.positional", "gold.observed_hybrid", "gold.bayesian_hybrid"]
WITH_CE = VECTORS["gold.observed_with_eos_and_ce"]
NUM_LABELS = (5, 3)  # of the two responses, as the student has them


def params_of(vector, **changes):
    given = vector["params"]
    assert given["uld_skip_student_eos"] == given["uld_skip_teacher_eos"]
    return GOLDParams(
        **{
            "ce_weight": given["uld_crossentropy_weight"],
            "hybrid": given["uld_use_hybrid_loss"],
            "beta": given["beta"],
            "matched_weight": given["uld_hybrid_matched_weight"],
            "unmatched_weight": given["uld_hybrid_unmatched_weight"],
            "student_temperature": given["uld_student_temperature"],
            "teacher_temperature": given["uld_teacher_temperature"],
            "skip_end": given["uld_skip_student_eos"],
            "groups": "spans" if given["use_extended_uld"] else "positions",
            "merge": given["uld_token_merge_strategy"],
            **changes,
        }
    )


def golden_batch(vector, *, tile_rows=2, dtype=torch.float64):
    """The vector as a batch of ours: labels shifted, byte offsets turned into spans, the end of turn a span."""
    inputs = vector["inputs"]
    student = leaf(inputs["student_logits"])
    ends = {
        side: [
            [offset[1] for offset, label in zip(offsets, labels, strict=True) if label != IGNORED]
            for offsets, labels in zip(inputs[f"{side}_byte_offsets"], inputs[f"{side}_labels"], strict=True)
        ]
        for side in ("student", "teacher")
    }
    units = {"student": [], "teacher": []}
    for ours, theirs in zip(ends["student"], ends["teacher"], strict=True):
        pairs = {
            side: [[start, end] for start, end in zip([0, *found], found[:-1], strict=False)]
            for side, found in (("teacher", theirs), ("student", ours))
        }
        spans = align_spans(pairs["teacher"], pairs["student"], ours[-1])
        units["teacher"] += [*spans.teacher_span, len(spans.boundaries)]
        units["student"] += [*spans.student_span, len(spans.boundaries)]
    made = {}
    for side, logits_RTV in (("student", student), ("teacher", leaf(inputs["teacher_logits"]).detach())):
        labels_RT = torch.tensor(inputs[f"{side}_labels"])
        shifted_RT = torch.full_like(labels_RT, IGNORED)
        shifted_RT[:, :-1] = labels_RT[:, 1:]
        made[side] = tokens(
            logits_RTV.to(dtype),
            shifted_RT,
            unit=torch.tensor(units[side]),
            input_ids=torch.tensor(inputs[f"{side}_input_ids"]),
            tile_rows=tile_rows,
        )
    return student, batch_of(made["student"], made["teacher"], aligned=torch.full_like(made["student"].row, -1))


def facts_of(vocab, width):
    spelled = [""] * width
    for token, index in vocab.items():
        spelled[index] = token
    return ModelFacts(tokens=spelled, special_ids=frozenset(), vocab_size=width, hidden_size=1)


def bound(params, vector):
    objective = GOLD(params)
    inputs = vector["inputs"]
    objective.bind(facts_of(inputs["student_vocab"], 6), facts_of(inputs["teacher_vocab"], 7))
    return objective


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_the_public_code(name):
    vector = VECTORS[name]
    student, batch = golden_batch(vector)
    sums = bound(params_of(vector), vector)(batch)
    (grad,) = torch.autograd.grad(sums.loss / sums.count, student)
    expected = vector["expected"]
    assert sums.count == 2
    assert total(sums) / 2 == pytest.approx(expected["loss"], abs=vector["tol"])
    torch.testing.assert_close(
        grad, torch.tensor(expected["grad_student_logits"], dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("name", ["gold.observed_hybrid", "gold.bayesian_hybrid"])
def test_both_parts_of_the_hybrid_form_equal_the_public_code(name):
    vector = VECTORS[name]
    _, batch = golden_batch(vector)
    metrics = bound(params_of(vector), vector)(single(batch, 1)).metrics
    for part in ("matched", "unmatched"):
        assert float(metrics[f"kd/{part}"]) == pytest.approx(vector["expected"][f"last_sample_{part}"], abs=1e-9)


def test_end_temperature_and_cross_entropy_equal_the_public_code():
    """TRL's cross-entropy is a mean over the tokens of a micro-batch: ours, weighted by each response's tokens."""
    student, batch = golden_batch(WITH_CE)
    params = params_of(WITH_CE)
    with_ce, without = bound(params, WITH_CE), bound(params_of(WITH_CE, ce_weight=0.0), WITH_CE)
    parts = [single(batch, row) for row in range(2)]
    nll = [with_ce(part).loss - without(part).loss for part in parts]
    loss = without(batch).loss / 2 + sum(n * one for n, one in zip(NUM_LABELS, nll, strict=True)) / sum(NUM_LABELS)
    (grad,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(WITH_CE["expected"]["loss"], abs=1e-9)
    expected = torch.tensor(WITH_CE["expected"]["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", range(5))
def test_our_spans_are_trl_s_groups(case):
    """A token without text (case 5) is an end of turn, which is a span of its own and takes no part in the alignment."""
    given, groups = VECTORS["gold.align"]["inputs"]["cases"][case], VECTORS["gold.align"]["expected"]["groups"][case]
    offsets = {side: [o for o in given[f"{side}_offsets"] if o[0] < o[1]] for side in ("student", "teacher")}
    spans = align_spans(offsets["teacher"], offsets["student"], max(o[1] for side in offsets.values() for o in side))
    ours = [
        [[n for n, span in enumerate(side) if span == s] for s in range(len(spans.boundaries))]
        for side in (spans.student_span, spans.teacher_span)
    ]
    num_ends = len(given["student_offsets"]) - len(offsets["student"])
    assert ours == [side[: len(side) - num_ends] for side in groups]


def test_merged_distributions_equal_the_public_code():
    vector = VECTORS["gold.merge"]
    probs, ids = leaf(vector["inputs"]["probs"]).detach(), torch.tensor(vector["inputs"]["token_ids"])
    rows = LogitRows(probs.log(), Head(nn.Identity(), probs.shape[1]), tile_bytes=1)
    for merge, base, others in (("observed", [0, 1], [2, 3]), ("bayesian", [0, 3], [1, 2])):
        members = Members(torch.tensor(base), torch.tensor(others), torch.tensor([1, 1]))
        factors = log_factors(rows, ids, members, temperature=1.0)
        merged = probs[members.base] * factors.exp()[:, None]
        expected = torch.tensor(vector["expected"][merge], dtype=torch.float64)
        torch.testing.assert_close(merged, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"ce_weight": 0.3}, {"hybrid": True}, {"merge": "observed"}])
def test_a_batch_is_the_sum_of_its_responses(changes):
    vector = VECTORS["gold.bayesian"]
    _, batch = golden_batch(vector)
    objective = bound(params_of(vector, **changes), vector)
    parts = [total(objective(single(batch, row))) for row in range(2)]
    assert sum(parts) == pytest.approx(total(objective(batch)), abs=1e-12)


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_size_of_a_tile_changes_nothing(hybrid):
    vector = VECTORS["gold.bayesian"]
    objective = bound(params_of(vector, hybrid=hybrid), vector)
    losses = [total(objective(golden_batch(vector, tile_rows=size)[1])) for size in (1, 3, 100)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-14)


def test_fixed_weights_replace_those_of_the_overlap_and_beta_0_may_be_negative():
    vector = VECTORS["gold.bayesian_hybrid"]
    _, batch = golden_batch(vector)
    weights = {"matched_weight": 0.3, "unmatched_weight": 0.7}
    sums = bound(params_of(vector, beta=0.0, **weights), vector)(single(batch, 1))
    matched, unmatched = float(sums.metrics["kd/matched"]), float(sums.metrics["kd/unmatched"])
    assert matched == pytest.approx(-0.030580, abs=5e-7)  # docs/method.md#gold
    assert total(sums) == pytest.approx(0.3 * matched + 0.7 * unmatched, abs=1e-12)


def test_both_ends_of_beta_are_the_two_divergences():
    """The middle formula tends to 0 at both ends; the switch is TRL's."""
    vector = VECTORS["gold.bayesian_hybrid"]
    _, batch = golden_batch(vector)
    one = replace(single(batch, 1), teachers=(single(batch, 1).student,))
    facts = facts_of(vector["inputs"]["student_vocab"], 6)
    for beta in (0.0, 0.5, 1.0):
        objective = GOLD(params_of(vector, beta=beta))
        objective.bind(facts, facts)
        assert total(objective(one)) == pytest.approx(0.0, abs=1e-12)
    backward, forward = (
        float(bound(params_of(vector, beta=beta), vector)(batch).metrics["kd/matched"]) for beta in (1.0, 0.0)
    )
    assert backward != pytest.approx(forward, abs=1e-3)


def test_a_response_of_its_end_alone_adds_nothing_but_stays_in_the_mean():
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[4, IGNORED, IGNORED], [1, 4, IGNORED]])
    student = tokens(logits, labels, unit=torch.tensor([0, 0, 1]))
    batch = batch_of(student, tokens(3 * logits.detach(), labels, unit=torch.tensor([0, 0, 1])))
    objective = GOLD(GOLDParams())
    sums = objective(batch)
    (grad,) = torch.autograd.grad(sums.loss, logits)
    assert sums.count == 2
    assert sums.loss.dtype == torch.float32
    assert total(objective(single(batch, 0))) == 0.0
    assert float(grad[0].abs().sum()) == 0.0
    assert float(grad[1].abs().sum()) > 0.0


def test_a_span_that_loses_its_last_token_on_one_side_is_dropped():
    """A response that was cut has no end of turn: TRL drops a token of text then, and so do we."""
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    student = tokens(logits, torch.tensor([[1, 2, 3, IGNORED]]), unit=torch.tensor([0, 1, 1]))
    teacher = tokens(3 * logits, torch.tensor([[1, 2, IGNORED, IGNORED]]), unit=torch.tensor([0, 1]))
    cut = GOLD(GOLDParams())(batch_of(student, teacher))
    whole = GOLD(GOLDParams(skip_end=False))(batch_of(student, teacher))
    first = GOLD(GOLDParams(skip_end=False))(
        batch_of(
            tokens(logits, torch.tensor([[1, IGNORED, IGNORED, IGNORED]])),
            tokens(3 * logits, torch.tensor([[1, IGNORED, IGNORED, IGNORED]])),
        )
    )
    assert total(cut) == pytest.approx(total(first), abs=1e-6)
    assert total(cut) != pytest.approx(total(whole), abs=1e-3)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"beta": -0.1}, "beta"),
        ({"ce_weight": -1.0}, "ce_weight"),
        ({"teacher_temperature": 0.0}, "teacher_temperature"),
        ({"matched_weight": 0.5}, "unmatched_weight"),
    ],
)
def test_bad_parameters_are_refused(bad, named):
    with pytest.raises(ValidationError, match=named):
        GOLD(GOLDParams(**bad))


def test_the_hybrid_form_refuses_vocabularies_without_a_shared_token():
    with pytest.raises(UserError, match="share none"):
        GOLD(GOLDParams(hybrid=True)).bind(facts_of({"a": 0}, 2), facts_of({"b": 0}, 2))
