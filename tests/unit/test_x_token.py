"""X-Token against golden numbers of NeMo-RL, and the matrix between two vocabularies."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import baselines.x_token
from baselines.x_token import XToken, XTokenParams
from ctpd.objectives.distillation import ModelFacts
from ctpd.objectives.projection import projection, shared_tokens
from tests.fixtures.distillation import IGNORED, VECTORS, batch_of, leaf, single, tokens, total

P_KL = ["nemo.p_kl.topk7.fwd", "nemo.p_kl.topk7.rev", "nemo.p_kl.topk4.fwd"]
SHARED = ["nemo.gold.strict", "nemo.gold.xtoken"]


def params_of(vector, **changes):
    given = vector["params"]
    form = "p_kl" if "vocab_topk" in given else "relaxed_h_kl" if given["xtoken_loss"] else "h_kl"
    return XTokenParams(
        **{
            "form": form,
            "ce_weight": 0.0,
            "temperature": given["temperature"],
            "reverse_kl": given.get("reverse_kl", False),
            "top_k": given.get("vocab_topk", 8192),
            **changes,
        }
    )


def golden_batch(vector, *, copies=1):
    """Chunk ids become units; a row without a chunk is not scored. Copies of the response differ in their logits."""
    inputs = vector["inputs"]
    student = leaf(inputs["student_logits"])
    made = []
    for side, logits_RTV in (("student", student), ("teacher", leaf(inputs["teacher_logits"]).detach())):
        chunk_RT = torch.tensor(inputs[f"{side}_chunk_id"])
        labels_RT = torch.where(chunk_RT >= 0, 0, IGNORED).repeat(copies, 1)
        rolled = torch.cat([logits_RTV.roll(shift, dims=-1) for shift in range(copies)])
        made.append(tokens(rolled, labels_RT, unit=chunk_RT[chunk_RT >= 0].repeat(copies)))
    return student, batch_of(*made, aligned=torch.full_like(made[0].row, -1))


def bound(params, vector):
    objective = XToken(params)
    pieces = torch.tensor(vector["inputs"]["projection_indices"])
    weights = torch.tensor(vector["inputs"]["projection_weights"])
    objective.project(pieces, weights.masked_fill(pieces < 0, 0.0), teacher_size=7)
    return objective


@pytest.mark.parametrize("name", P_KL + SHARED)
def test_loss_and_gradient_equal_the_public_code(name):
    vector = VECTORS[name]
    student, batch = golden_batch(vector)
    sums = bound(params_of(vector), vector)(batch)
    (grad,) = torch.autograd.grad(sums.loss / sums.count, student)
    expected = vector["expected"]
    assert sums.count == 3
    assert total(sums) / 3 == pytest.approx(expected["loss"], abs=vector["tol"])
    torch.testing.assert_close(
        grad, torch.tensor(expected["grad_student_logits"], dtype=torch.float64), atol=vector["tol"], rtol=0
    )


@pytest.mark.parametrize("name", SHARED)
def test_shared_tokens_and_both_parts_equal_the_public_code(name):
    vector = VECTORS[name]
    expected = vector["expected"]
    objective = bound(params_of(vector), vector)
    theirs = expected["exact_map"]
    assert objective.common.tolist() == [theirs["common_student"], theirs["common_teacher"]]
    assert objective.student_rest.tolist() == theirs["uncommon_student"]
    assert objective.teacher_rest.tolist() == theirs["uncommon_teacher"]
    metrics = objective(golden_batch(vector)[1]).metrics
    for ours, name_of_part in (("common", "kl_common"), ("uncommon", "l1_uncommon")):
        scaled = expected[name_of_part] * vector["params"]["temperature"] ** 2
        assert float(metrics[f"kd/{ours}"]) == pytest.approx(scaled, abs=1e-4)


@pytest.mark.parametrize("form", ["h_kl", "relaxed_h_kl"])
def test_a_batch_is_the_sum_of_its_responses(form):
    vector = VECTORS[SHARED[0]]
    _, batch = golden_batch(vector, copies=2)
    objective = bound(params_of(vector, form=form, ce_weight=0.1), vector)
    parts = [total(objective(single(batch, row))) for row in range(2)]
    assert sum(parts) == pytest.approx(total(objective(batch)), abs=1e-9)


def test_p_kl_depends_on_the_batch_by_its_columns_alone():
    """As published: the columns are those of the largest logits of a micro-batch."""
    vector = VECTORS["nemo.p_kl.topk4.fwd"]
    _, batch = golden_batch(vector, copies=2)
    apart = {}
    for top_k in (4, 7):
        objective = bound(params_of(vector, top_k=top_k), vector)
        parts = [total(objective(single(batch, row))) for row in range(2)]
        apart[top_k] = abs(sum(parts) - total(objective(batch)))
    assert apart[4] > 1e-3
    assert apart[7] < 1e-9


@pytest.mark.parametrize("name", [P_KL[2], SHARED[1]])
def test_the_size_of_a_tile_changes_nothing(name, monkeypatch):
    vector = VECTORS[name]
    results = []
    for size in (1, 2, 100):
        monkeypatch.setattr(baselines.x_token, "_TILE", size)
        student, batch = golden_batch(vector, copies=2)
        sums = bound(params_of(vector), vector)(batch)
        results.append((total(sums), torch.autograd.grad(sums.loss, student)[0]))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-12)
        torch.testing.assert_close(grad, results[0][1], atol=1e-12, rtol=0)


def facts(spelled, special=()):
    return ModelFacts(tokens=spelled, special_ids=frozenset(special), vocab_size=len(spelled), hidden_size=1)


def test_tokens_are_cut_into_the_longest_pieces_and_special_tokens_go_to_the_most_similar():
    teacher = facts(["Ġun", "believ", "able", "Ġu", "n", "<|im_end|>", "<|pad|>", "", "1", "2"], special=(5, 6))
    student = facts(["▁un", "▁unbelievable", "12", "xyz", "<end|>", "", "n"], special=(4,))
    pieces, weights = projection(student, teacher)
    assert pieces.tolist() == [
        [0, -1, -1, -1], [0, 1, 2, -1], [8, 9, -1, -1], [-1] * 4, [5, -1, -1, -1], [-1] * 4, [4, -1, -1, -1],
    ]  # fmt: skip
    torch.testing.assert_close(weights[1], torch.tensor([1.0, 0.1, 0.01, 0.0]) / 1.11)
    assert weights.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 1, 0, 1])
    assert shared_tokens(pieces, weights, relaxed=False).tolist() == [[0, 4, 6], [0, 5, 4]]
    # Of "▁un" and "▁unbelievable", whose heaviest piece is the same, the heavier one.
    assert shared_tokens(pieces, weights, relaxed=True).tolist() == [[0, 2, 4, 6], [0, 8, 5, 4]]


def test_bind_builds_the_matrix_and_leaves_columns_without_a_token_out():
    student, teacher = facts(["a", "b", "ab", "</s>"], special=(3,)), facts(["ab", "a", "</s>", "", ""], special=(2,))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, generator=generator).requires_grad_()
    theirs = torch.randn(1, 2, 5, generator=generator)
    batch = batch_of(
        tokens(logits, torch.tensor([[0, 1, 3]]), unit=torch.tensor([0, 0, 1])),
        tokens(theirs, torch.tensor([[0, 2]]), unit=torch.tensor([0, 1])),
    )
    for form in ("p_kl", "h_kl", "relaxed_h_kl"):
        objective = XToken(XTokenParams(form=form))
        objective.bind(student, teacher)
        sums = objective(batch)
        padded = batch.teachers[0].rows.hidden.clone()
        padded[:, 3:] += 100.0
        moved = batch.teachers[0].rows.__class__(padded, batch.teachers[0].rows.head)
        other = objective(replace(batch, teachers=(replace(batch.teachers[0], rows=moved),)))
        (grad,) = torch.autograd.grad(sums.loss, logits, retain_graph=True)
        assert sums.loss.dtype == torch.float32
        assert sums.count == 2
        assert bool(grad.isfinite().all())
        assert total(sums) == pytest.approx(total(other), abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"temperature": 0.0}, "temperature"), ({"ce_weight": -1.0}, "ce_weight"), ({"top_k": 0}, "top_k")],
)
def test_bad_parameters_are_refused(bad, named):
    with pytest.raises(ValidationError, match=named):
        XToken(XTokenParams(**bad))
