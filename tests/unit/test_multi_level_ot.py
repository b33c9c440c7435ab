"""Multi-level OT against golden numbers of the public code and of CTPD's port, and what its batch does to it."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from baselines.multi_level_ot import MultiLevelOT, MultiLevelOTParams
from tests.fixtures.distillation import VECTORS, batch_of, leaf, single, stored, tokens, total


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def shifted(labels):
    """Labels that their own row predicts, of labels that the row before predicts."""
    labels = torch.tensor(labels)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def without_last(batch):
    """The aligned tokens under `skip_last`."""
    row = batch.student.row
    is_last = torch.cat([row[1:] != row[:-1], torch.tensor([True])])
    return replace(batch, aligned=batch.aligned.masked_fill(is_last, -1))


def golden_batch(vector, *, tile_rows=2):
    inputs = vector["inputs"]
    student = leaf(inputs["student_logits"])
    batch = batch_of(
        tokens(student, shifted(inputs["student_labels_unshifted"]), tile_rows=tile_rows),
        tokens(float64(inputs["teacher_logits"]), shifted(inputs["teacher_labels_unshifted"]), tile_rows=tile_rows),
    )
    return student, without_last(batch) if vector["params"]["skip_student_eos"] else batch


def ctpd_batch():
    inputs = VECTORS["mlot.ctpd_variant"]["inputs"]
    student, labels = leaf(inputs["student_logits"]), torch.tensor(inputs["label"])
    return student, batch_of(tokens(student, labels), tokens(float64(inputs["teacher_logits"]), labels))


@pytest.mark.parametrize("name", ["mlot.f1", "mlot.f1.topk"])
def test_loss_and_gradient_equal_the_public_code(name):
    vector = VECTORS[name]
    expected, skips = vector["expected"], vector["params"]["skip_student_eos"]
    student, batch = golden_batch(vector)
    sums = MultiLevelOT(MultiLevelOTParams(skip_student_eos=skips))(batch)
    assert total(sums) / sums.count == pytest.approx(expected["total"], abs=vector["tol"])
    parts = {part: float(value) / batch.num_pairs for part, value in sums.metrics.items()}
    assert parts["kd/nll"] == pytest.approx(expected["ce_token_mean"], abs=vector["tol"])
    assert parts["kd/had"] == pytest.approx(expected["component_HAD"], abs=vector["tol"])
    assert parts["kd/sl"] == pytest.approx(expected["component_SL_KL_wo"], abs=vector["tol"])
    assert parts["kd/sd"] == pytest.approx(expected["component_SD_sinkhorn_sum_x0_001"], abs=vector["tol"])
    student, batch = golden_batch(vector)
    distances = MultiLevelOT(MultiLevelOTParams(skip_student_eos=skips, ce_weight=0.0))(batch)
    assert total(distances) / distances.count == pytest.approx(expected["distill"], abs=vector["tol"])
    (grad,) = torch.autograd.grad(distances.loss / distances.count, student)
    torch.testing.assert_close(grad, float64(expected["grad_distill_student_logits"]), atol=vector["tol"], rtol=0)


def test_the_port_equals_a_transcription_of_it():
    vector = VECTORS["mlot.ctpd_variant"]
    expected = vector["expected"]
    student, batch = ctpd_batch()
    sums = MultiLevelOT(MultiLevelOTParams(ctpd_variant=True, ce_weight=0.0, distillation_weight=1.0))(batch)
    assert total(sums) / sums.count == pytest.approx(expected["kd_loss"], abs=vector["tol"])
    parts = {part: float(value) / batch.num_pairs for part, value in sums.metrics.items()}
    assert parts["kd/had"] == pytest.approx(expected["L_HAD"], abs=vector["tol"])
    assert 0.1 * parts["kd/sl"] == pytest.approx(expected["L_SL_weighted"], abs=vector["tol"])
    assert 0.1 * parts["kd/sd"] == pytest.approx(expected["L_SD_weighted"], abs=vector["tol"])
    (grad,) = torch.autograd.grad(sums.loss / sums.count, student)
    torch.testing.assert_close(grad, float64(expected["grad_student_logits"]), atol=vector["tol"], rtol=0)


def test_the_port_adds_the_sum_of_cross_entropies_to_means():
    student, batch = ctpd_batch()
    sums = MultiLevelOT(MultiLevelOTParams(ctpd_variant=True, ce_weight=0.5, distillation_weight=0.5))(batch)
    labels = torch.tensor(VECTORS["mlot.ctpd_variant"]["inputs"]["label"])
    nll = torch.nn.functional.cross_entropy(student.detach().flatten(0, 1), labels.flatten(), reduction="sum")
    expected = 0.5 * float(nll) + 0.5 * VECTORS["mlot.ctpd_variant"]["expected"]["kd_loss"]
    assert total(sums) / sums.count == pytest.approx(expected, abs=1e-9)


def test_a_response_changes_the_loss_of_its_batch_mates():
    """The published loss has no batch invariance: the columns are the batch's."""
    _, batch = golden_batch(VECTORS["mlot.f1"])
    # Without cross-entropy and the terms that average over padding too: what is left differs by the columns alone.
    only_had = MultiLevelOT(MultiLevelOTParams(ce_weight=0.0, sequence_weight=0.0, sinkhorn_weight=0.0))
    alone = [only_had(single(batch, row)).loss.detach() / count for row, count in ((0, 3), (1, 5))]
    assert abs(float(sum(alone)) / 2 - total(only_had(batch)) / 8) > 1e-3


@pytest.mark.parametrize("name", ["mlot.f1", "mlot.f1.topk"])
def test_the_size_of_a_tile_changes_nothing(name):
    objective = MultiLevelOT(MultiLevelOTParams(skip_student_eos=VECTORS[name]["params"]["skip_student_eos"]))
    totals = [total(objective(golden_batch(VECTORS[name], tile_rows=size)[1])) for size in (1, 3, 64)]
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-12)


def test_stored_rows_give_the_ports_distances_over_the_responses():
    """Where every position is a response's, both see the same rows: CTPD's numbers follow from stored ones."""
    inputs = VECTORS["mlot.ctpd_variant"]["inputs"]
    labels = torch.ones(2, 6, dtype=torch.long)
    student = leaf(inputs["student_logits"])
    teacher = tokens(float64(inputs["teacher_logits"])[..., :6], labels)
    online = batch_of(tokens(student, labels), teacher)
    kept = replace(online, teachers=(stored(teacher, top_k=6),))
    params = {"ce_weight": 0.0, "distillation_weight": 1.0, "skip_student_eos": False}
    port = MultiLevelOT(MultiLevelOTParams(**params, ctpd_variant=True))(online)
    bounded = MultiLevelOT(MultiLevelOTParams(**params, top_k=6))(kept)
    assert total(bounded) == pytest.approx(total(port), abs=1e-12)
    (grad,) = torch.autograd.grad(bounded.loss, student)
    assert (grad != 0).any()


def test_the_kept_columns_of_stored_rows_are_the_students_likeliest_too():
    _, batch = golden_batch(VECTORS["mlot.f1"])
    kept = replace(batch, teachers=(stored(batch.teachers[0], top_k=2),))
    weights = {"ce_weight": 0.0, "distillation_weight": 1.0, "sequence_weight": 0.0, "sinkhorn_weight": 0.0}
    sums = MultiLevelOT(MultiLevelOTParams(**weights, top_k=2))(kept)
    student = batch.student.rows[0:8].detach().softmax(-1).sort(-1, descending=True).values[:, :2]
    teacher = batch.teachers[0].rows[0:7].softmax(-1).sort(-1, descending=True).values[:, :2]
    # Student's tokens 0, 1 | 3..6 (the last of each is skipped), teacher's 0, 1 | 3..6.
    first, second = ((student[s] - teacher[t]).abs().sum(-1).mean() for s, t in (([0, 1],) * 2, ([3, 4, 5, 6],) * 2))
    assert total(sums) / sums.count == pytest.approx(float(first + second) / 2, abs=1e-12)


@pytest.mark.parametrize("top_k", [None, 3])
def test_one_token_responses_give_finite_numbers(top_k):
    """With the last token skipped nothing is left to compare; the public code divides by zero there."""
    labels = torch.tensor([[2, -100], [1, -100]])
    student = leaf(VECTORS["mlot.f1"]["inputs"]["student_logits"])
    teacher = tokens(float64(VECTORS["mlot.f1"]["inputs"]["teacher_logits"])[:, :2], labels)
    short = batch_of(tokens(student[:, :2], labels), teacher if top_k is None else stored(teacher, top_k=top_k))
    sums = MultiLevelOT(MultiLevelOTParams(top_k=top_k))(without_last(short))
    (grad,) = torch.autograd.grad(sums.loss, student)
    assert torch.isfinite(sums.loss)
    assert torch.isfinite(grad).all()
    assert float(sums.metrics["kd/had"]) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"ce_weight": -1.0},
        {"distillation_weight": -1.0},
        {"sequence_weight": -0.1},
        {"sinkhorn_weight": -1.0},
    ],
)
def test_bad_parameters_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValidationError, match=name):
        MultiLevelOT(MultiLevelOTParams(**wrong))


def test_the_port_refuses_stored_responses():
    with pytest.raises(ValidationError, match=r"ctpd_variant: true.*top_k: 50"):
        MultiLevelOT(MultiLevelOTParams(ctpd_variant=True, top_k=50))
