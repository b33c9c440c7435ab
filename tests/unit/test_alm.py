"""ALM against golden numbers of tokenkit, and what our spans and our normalisation change."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from baselines.alm import ALM, ALMParams, Chunks, chunk_losses
from ctpd.objectives.distillation import BoundaryTokens, ModelFacts
from ctpd.ops.boundaries import boundary_ids, boundary_logps
from ctpd.ops.likelihoods import DISTANCES
from ctpd.text.align import align_spans
from tests.fixtures.distillation import IGNORED, VECTORS, batch_of, leaf, single, tokens, total
from tests.fixtures.distillation import facts as tokens_facts

LOSSES = [name for name in VECTORS if name.startswith("alm.") and name not in ("alm.align", "alm.notebook")]
PLAIN = VECTORS["alm.binary_ce.T100.plain"]
MERGED = VECTORS["alm.binary_ce.T1.merge_by_space_prob+append_space"]


def params_of(vector, **changes):
    given = vector["params"]
    merges = "merge_by_space_prob" in given["alm_mode"]
    return ALMParams(
        **{
            "kd_rate": 1.0,
            "distance": given["alm_diff_fn"],
            "temperature": given["binarization_temp"],
            "append_space": "append_space" in given["alm_mode"],
            "merge_threshold": given["tokenizer_pair_bias_threshold"] if merges else None,
            "weight": given["numerator"],
            "double_merge_denominator": merges,
            **changes,
        }
    )


def chunks_of(inputs, student_RTV):
    """The public code's chunk tables: what is masked is no chunk, and its boundary is read after token 0."""
    width = min(len(inputs["input_ids_teacher"][0]), len(inputs["input_ids_student"][0]))
    sides = []
    for side, logits_RTV in (("teacher", leaf(inputs["teacher_logits"]).detach()), ("student", student_RTV)):
        logps_RTV = logits_RTV.log_softmax(-1)
        space = torch.tensor(inputs[f"space_mask_{side}"], dtype=torch.bool)
        sums = logps_RTV.new_zeros(len(logps_RTV), width)
        boundary = torch.zeros_like(sums)
        count = torch.zeros(sums.shape, dtype=torch.long)
        for r, spans in enumerate(inputs[f"chunk_spans_{side}"]):
            padded = [*spans, *[[3, 2]] * (width - len(spans))]
            for c, (start, stop) in enumerate(padded):
                kept = [t for t in range(start, stop) if inputs[f"loss_mask_{side}"][r][t]]
                for t in kept:
                    sums[r, c] = sums[r, c] + logps_RTV[r, t - 1, inputs[f"input_ids_{side}"][r][t]]
                boundary[r, c] = logps_RTV[r, kept[-1] if kept else 0, space].logsumexp(-1)
                count[r, c] = len(kept)
        sides.append((sums, boundary, count))
    (teacher, teacher_boundary, count), (student, student_boundary, _) = sides
    return Chunks(teacher, student, teacher_boundary, student_boundary, count)


def golden_batch(inputs, *, tile_rows=2):
    """The same as a batch of ours: unshifted ids become labels, chunks become units."""
    student = leaf(inputs["student_logits"])
    made = {}
    for side, logits_RTV in (("teacher", leaf(inputs["teacher_logits"]).detach()), ("student", student)):
        ids_RT = torch.tensor(inputs[f"input_ids_{side}"])
        scored_RT = torch.tensor(inputs[f"loss_mask_{side}"], dtype=torch.bool)
        labels_RT = torch.full_like(ids_RT, IGNORED)
        labels_RT[:, :-1] = ids_RT[:, 1:].masked_fill(~scored_RT[:, 1:], IGNORED)
        spans = inputs[f"chunk_spans_{side}"]
        unit = [c for row in spans for c, (start, stop) in enumerate(row) for _ in range(max(start, 1), stop)]
        made[side] = tokens(logits_RTV, labels_RT, unit=torch.tensor(unit), input_ids=ids_RT, tile_rows=tile_rows)
    teacher = made["teacher"]
    space = torch.tensor(inputs["space_mask_teacher"]).nonzero()[:, 0]
    boundary = boundary_logps(teacher.every.select(teacher.position), space)
    logps = teacher.rows.logps(teacher.targets)
    kept = BoundaryTokens(**tokens_facts(teacher), logps=logps, boundary_logps=boundary)
    return student, batch_of(made["student"], kept, aligned=torch.full_like(made["student"].row, -1))


def bound(params, inputs):
    objective = ALM(params)
    facts = [
        ModelFacts(
            tokens=["Ġ" if is_space else "x" for is_space in inputs[f"space_mask_{side}"]],
            special_ids=frozenset(),
            vocab_size=len(inputs[f"space_mask_{side}"]),
            hidden_size=1,
        )
        for side in ("student", "teacher")
    ]
    objective.bind(*facts)
    return objective


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_the_public_code(name):
    vector = VECTORS[name]
    student = leaf(vector["inputs"]["student_logits"])
    chunks = chunks_of(vector["inputs"], student)
    loss_R, weight_R = chunk_losses(chunks, params_of(vector))
    # The public code takes the mean of booleans in float32, whatever the rest of it is in.
    dtype = torch.float32 if vector["params"]["numerator"] == "chunk_count" else torch.float64
    share = (weight_R.sum().to(dtype) / chunks.num_tokens.numel()).double()
    loss = loss_R.sum() / chunks.num_tokens.numel() / share
    (grad,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(vector["expected"]["loss"], abs=vector["tol"])
    expected = torch.tensor(vector["expected"]["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if "merge" not in name and "token_count" not in name])
def test_without_merging_a_batch_gives_the_public_loss(name):
    vector = VECTORS[name]
    student, batch = golden_batch(vector["inputs"])
    sums = bound(params_of(vector), vector["inputs"])(batch)
    expected = vector["expected"]
    (grad,) = torch.autograd.grad(sums.loss / sums.count, student)
    assert sums.count == 6
    # 1e-7: the public code takes the mean of booleans in float32.
    assert total(sums) / 6 == pytest.approx(expected["loss"], rel=1e-7)
    expected_grad = torch.tensor(expected["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-6)
    assert float(sums.metrics["kd/gap"]) / 2 == pytest.approx(expected["legacy_abs_logdiff"], rel=1e-7)


@pytest.mark.parametrize(("weight", "weights"), [("chunk_count", [3, 2]), ("token_count", [5, 3])])
def test_with_merging_a_response_weighs_as_much_as_its_spans(weight, weights):
    student, batch = golden_batch(MERGED["inputs"])
    params = params_of(MERGED, double_merge_denominator=False, weight=weight)
    sums = bound(params, MERGED["inputs"])(batch)
    loss_R, weight_R = chunk_losses(chunks_of(MERGED["inputs"], student.detach()), params)
    assert weight_R.tolist() == weights
    assert total(sums) == pytest.approx(float((torch.tensor([4.0, 2.0]) * loss_R / weight_R).sum()), abs=1e-12)


def test_the_true_denominator_makes_the_loss_a_mean():
    chunks = chunks_of(MERGED["inputs"], leaf(MERGED["inputs"]["student_logits"]).detach())
    _, once_R = chunk_losses(chunks, params_of(MERGED, double_merge_denominator=False))
    _, twice_R = chunk_losses(chunks, params_of(MERGED))
    assert twice_R.sum() < once_R.sum()


def test_the_notebook_s_numbers():
    vector = VECTORS["alm.notebook"]
    inputs, expected = vector["inputs"], vector["expected"]
    chunks = chunks_of(inputs, leaf(inputs["student_logits"]).detach())
    valid = torch.tensor(expected["chunk_mask"], dtype=torch.bool)
    assert torch.equal(chunks.num_tokens > 0, valid)
    for side in ("teacher", "student"):
        theirs = torch.tensor(expected[f"{side}_chunk_logp"], dtype=torch.float64)
        torch.testing.assert_close(getattr(chunks, side)[valid], theirs[valid], atol=1e-9, rtol=0)
    distance = DISTANCES["binary_ce"](chunks.teacher, chunks.student, float(vector["params"]["temp"]))
    torch.testing.assert_close(
        distance[valid], torch.tensor(expected["elementwise"], dtype=torch.float64)[valid], atol=1e-9, rtol=0
    )
    loss_R, weight_R = chunk_losses(chunks, params_of(PLAIN))
    assert float(loss_R.sum() / weight_R.sum()) == pytest.approx(expected["loss_mean_over_valid"], abs=1e-9)


def text_of(token):
    return token.replace("Ġ", " ").replace("Ċ", "\n")


@pytest.mark.parametrize("case", [1, 2])
def test_our_spans_are_tokenkit_s_chunks_of_plain_text(case):
    """Case 0 is left out: special tokens, which tokenkit matches by family and we frame outside of the response.

    tokenkit drops chunks that differ by a space alone; here there are none but for a space before the first word.
    """
    given, out = VECTORS["alm.align"]["inputs"]["cases"][case], VECTORS["alm.align"]["expected"]["out"][case]
    ends = {}
    for side in ("teacher", "student"):
        ends[side] = np.cumsum([len(text_of(token)) for token in out[f"normalized_{side}"]])
        assert len(ends[side]) == len(given[side])
    offsets = {side: np.stack([np.append(0, end[:-1]), end], axis=1) for side, end in ends.items()}
    spans = align_spans(offsets["teacher"], offsets["student"], int(ends["teacher"][-1]))
    ours = [
        [
            int(side.searchsorted(s, where))
            for side in (spans.teacher_span, spans.student_span)
            for where in ("left", "right")
        ]
        for s in range(len(spans.boundaries))
    ]
    assert ours == out["alignment_indices"]


def test_boundaries_are_found_in_either_spelling():
    spelled = ["Ġa", "Ċ", "ĉb", "▁c", "<0x0A>", "\t", "d", "", "<|end|>", "aĠ"]
    assert boundary_ids(spelled, {8}) == [0, 1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("kd_rate", [0.0, 0.5, 1.0])
def test_a_batch_is_the_sum_of_its_responses(kd_rate):
    _, batch = golden_batch(MERGED["inputs"])
    objective = bound(params_of(MERGED, kd_rate=kd_rate, double_merge_denominator=False), MERGED["inputs"])
    parts = [objective(single(batch, row)) for row in range(2)]
    assert sum(total(part) for part in parts) == pytest.approx(total(objective(batch)), abs=1e-12)
    assert sum(part.count for part in parts) == objective(batch).count


def test_the_size_of_a_tile_changes_nothing():
    losses = []
    for tile_rows in (1, 3, 100):
        _, batch = golden_batch(MERGED["inputs"], tile_rows=tile_rows)
        losses.append(total(bound(params_of(MERGED), MERGED["inputs"])(batch)))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-14)


def test_cross_entropy_is_a_mean_over_the_tokens_of_each_response():
    _, batch = golden_batch(PLAIN["inputs"])
    objective = bound(params_of(PLAIN, kd_rate=0.0), PLAIN["inputs"])
    logps_N = batch.student.rows.logps(batch.student.targets).detach()
    assert total(objective(batch)) == pytest.approx(float(-4 * logps_N[:4].mean() - 2 * logps_N[4:].mean()), abs=1e-12)


def test_responses_of_one_token_have_a_finite_loss_and_gradient_in_float32():
    logits = torch.zeros(1, 2, 5, requires_grad=True)
    student = tokens(logits, torch.tensor([[3, IGNORED]]), input_ids=torch.tensor([[1, 3]]))
    certain = torch.zeros(1)
    teacher = BoundaryTokens(**tokens_facts(student), logps=certain, boundary_logps=certain)
    batch = batch_of(student, teacher, aligned=torch.tensor([-1]))
    objective = ALM(ALMParams())
    facts = ModelFacts(tokens=["Ġ", "a", "b", "c", "</s>"], special_ids=frozenset({4}), vocab_size=5, hidden_size=1)
    objective.bind(facts, facts)
    sums = objective(batch)
    (grad,) = torch.autograd.grad(sums.loss, logits)
    assert sums.count == 1
    assert sums.loss.dtype == torch.float32
    assert bool(grad.isfinite().all())
    assert float(grad.abs().sum()) > 0.0


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"kd_rate": 1.5}, "kd_rate"),
        ({"temperature": 0.0}, "temperature"),
        ({"merge_threshold": 1.0}, "merge_threshold"),
        ({"merge_threshold": None, "double_merge_denominator": True}, "double_merge_denominator"),
    ],
)
def test_bad_parameters_are_refused(bad, named):
    with pytest.raises(ValidationError, match=named):
        ALM(ALMParams(**bad))
