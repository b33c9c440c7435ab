"""DSKD, with and without cross-model attention, against golden numbers of the public implementation."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from baselines.divergences import DIVERGENCES
from baselines.dskd import DSKD, DSKDParams
from baselines.dskd_cma import DSKDCMA, DSKDCMAParams, response_std
from ctpd.objectives.distillation import ModelFacts
from tests.fixtures.distillation import VECTORS, batch_of, fill_linear, leaf, single, tokens, total, under_head

SAME, CROSS = VECTORS["dskd.forward_kl"], VECTORS["dskd_cma.forward_kl"]


def facts(hidden_size: int, vocab_size: int) -> ModelFacts:
    return ModelFacts(tokens=[""] * vocab_size, special_ids=frozenset(), vocab_size=vocab_size, hidden_size=hidden_size)


def golden(objective, vector, *, tile_rows=2):
    """The objective with the vector's projectors, its batch, and the tensors that gradients are given for."""
    inputs = vector["inputs"]
    leaves = {"student_hidden": leaf(inputs["student_hidden"])}
    for name in ("student_lm_head", "teacher_lm_head", "student_embed", "teacher_embed"):
        if name in inputs:
            leaves[name] = nn.Parameter(torch.tensor(inputs[name], dtype=torch.float64))
    objective.bind(
        facts(leaves["student_hidden"].shape[-1], len(inputs["student_lm_head"])),
        facts(len(inputs["teacher_lm_head"][0]), len(inputs["teacher_lm_head"])),
    )
    objective.double()
    for name, linear in objective.named_children():
        fill_linear(linear, inputs, name)
        leaves |= {f"{name}_weight": linear.weight, f"{name}_bias": linear.bias}

    def side(role, hidden, label):
        ids, embed = inputs.get(f"{role}_input_ids"), leaves.get(f"{role}_embed")
        one = tokens(
            hidden,
            torch.tensor(inputs[label]),
            input_ids=None if ids is None else torch.tensor(ids),
            embed=lambda index, embed=embed: embed[index].detach(),
        )
        return under_head(one, leaves[f"{role}_lm_head"], tile_rows=tile_rows)

    teacher = torch.tensor(inputs["teacher_hidden"], dtype=torch.float64)
    batch = batch_of(side("student", leaves["student_hidden"], "label"), side("teacher", teacher, "teacher_label"))
    return batch, leaves


def same(*, tile_rows=2, **params):
    objective = DSKD(DSKDParams(**params))
    return objective, *golden(objective, SAME, tile_rows=tile_rows)


def cross(*, tile_rows=2, std_scope="all", **params):
    objective = DSKDCMA(DSKDCMAParams(std_scope=std_scope, **params))
    return objective, *golden(objective, CROSS, tile_rows=tile_rows)


BOTH = pytest.mark.parametrize(("vector", "make"), [(SAME, same), (CROSS, cross)], ids=["same", "cma"])


@BOTH
def test_every_term_equals_the_public_code(vector, make):
    objective, batch, _ = make()
    sums, expected = objective(batch), vector["expected"]
    assert sums.count == vector["params"]["batch_denom"]
    loss = float(sums.loss.detach()) / vector["params"]["batch_denom"]
    assert loss == pytest.approx(expected["total"], abs=vector["tol"])
    parts = {"nll": "nll_loss", "t2s_ce": "t2s_ce_loss", "t2s_kd": "t2s_kd_loss", "s2t_kd": "s2t_kd_loss"}
    for name, public in parts.items():
        found = float(sums.metrics[f"kd/{name}"]) * sums.count / batch.num_pairs
        assert found == pytest.approx(expected[public], abs=vector["tol"]), name


@BOTH
def test_gradients_equal_the_public_code_and_null_is_no_path(vector, make):
    objective, batch, leaves = make()
    (objective(batch).loss / vector["params"]["batch_denom"]).backward()
    for name, expected in vector["expected"]["grad"].items():
        if expected is None:
            assert leaves[name].grad is None, name
        else:
            wanted = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(leaves[name].grad, wanted, atol=vector["tol"], rtol=0, msg=name)
    assert leaves["teacher_lm_head"].grad is None


@BOTH
def test_tiles_change_nothing(vector, make):
    results = []
    for tile_rows in (1, 100):
        objective, batch, leaves = make(tile_rows=tile_rows)
        loss = objective(batch).loss
        results.append((float(loss.detach()), torch.autograd.grad(loss, leaves["student_hidden"])[0]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-12, rtol=0)


def parts(objective, batch):
    return sum(total(objective(single(batch, row))) for row in range(batch.num_rows))


def test_a_batch_is_the_sum_of_its_responses():
    objective, batch, _ = same()
    assert parts(objective, batch) == pytest.approx(total(objective(batch)), abs=1e-12)
    objective, batch, _ = cross(std_scope="valid")
    assert parts(objective, batch) == pytest.approx(total(objective(batch)), abs=1e-12)


def test_published_normalisation_depends_on_batch_mates():
    objective, batch, _ = cross(std_scope="all")
    assert abs(parts(objective, batch) - total(objective(batch))) > 1e-3


def test_std_of_each_response_is_that_of_its_own_tokens():
    values, row = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 2, 2, 2]
    found = response_std(values, torch.tensor(row), 3)[:, 0]
    wanted = [values[torch.tensor(row) == r].std() for r in row]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("make", [same, cross], ids=["same", "cma"])
@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"forward_kl"}))
def test_divergence_is_that_of_the_student_space_only(make, divergence):
    objective, batch, _ = make()
    published = objective(batch).metrics
    objective, batch, _ = make(divergence=divergence)
    found = objective(batch).metrics
    assert found["kd/t2s_kd"] != published["kd/t2s_kd"]
    assert found["kd/s2t_kd"] == published["kd/s2t_kd"]


def test_one_token_responses_of_any_length_of_the_other_model():
    objective, _, leaves = cross(std_scope="valid")
    draw = torch.Generator().manual_seed(1)
    ids = torch.arange(5).repeat(2, 1)

    def side(role, labels, width):
        hidden = torch.randn(2, 5, width, dtype=torch.float64, generator=draw)
        embed = leaves[f"{role}_embed"].detach()
        one = tokens(hidden, torch.tensor(labels), input_ids=ids, embed=lambda index: embed[index])
        return under_head(one, leaves[f"{role}_lm_head"])

    short, long = [[-100, 2, -100, -100, -100]] * 2, [[-100, 2, 3, 1, 4], [1, 2, 3, 1, 0]]
    for ours, theirs in ((short, long), (long, short), (short, short)):
        batch = batch_of(side("student", ours, 3), side("teacher", theirs, 4))
        loss = objective(batch).loss
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())
        assert parts(objective, batch) == pytest.approx(float(loss.detach()), abs=1e-10)


def narrow(one, dtype):
    """The same tokens in another number format."""
    embed = one.embed
    one.rows.hidden, one.every.hidden = one.rows.hidden.detach().to(dtype), one.every.hidden.detach().to(dtype)
    one = replace(one, embed=lambda index: embed(index).to(dtype))
    return under_head(one, nn.Parameter(one.rows.head.module.weight.detach().to(dtype)))


@BOTH
def test_float32_is_close_to_float64(vector, make):
    objective, batch, _ = make()
    objective.float()
    found = objective(
        replace(
            batch, student=narrow(batch.student, torch.float32), teachers=(narrow(batch.teachers[0], torch.float32),)
        )
    )
    assert found.loss.dtype == torch.float32
    loss = float(found.loss.detach()) / vector["params"]["batch_denom"]
    assert loss == pytest.approx(vector["expected"]["total"], rel=2e-6)


@BOTH
def test_sixteen_bits_are_coarse_but_the_attention_is_not_masked_away(vector, make):
    """Under autocast, as the trainer runs bfloat16: all parameters stay float32."""
    objective, batch, _ = make()
    objective.float()
    batch = replace(
        batch, student=narrow(batch.student, torch.float32), teachers=(narrow(batch.teachers[0], torch.float32),)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch).loss
    loss.backward()
    assert float(loss.detach()) / vector["params"]["batch_denom"] == pytest.approx(
        vector["expected"]["total"], rel=0.02
    )
    for name, parameter in objective.named_parameters():
        wanted = vector["expected"]["grad"][name.replace(".", "_")]
        torch.testing.assert_close(
            parameter.grad / vector["params"]["batch_denom"], torch.tensor(wanted), atol=0.1, rtol=0.1, msg=name
        )


def test_projectors_are_trained_at_their_own_rate_and_have_biases():
    for objective in (DSKD(DSKDParams()), DSKDCMA(DSKDCMAParams())):
        assert objective.objective_learning_rate == 1e-3
        objective.bind(facts(4, 9), facts(6, 9))
        shapes = {name: tuple(parameter.shape) for name, parameter in objective.named_parameters()}
        assert shapes.pop("query.weight", (12, 8)) == (12, 8)
        assert shapes.pop("query.bias", (12,)) == (12,)
        assert shapes == {"t2s.weight": (4, 6), "t2s.bias": (4,), "s2t.weight": (6, 4), "s2t.bias": (6,)}


@pytest.mark.parametrize(("objective", "cls"), [(DSKD, DSKDParams), (DSKDCMA, DSKDCMAParams)], ids=["same", "cma"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("kd_rate", 1.5), ("divergence", "no"), ("temperature", 0.0), ("projector_learning_rate", 0.0)],
)
def test_bad_parameters_are_refused(objective, cls, name, value):
    with pytest.raises(ValidationError, match=name):
        objective(cls(**{name: value}))
