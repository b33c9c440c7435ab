"""MinED against golden numbers of the public implementation."""

import pytest
import torch
from pydantic import ValidationError

from baselines.mined import MinED, MinEDParams, teacher_to_student
from ctpd.objectives.distillation import ModelFacts
from ctpd.text.edit_distance import edit_distance_pairing
from tests.fixtures.distillation import VECTORS, batch_of, leaf, single, tokens, total

VECTOR = VECTORS["mined.dskd"]


def spelled(role, one):
    return [VECTOR["inputs"][f"{role}_vocab"][index] for index in one.inputs]


def golden(*, copies=1, tile_rows=2, dtype=torch.float64):
    """The batch of the vector, the response repeated, with aligned tokens from the warping."""
    inputs = VECTOR["inputs"]
    student = leaf(inputs["student_logits"])

    def side(role, logits_RTV):
        label, ids = (torch.tensor(inputs[f"{role}_{name}"]).repeat(copies, 1) for name in ("label", "input_ids"))
        return tokens(logits_RTV.to(dtype).repeat(copies, 1, 1), label, input_ids=ids, tile_rows=tile_rows)

    ours, theirs = (
        side("student", student),
        side("teacher", torch.tensor(inputs["teacher_logits"], dtype=torch.float64)),
    )
    num_ours, num_theirs = len(ours.row) // copies, len(theirs.row) // copies
    aligned = []
    for row in range(copies):
        found = edit_distance_pairing(spelled("student", ours)[:num_ours], spelled("teacher", theirs)[:num_theirs])
        aligned += [index + row * num_theirs if index >= 0 else -1 for index in found]
    return student, batch_of(ours, theirs, aligned=torch.tensor(aligned))


def mined(**params):
    objective = MinED(MinEDParams(**params))
    objective.map_vocabulary(VECTOR["inputs"]["tea2stu_id_mapping"])
    return objective


def test_divergence_and_gradient_equal_the_public_code():
    student, batch = golden()
    sums = mined(kd_rate=1.0)(batch)
    assert sums.count == 4
    assert float(sums.loss.detach()) == pytest.approx(VECTOR["expected"]["kd_sum"], abs=VECTOR["tol"])
    (grad,) = torch.autograd.grad(sums.loss, student)
    wanted = torch.tensor(VECTOR["expected"]["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, wanted, atol=VECTOR["tol"], rtol=0)


def test_ids_of_the_student_are_reached_by_the_first_of_the_teacher():
    objective = mined()
    found = dict(zip(map(str, objective.reached.tolist()), objective.first.tolist(), strict=True))
    assert found == VECTOR["inputs"]["student_to_first_teacher"]


def test_targets_equal_the_public_code():
    _, batch = golden()
    objective, wanted = mined(), torch.tensor(VECTOR["expected"]["aligned_teacher_logits"][0], dtype=torch.float64)
    teacher = batch.teachers[0]
    # Row 2, "Ġcats", has two aligned tokens: its target is its own token.
    assert batch.aligned.tolist() == [0, 1, -1, 4]
    for row in (0, 1, 3):
        logits = teacher.rows[0 : len(teacher.rows)][batch.aligned[row]]
        torch.testing.assert_close(logits[objective.first], wanted[row, objective.reached])


def test_float32_is_not_the_zero_of_the_public_code():
    _, batch = golden(dtype=torch.float32)
    found = total(mined(kd_rate=1.0)(batch))
    assert found == pytest.approx(VECTOR["expected"]["kd_sum"], rel=1e-6)
    assert VECTOR["expected_unpatched_float32"]["kd_sum"] == 0.0


def test_a_batch_is_the_sum_of_its_responses():
    _, batch = golden(copies=2)
    objective = mined()
    assert sum(total(objective(single(batch, row))) for row in range(2)) == pytest.approx(total(objective(batch)))
    assert total(objective(batch)) == pytest.approx(2 * total(objective(golden()[1])))


def test_tiles_change_nothing():
    losses = []
    for tile_rows in (1, 100):
        student, batch = golden(tile_rows=tile_rows)
        losses.append(torch.autograd.grad(mined()(batch).loss, student)[0])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-12, rtol=0)


def test_an_aligned_token_that_is_another_one_is_no_teacher():
    _, batch = golden()
    objective = MinED(MinEDParams(kd_rate=1.0))
    elsewhere = [5 - ours for ours in VECTOR["inputs"]["tea2stu_id_mapping"]]
    objective.map_vocabulary(elsewhere)
    logits = batch.student.rows[0 : len(batch.student.rows)]
    hard = torch.nn.functional.cross_entropy(logits / 2.0, batch.student.targets, reduction="sum")
    assert total(objective(batch)) == pytest.approx(float(hard.detach()))
    assert float(objective(batch).metrics["kd/aligned"]) == 0.0


def test_cross_entropy_alone_has_no_temperature():
    _, batch = golden()
    logits = batch.student.rows[0 : len(batch.student.rows)]
    wanted = torch.nn.functional.cross_entropy(logits, batch.student.targets, reduction="sum")
    assert total(mined(kd_rate=0.0)(batch)) == pytest.approx(float(wanted.detach()))


def facts(tokens, special=(), *, pad=0):
    ids = frozenset(tokens.index(token) for token in special)
    return ModelFacts(tokens=tokens, special_ids=ids, vocab_size=len(tokens) + pad, hidden_size=1)


def test_special_tokens_are_mapped_among_themselves_and_space_marks_are_equal():
    student = facts(["▁a", "<|im_en|>", "<|eot_id|>", "bc", ""], ["<|eot_id|>"])
    teacher = facts(["Ġa", "bcd", "<|im_end|>", ""], ["<|im_end|>"], pad=2)
    assert teacher_to_student(student, teacher) == [0, 3, 2, -1, -1, -1]


def test_bound_map_is_that_of_the_nearest_spellings_and_stays_out_of_checkpoints():
    _, batch = golden()
    student, teacher = (facts(VECTOR["inputs"][f"{role}_vocab"], ["<eos>"]) for role in ("student", "teacher"))
    bound, mapped = MinED(MinEDParams()), MinED(MinEDParams())
    bound.bind(student, teacher)
    mapped.map_vocabulary(teacher_to_student(student, teacher))
    assert bound.to_student[[0, 1, 4, 7]].tolist() == [0, 1, 3, 5]
    assert bound.state_dict() == {}
    assert total(bound(batch)) == total(mapped(batch))


@pytest.mark.parametrize(("name", "value"), [("kd_rate", -0.1), ("temperature", 0.0)])
def test_bad_parameters_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        MinED(MinEDParams(**{name: value}))
