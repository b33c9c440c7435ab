"""ULD against golden numbers of the public implementations, and its bound for stored distributions."""

from dataclasses import replace

import pytest
import torch

from baselines.uld import ULD, ULDParams
from tests.fixtures.distillation import VECTORS, batch_of, leaf, single, stored, tokens, total


def golden_batch(vector):
    inputs = vector["inputs"]
    student = leaf(inputs["student_logits"])
    batch = batch_of(
        tokens(student, torch.tensor(inputs["student_label"])),
        tokens(torch.tensor(inputs["teacher_logits"], dtype=torch.float64), torch.tensor(inputs["teacher_label"])),
    )
    return student, batch


def test_loss_and_gradient_equal_the_public_code():
    vector = VECTORS["uld.dskd"]
    student, batch = golden_batch(vector)
    sums = ULD(ULDParams(kd_rate=vector["params"]["kd_rate"]))(batch)
    loss = sums.loss / vector["params"]["batch_denom"]
    (grad,) = torch.autograd.grad(loss, student)
    expected = vector["expected"]
    assert sums.count == 5
    assert float(loss.detach()) == pytest.approx(expected["total"], abs=vector["tol"])
    torch.testing.assert_close(
        grad, torch.tensor(expected["grad_student_logits"], dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_the_distance_alone_equals_the_public_code():
    vector = VECTORS["uld.dskd"]
    _, batch = golden_batch(vector)
    assert total(ULD(ULDParams(kd_rate=1.0))(batch)) == pytest.approx(vector["expected"]["uld_sum"], abs=vector["tol"])
    assert total(ULD(ULDParams(kd_rate=0.0))(batch)) == pytest.approx(vector["expected"]["ce_sum"], abs=vector["tol"])


def test_a_batch_is_the_sum_of_its_responses():
    _, batch = golden_batch(VECTORS["uld.dskd"])
    objective = ULD(ULDParams())
    parts = [total(objective(single(batch, row))) for row in range(2)]
    assert sum(parts) == pytest.approx(total(objective(batch)), abs=1e-12)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_stored_distributions_are_wrong_by_at_most_the_dropped_mass(top_k):
    _, batch = golden_batch(VECTORS["uld.dskd"])
    kept = stored(batch.teachers[0], top_k=top_k)
    exact = total(ULD(ULDParams(kd_rate=1.0))(batch))
    bounded = total(ULD(ULDParams(kd_rate=1.0, top_k=top_k))(replace(batch, teachers=(kept,))))
    used = batch.aligned[batch.aligned >= 0]
    dropped = float(kept.rows[0 : len(kept.rows)].rest[used].sum())
    assert abs(exact - bounded) <= dropped + 1e-12


def test_the_pairing_without_the_students_end_equals_the_original_code():
    """The original's normalisation (means of means, factor 1.5) is applied here; rows, pairing and gradient are ours."""
    vector = VECTORS["uld.original.skip_eos"]
    inputs, expected = vector["inputs"], vector["expected"]
    student = leaf(inputs["student_logits"])

    def preshifted(name):
        labels = torch.tensor(inputs[f"{name}_labels_unshifted"])
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)

    teacher = torch.tensor(inputs["teacher_logits"], dtype=torch.float64)
    batch = batch_of(tokens(student, preshifted("student")), tokens(teacher, preshifted("teacher")))
    is_last = torch.ones_like(batch.student.row, dtype=torch.bool)
    is_last[:-1] = batch.student.row[1:] != batch.student.row[:-1]
    batch = replace(batch, aligned=batch.aligned.masked_fill(is_last, -1))
    objective = ULD(ULDParams(kd_rate=1.0, skip_student_eos=True))
    assert objective.teacher.skip_last
    parts = []
    for row in range(batch.num_rows):
        one = single(batch, row)
        parts.append(objective(one).loss / int((one.aligned >= 0).sum()))
    distance = vector["params"]["distillation_weight"] * torch.stack(parts).mean()
    assert float(distance.detach()) == pytest.approx(expected["distill"], abs=vector["tol"])
    (grad,) = torch.autograd.grad(distance, student)
    wanted = torch.tensor(expected["grad_distill_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, wanted, atol=vector["tol"], rtol=0)
    count = len(batch.student.row)
    ce = total(ULD(ULDParams(kd_rate=0.0))(batch)) / count
    assert ce + expected["distill"] == pytest.approx(expected["total"], abs=vector["tol"])
