"""Token KD against golden numbers of DSKD and TRL, and what stored distributions can and cannot do."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from baselines.divergences import DIVERGENCES, find_divergence
from baselines.token_kd import TokenKD, TokenKDParams
from tests.fixtures.distillation import VECTORS, batch_of, leaf, single, stored, tokens, total

DSKD = ["forward_kl", "reverse_kl", "skewed_forward_kl", "js_divergence", "adaptive_kl"]
TRL = ["beta0.0.T1.0", "beta0.1.T1.0", "beta0.5.T1.0", "beta0.5.T0.9", "beta1.0.T1.0"]
CE_SUM = 11.817973300857895  # golden ce.dskd: same logits and labels as the divergences


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def golden_batch(vector, *, suffix="", label="label", tile_rows=2):
    inputs = vector["inputs"]
    student, labels = leaf(inputs[f"student_logits{suffix}"]), torch.tensor(inputs[label])
    teacher = tokens(float64(inputs[f"teacher_logits{suffix}"]), labels, tile_rows=tile_rows)
    return student, batch_of(tokens(student, labels, tile_rows=tile_rows), teacher)


def params_of(name, **more):
    return TokenKDParams(divergence=name, kd_rate=1.0, temperature=2.0, **more)


@pytest.mark.parametrize("name", DSKD)
def test_the_divergences_equal_dskd(name):
    vector = VECTORS[f"divergence.{name}.dskd"]
    student, batch = golden_batch(vector)
    sums = TokenKD(params_of(name))(batch)
    assert sums.count == 4
    assert total(sums) == pytest.approx(vector["expected"]["masked_sum"], abs=vector["tol"])
    (grad,) = torch.autograd.grad(sums.loss, student)
    torch.testing.assert_close(grad, float64(vector["expected"]["grad_student_logits"]), atol=vector["tol"], rtol=0)


@pytest.mark.parametrize("case", TRL)
def test_generalised_jsd_equals_trl(case):
    vector = VECTORS[f"jsd.trl.{case}"]
    given, expected = vector["params"], vector["expected"]
    student, batch = golden_batch(vector, suffix="_already_shifted", label="labels_already_shifted")
    params = TokenKDParams(
        divergence="generalised_jsd", kd_rate=1.0, temperature=given["temperature"], beta=given["beta"]
    )
    sums = TokenKD(params)(batch)
    assert total(sums) == pytest.approx(expected["sum"], abs=vector["tol"])
    (grad,) = torch.autograd.grad(sums.loss / sums.count, student)
    wanted = float64(expected["grad_student_logits_of_batchmean"])
    torch.testing.assert_close(grad, wanted, atol=vector["tol"], rtol=0)


def test_skewed_reverse_kl_is_its_formula():
    """There is no golden vector of it: KL(q || 0.9 p + 0.1 q) written out."""
    vector = VECTORS["divergence.reverse_kl.dskd"]
    _, batch = golden_batch(vector)
    keep = torch.tensor(vector["inputs"]["label"]).flatten() >= 0
    p, q = (
        (float64(vector["inputs"][f"{who}_logits"]).flatten(0, 1)[keep] / 2).softmax(-1)
        for who in ("teacher", "student")
    )
    expected = (q * (q / (0.9 * p + 0.1 * q)).log()).sum()
    assert total(TokenKD(params_of("skewed_reverse_kl"))(batch)) == pytest.approx(float(expected), abs=1e-12)


def test_cross_entropy_and_the_mix_equal_dskd():
    vector = VECTORS["divergence.forward_kl.dskd"]
    _, batch = golden_batch(vector)
    assert total(TokenKD(TokenKDParams(kd_rate=0.0))(batch)) == pytest.approx(CE_SUM, abs=1e-9)
    mix = 0.7 * CE_SUM + 0.3 * vector["expected"]["masked_sum"]
    assert total(TokenKD(TokenKDParams(kd_rate=0.3))(batch)) == pytest.approx(mix, abs=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_batch_is_the_sum_of_its_responses(name):
    _, batch = golden_batch(VECTORS["divergence.forward_kl.dskd"])
    objective = TokenKD(params_of(name))
    parts = [total(objective(single(batch, row))) for row in range(2)]
    assert sum(parts) == pytest.approx(total(objective(batch)), abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_size_of_a_tile_changes_nothing(name):
    vector = VECTORS["divergence.forward_kl.dskd"]
    totals = [total(TokenKD(params_of(name))(golden_batch(vector, tile_rows=size)[1])) for size in (1, 3, 64)]
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_are_no_distance_apart(name):
    logits = float64(VECTORS["divergence.forward_kl.dskd"]["inputs"]["teacher_logits"]).flatten(0, 1)
    student = logits.clone().requires_grad_()
    loss = find_divergence(name, temperature=2.0)(student, logits).sum()
    (grad,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_gradient_is_finite_where_a_probability_underflows(name):
    student = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 0.0, 300.0]])
    loss = find_divergence(name, temperature=1.0)(student, teacher).sum()
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_padding_columns_of_one_head_are_left_out():
    vector = VECTORS["divergence.forward_kl.dskd"]
    labels = torch.tensor(vector["inputs"]["label"])
    student, teacher = (float64(vector["inputs"][f"{who}_logits"]) for who in ("student", "teacher"))
    padded = torch.cat([teacher, torch.full((*teacher.shape[:2], 3), 9.0, dtype=torch.float64)], dim=-1)
    losses = [
        total(TokenKD(params_of("forward_kl"))(batch_of(tokens(student, labels), tokens(theirs, labels))))
        for theirs in (teacher, padded)
    ]
    assert losses[0] == losses[1]


def test_a_token_of_a_cut_teacher_row_counts_for_cross_entropy_only():
    vector = VECTORS["divergence.forward_kl.dskd"]
    _, batch = golden_batch(vector)
    short = replace(batch, aligned=torch.tensor([0, -1, 2, -1]))
    kept = sum(vector["expected"]["per_position"][row][column] for row, column in ((0, 1), (1, 2)))
    assert total(TokenKD(params_of("forward_kl"))(short)) == pytest.approx(kept, abs=1e-9)
    assert total(TokenKD(TokenKDParams(kd_rate=0.0))(short)) == pytest.approx(CE_SUM, abs=1e-9)


def test_tau_squared_scales_the_divergence_alone():
    _, batch = golden_batch(VECTORS["divergence.forward_kl.dskd"])
    plain, scaled = TokenKDParams(), TokenKDParams(tau_squared=True)
    added = total(TokenKD(scaled)(batch)) - total(TokenKD(plain)(batch))
    assert added == pytest.approx(0.5 * 3 * total(TokenKD(plain.model_copy(update={"kd_rate": 1.0}))(batch)), abs=1e-12)


@pytest.mark.parametrize("top_k", [5, 6])
def test_stored_rows_that_lack_at_most_one_token_lose_nothing(top_k):
    vector = VECTORS["divergence.forward_kl.dskd"]
    student, batch = golden_batch(vector)
    kept = replace(batch, teachers=(stored(batch.teachers[0], top_k=top_k, temperature=2.0),))
    sums = TokenKD(params_of("forward_kl", top_k=top_k))(kept)
    assert total(sums) == pytest.approx(vector["expected"]["masked_sum"], abs=1e-9)
    (grad,) = torch.autograd.grad(sums.loss, student)
    torch.testing.assert_close(grad, float64(vector["expected"]["grad_student_logits"]), atol=1e-9, rtol=0)


def test_fewer_kept_tokens_never_raise_the_divergence():
    _, batch = golden_batch(VECTORS["divergence.forward_kl.dskd"])
    losses = [
        total(
            TokenKD(params_of("forward_kl", top_k=k))(
                replace(batch, teachers=(stored(batch.teachers[0], top_k=k, temperature=2.0),))
            )
        )
        for k in range(1, 7)
    ]
    assert all(fewer <= more + 1e-12 for fewer, more in pairwise(losses))
    assert losses[0] < losses[-1]


def test_a_kept_token_without_a_column_of_the_student_joins_the_rest():
    vector = VECTORS["divergence.forward_kl.dskd"]
    labels = torch.tensor(vector["inputs"]["label"])
    student, teacher = (float64(vector["inputs"][f"{who}_logits"]) for who in ("student", "teacher"))
    wide = torch.cat([teacher, torch.full((*teacher.shape[:2], 1), 1.0, dtype=torch.float64)], dim=-1)
    theirs = stored(tokens(wide, labels), top_k=7, temperature=2.0)
    loss = total(TokenKD(params_of("forward_kl", top_k=7))(batch_of(tokens(student, labels), theirs)))
    keep = labels.flatten() >= 0
    p, q = (wide.flatten(0, 1)[keep] / 2).softmax(-1), (student.flatten(0, 1)[keep] / 2).softmax(-1)
    # All six columns are kept, so the student has no mass for the seventh: the floor of `buckets` answers for it.
    expected = (p[:, :6] * (p[:, :6] / q).log()).sum() + (
        p[:, 6] * (p[:, 6].log() + 30 * torch.tensor(10.0).log())
    ).sum()
    assert loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "forward_kl"])
def test_stored_distributions_are_refused_but_for_forward_kl(name):
    with pytest.raises(ValidationError, match=f"top_k: 50.*divergence: {name}"):
        TokenKD(params_of(name, top_k=50))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"divergence": "kl"}, "divergence"),
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 1.5}, "beta"),
        ({"skew": -0.1}, "skew"),
        ({"tail_mass": 2.0}, "tail_mass"),
        ({"kd_rate": 1.1}, "kd_rate"),
    ],
)
def test_bad_parameters_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TokenKD(TokenKDParams(**wrong))
