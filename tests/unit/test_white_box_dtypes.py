"""Every objective that reads a teacher's distributions, in the number formats of training: half precision, also stored."""

from dataclasses import replace

import pytest
import torch

from baselines.adpa import ADPA, ADPAParams
from baselines.dckd import DCKD, DCKDParams
from baselines.divergences import DIVERGENCES
from baselines.multi_level_ot import MultiLevelOT, MultiLevelOTParams
from baselines.token_kd import TokenKD, TokenKDParams
from ctpd.ops.logit_rows import TopRows
from tests.fixtures.distillation import batch_of, stored, tokens, total

LABELS = torch.tensor([[-100, 3, 1, 4, 2], [5, 2, -100, -100, -100]])
ONLINE = {
    **{f"token_kd {name}": TokenKD(TokenKDParams(divergence=name)) for name in DIVERGENCES},
    "multi_level_ot": MultiLevelOT(MultiLevelOTParams()),
    "multi_level_ot, the port": MultiLevelOT(MultiLevelOTParams(ctpd_variant=True)),
}
STORED = {
    "token_kd": TokenKD(TokenKDParams(top_k=3, temperature=1.0)),
    "dckd": DCKD(DCKDParams(top_k=3)),
    "adpa": ADPA(ADPAParams(top_k=3)),
    "adpa as shipped": ADPA(ADPAParams(top_k=3, clamp=True)),
    "multi_level_ot": MultiLevelOT(MultiLevelOTParams(top_k=3)),
}


def logits(seed):
    # Numbers that half precision holds exactly: only the arithmetic differs.
    return torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def batch_in(dtype, *, top_k=None):
    student = logits(0).to(dtype).requires_grad_()
    teachers = [tokens(logits(seed).to(dtype), LABELS) for seed in (1, 2)]
    if top_k is not None:
        teachers = [stored(tokens(logits(seed), LABELS), top_k=top_k) for seed in (1, 2)]
        teachers = [replace(t, rows=TopRows(t.rows.ids, t.rows.logps.to(dtype))) for t in teachers]
    return student, batch_of(tokens(student, LABELS), *teachers, num_pairs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ONLINE)
def test_a_teacher_in_memory_gives_the_same_loss_in_any_precision(name, dtype):
    check(ONLINE[name], dtype, top_k=None, tolerance=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", STORED)
def test_a_stored_teacher_gives_the_same_loss_in_any_precision(name, dtype, tolerance):
    check(STORED[name], dtype, top_k=3, tolerance=tolerance)


def check(objective, dtype, *, top_k, tolerance):
    student, batch = batch_in(dtype, top_k=top_k)
    sums = objective(batch)
    (grad,) = torch.autograd.grad(sums.loss, student)
    assert sums.loss.dtype == torch.float32
    assert torch.isfinite(grad).all()
    assert (grad != 0).any()
    exact = total(objective(batch_in(torch.float64, top_k=top_k)[1]))
    assert total(sums) == pytest.approx(exact, rel=tolerance)
