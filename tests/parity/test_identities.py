"""The parity tests of docs/method.md#identities, in float64 on random models of different tokenizations."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.dpo import DPO, DPOParams
from baselines.tis_dpo import TISDPO, TISDPOParams
from ctpd.objectives.base import Units
from ctpd.objectives.preference import Preference, PreferenceParams
from ctpd.ops.logps import token_logps
from ctpd.ops.spans import flat_unit_sums, unit_logps
from ctpd.ops.weights import Signal, UnitLayout, span_weights

NUM_PAIRS, V, H, BETA = 3, 19, 6, 0.3
NUM_TOKENS = 9


class World(NamedTuple):
    """Token log-probabilities [2 pairs, T] of several models (chosen rows first), and the span of each token."""

    policy: Tensor
    reference: Tensor
    positive: Tensor
    negative: Tensor
    span: Tensor
    num_tokens: Tensor

    @property
    def token_mask(self) -> Tensor:
        return torch.arange(NUM_TOKENS) < self.num_tokens.unsqueeze(1)


def world(*, seed: int) -> World:
    """Random models on random texts; a row's last token is the end token, which is the last span."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = 2 * NUM_PAIRS
    targets = torch.randint(V, (num_rows * NUM_TOKENS,), generator=generator)
    logps = []
    for _ in range(4):
        hidden = torch.randn(len(targets), H, generator=generator, dtype=torch.float64, requires_grad=not logps)
        weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
        logps.append(token_logps(hidden, weight, targets).view(num_rows, NUM_TOKENS))
    logps[0].retain_grad()
    num_tokens = torch.randint(4, NUM_TOKENS + 1, (num_rows,), generator=generator)
    begins = torch.rand(num_rows, NUM_TOKENS, generator=generator) < 0.6
    begins[:, 0] = False
    begins[torch.arange(num_rows), num_tokens - 1] = True
    span = begins.long().cumsum(1).masked_fill(torch.arange(NUM_TOKENS) >= num_tokens.unsqueeze(1), -1)
    return World(*logps, span, num_tokens)


def interleaved(blocks: Tensor) -> Tensor:
    """Rows of a batch (chosen first) in the order of stored signals (chosen, rejected, chosen, ...)."""
    return torch.stack(blocks.chunk(2), 1).flatten(0, 1)


def blocks(rows: Tensor) -> Tensor:
    return torch.cat([rows[0::2], rows[1::2]])


def units(w: World, unit: Tensor, *, end_span: bool, strategy: str | None) -> Units:
    """The contents of a batch with the units ``unit``, with weights from the contrastive pair's stored signals."""
    counts = unit.amax(1) + 1
    width = int(counts.max())
    mask = torch.arange(width) < (counts if end_span else counts - 1).unsqueeze(1)
    weights = None
    if strategy is not None:
        real = interleaved(w.token_mask)
        unit_starts, token_starts = (
            torch.cat([torch.zeros(1, dtype=torch.int64), interleaved(x).cumsum(0)]) for x in (counts, w.num_tokens)
        )
        signals = {
            Signal(f"{strategy}_{name}"): flat_unit_sums(
                interleaved(logps)[real], interleaved(unit)[real], token_starts=token_starts, unit_starts=unit_starts
            )
            for name, logps in (("positive", w.positive), ("negative", w.negative))
        }
        is_end = torch.zeros(int(unit_starts[-1]), dtype=torch.bool)
        is_end[unit_starts[1:] - 1] = True
        flat = span_weights(strategy, signals, UnitLayout(unit_starts, is_end)).weights
        rows = flat.split(unit_starts.diff().tolist())
        weights = blocks(torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True))
        weights = F.pad(weights, (0, width - weights.shape[1]))
    return Units(
        policy=unit_logps(w.policy, unit, num_units=width),
        mask=mask,
        reference=unit_logps(w.reference, unit, num_units=width).detach(),
        weights=weights,
    )


def loss_and_grad(loss: Tensor, w: World) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(loss, w.policy, retain_graph=True)
    return loss.detach(), grad


def tokens_of(w: World) -> Tensor:
    return torch.arange(NUM_TOKENS).expand_as(w.span).masked_fill(~w.token_mask, -1)


@pytest.mark.parametrize("seed", range(5))
def test_dpo_row_is_dpo_on_the_same_text(seed: int) -> None:
    """Uniform weights and the student's reference give DPO of whole-sequence sums, on spans and on tokens alike."""
    w = world(seed=seed)
    policy, reference = ((x * w.token_mask).sum(1) for x in (w.policy, w.reference))
    ratio_w, ratio_l = (policy - reference.detach()).chunk(2)
    direct = loss_and_grad(-F.logsigmoid(BETA * (ratio_w - ratio_l)).sum(), w)
    cells = [
        (DPO(DPOParams(beta=BETA)), w.span),
        (Preference(PreferenceParams(weights="uniform", reference="student", beta=BETA)), w.span),
        (
            Preference(PreferenceParams(granularity="tokens", weights="uniform", reference="student", beta=BETA)),
            tokens_of(w),
        ),
    ]
    for objective, unit in cells:
        batch = units(w, unit, end_span=objective.layout.end_span, strategy=None)
        torch.testing.assert_close(loss_and_grad(objective(batch).loss, w), direct, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_tis_dpo_row_is_tis_dpo_without_its_kl_term(seed: int) -> None:
    """Token weights of the student's own pair, its own reference, no end token: the paper's margin, token by token."""
    w = world(seed=seed)
    margin = torch.zeros(2 * NUM_PAIRS, dtype=torch.float64)
    for row in range(2 * NUM_PAIRS):
        sign = 1.0 if row < NUM_PAIRS else -1.0
        for t in range(int(w.num_tokens[row]) - 1):
            ratio = float(w.positive[row, t] - w.negative[row, t])
            weight = torch.tensor(sign * min(max(ratio, -0.5), 1.5), dtype=torch.float64).exp()
            margin[row] += weight * (w.policy[row, t] - w.reference[row, t].detach())
    direct = loss_and_grad(-F.logsigmoid(BETA * (margin[:NUM_PAIRS] - margin[NUM_PAIRS:])).sum(), w)
    cell = PreferenceParams(granularity="tokens", weights="student", reference="student", end_span=False, beta=BETA)
    for objective in (TISDPO(TISDPOParams(beta=BETA)), Preference(cell)):
        batch = units(w, tokens_of(w), end_span=objective.layout.end_span, strategy="student")
        torch.testing.assert_close(loss_and_grad(objective(batch).loss, w), direct, rtol=1e-12, atol=1e-13)
    assert TISDPO(TISDPOParams(beta=BETA)).layout == Preference(cell).layout


@pytest.mark.parametrize("seed", range(5))
def test_one_model_as_teacher_and_student_starts_at_log_2(seed: int) -> None:
    """Same model and tokenizer on both sides: at step 0 the margin is 0 and the loss log 2, whatever the weights."""
    w = world(seed=seed)
    w = w._replace(reference=w.policy)
    # The same tokenizer makes every token a span of its own.
    batch = units(w, tokens_of(w), end_span=True, strategy="teacher")
    sums = Preference(PreferenceParams())(batch)
    assert sums.metrics["rewards/margins"].item() == 0.0
    torch.testing.assert_close(sums.loss / sums.count, torch.tensor(2.0, dtype=torch.float64).log())


@pytest.mark.parametrize("seed", range(5))
def test_equal_contrastive_models_make_uniform_weights(seed: int) -> None:
    """If T+ = T- every weight is 1, and CTPD with the student's reference is DPO."""
    w = world(seed=seed)
    w = w._replace(negative=w.positive)
    ctpd = Preference(PreferenceParams(reference="student", beta=BETA))(
        units(w, w.span, end_span=True, strategy="teacher")
    )
    dpo = DPO(DPOParams(beta=BETA))(units(w, w.span, end_span=True, strategy=None))
    assert torch.equal(ctpd.loss, dpo.loss)
