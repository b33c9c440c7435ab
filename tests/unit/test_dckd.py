"""DCKD against golden numbers of the public code, and what each weight acts on."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from baselines.dckd import DCKD, DCKDParams
from ctpd.ops.weights import Signal
from tests.fixtures.distillation import VECTORS, batch_of, leaf, single, stored, tokens, total

VECTOR = VECTORS["dckd.fkl"]
KD_ONLY = {"sft_weight": 0.0, "top_k": 3}


def golden_batch(*, num_pairs, tile_rows=2, top_k=3):
    inputs = VECTOR["inputs"]
    labels = torch.tensor(inputs["labels_already_shifted"])
    student = leaf(inputs["policy_logits_already_shifted"])
    teacher = torch.tensor(inputs["teacher_logits_already_shifted"], dtype=torch.float64)
    theirs = stored(tokens(teacher, labels), top_k=top_k)
    return student, batch_of(tokens(student, labels, tile_rows=tile_rows), theirs, num_pairs=num_pairs)


def per_token(*, row):
    """The golden divergences of one response's tokens, from the public code's 4 buckets."""
    expected = VECTOR["expected"]
    labels = torch.tensor(VECTOR["inputs"]["labels_already_shifted"])[row]
    positions = (labels >= 0).nonzero()[:, 0]
    # The public code lays both from the first response token on; the golden arrays keep those positions.
    t, p = (
        torch.tensor(expected[f"{who}_k_plus_1"], dtype=torch.float64)[row][positions] for who in ("target", "policy")
    )
    return (t * (t.log() - p.log())).sum(-1)


def test_the_divergence_over_all_response_tokens_equals_the_public_code():
    student, batch = golden_batch(num_pairs=2)
    sums = DCKD(DCKDParams(**KD_ONLY))(batch)
    assert sums.count == 5
    mean = sums.loss / sums.count
    assert float(mean.detach()) == pytest.approx(VECTOR["expected"]["fkl"], abs=VECTOR["tol"])
    (grad,) = torch.autograd.grad(mean, student)
    wanted = torch.tensor(VECTOR["expected"]["grad_policy_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, wanted, atol=VECTOR["tol"], rtol=0)


def test_each_response_has_its_weight_and_the_chosen_tokens_divide_both():
    _, batch = golden_batch(num_pairs=1)
    sums = DCKD(DCKDParams(**KD_ONLY, distillation_weight=0.5, chosen_weight=0.1, rejected_weight=2.0))(batch)
    chosen, rejected = (float(per_token(row=row).sum()) for row in (0, 1))
    assert sums.count == 3
    assert total(sums) == pytest.approx(0.5 * (0.1 * chosen + 2.0 * rejected), abs=1e-7)
    assert float(sums.metrics["kd/chosen"]) == pytest.approx(chosen / 3, abs=1e-7)
    assert float(sums.metrics["kd/rejected"]) == pytest.approx(rejected / 3, abs=1e-7)


def test_cross_entropy_is_of_the_chosen_response_alone():
    student, batch = golden_batch(num_pairs=1)
    sums = DCKD(DCKDParams(sft_weight=2.0, distillation_weight=0.0, top_k=3))(batch)
    logps = student[0].detach().log_softmax(-1)
    expected = -sum(logps[position, label] for position, label in ((2, 2), (3, 5), (4, 1)))
    assert total(sums) == pytest.approx(2.0 * float(expected), abs=1e-12)
    (grad,) = torch.autograd.grad(sums.loss, student)
    assert (grad[1] == 0).all()


def test_a_batch_is_the_sum_of_its_responses():
    _, batch = golden_batch(num_pairs=2)
    objective = DCKD(DCKDParams(top_k=3))
    parts = [total(objective(single(batch, row))) for row in range(2)]
    assert sum(parts) == pytest.approx(total(objective(batch)), abs=1e-12)


def test_the_size_of_a_tile_changes_nothing():
    totals = [total(DCKD(DCKDParams(top_k=3))(golden_batch(num_pairs=1, tile_rows=size)[1])) for size in (1, 3, 64)]
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-12)


def test_a_token_without_an_aligned_token_has_no_divergence():
    _, batch = golden_batch(num_pairs=2)
    loss = total(DCKD(DCKDParams(**KD_ONLY))(replace(batch, aligned=torch.full_like(batch.aligned, -1))))
    assert loss == 0.0


def test_the_teacher_is_the_preference_tuned_one_and_stored():
    view = DCKD(DCKDParams()).teacher
    assert view is not None
    assert (view.models, view.top_k, view.temperature, view.same_tokenizer) == (
        (Signal.TEACHER_POSITIVE,),
        50,
        1.0,
        True,
    )


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"rejected_weight": -1.0}, {"sft_weight": -0.1}])
def test_bad_parameters_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValidationError, match=name):
        DCKD(DCKDParams(**wrong))
