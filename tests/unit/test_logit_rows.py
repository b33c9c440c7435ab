"""Rows of logits formed tile by tile: the same numbers and gradients as the whole matrix, without keeping a tensor of its size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ctpd.ops.logit_rows import Head, LogitRows, Top, TopRows
from ctpd.ops.tiles import NO_TRANSFORM, LogitTransform

N, H, V = 11, 6, 40
HEADS: dict[str, Callable[[], tuple[nn.Module, LogitTransform]]] = {
    "linear": lambda: (nn.Linear(H, V, bias=False), NO_TRANSFORM),
    "bias, soft cap and scale": lambda: (nn.Linear(H, V), LogitTransform(scale=0.5, softcap=2.0)),
    "module": lambda: (
        nn.Sequential(nn.Linear(H, 8), nn.Tanh(), nn.Linear(8, V)),
        LogitTransform(scale=2.0, softcap=3.0),
    ),
}


def rows_of(name: str, *, tile_rows: int) -> LogitRows:
    torch.manual_seed(0)
    module, transform = HEADS[name]()
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    return LogitRows(hidden, Head(module.double(), V, transform), tile_bytes=tile_rows * V * 8)


def whole(rows: LogitRows) -> Tensor:
    scale, softcap = rows.head.transform
    logits = rows.head.module(rows.hidden) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def entropy(logits: Tensor, factor: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1) * factor


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tile_rows", [1, 4, 100])
def test_a_map_has_the_values_and_gradients_of_the_whole_matrix(name: str, tile_rows: int) -> None:
    rows = rows_of(name, tile_rows=tile_rows)
    factor = torch.randn(N, dtype=torch.float64, requires_grad=True)
    inputs = [rows.hidden, factor, *rows.head.module.parameters()]
    ours, theirs = rows.map(entropy, factor), entropy(whole(rows), factor)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("is_constant", [False, True])
def test_log_probabilities_are_those_of_the_whole_matrix(name: str, is_constant: bool) -> None:
    rows = rows_of(name, tile_rows=4)
    used = LogitRows(rows.hidden, rows.head.constant()) if is_constant else rows
    targets = torch.arange(N) * 3 % V
    ours = used.logps(targets)
    theirs = whole(rows).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs)
    (grad,) = torch.autograd.grad(ours.sum(), rows.hidden, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs.sum(), rows.hidden)[0])
    found = torch.autograd.grad(ours.sum(), [*rows.head.module.parameters()], allow_unused=True)
    assert all(g is None for g in found) == is_constant


def test_a_constant_head_passes_gradients_to_the_hidden_states_only() -> None:
    rows = rows_of("module", tile_rows=4)
    mapped = LogitRows(rows.hidden, rows.head.constant()).map(lambda logits: logits.logsumexp(-1))
    grads = torch.autograd.grad(mapped.sum(), [rows.hidden, *rows.head.module.parameters()], allow_unused=True)
    assert grads[0] is not None
    assert all(grad is None for grad in grads[1:])
    assert not rows.constant().map(lambda logits: logits.logsumexp(-1)).requires_grad


def test_nothing_as_large_as_the_matrix_is_kept_for_the_backward_pass() -> None:
    rows = rows_of("linear", tile_rows=2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        rows.map(lambda logits: logits.log_softmax(-1).exp().square().sum(-1)).sum().backward()
    assert kept
    assert max(kept) <= H * V  # the head's weight; a tile of the matrix has 2 * V


def test_a_teacher_is_aligned_row_by_row_whether_in_memory_or_stored() -> None:
    student, teacher = rows_of("linear", tile_rows=3), rows_of("module", tile_rows=3).constant()
    index = torch.tensor([4, 4, 0, 10, 1, 2, 3, 5, 6, 7, 8])

    def difference(logits: Tensor, theirs: Tensor) -> Tensor:
        return (logits - theirs).abs().sum(-1)

    found = student.map(difference, teacher.select(index))
    torch.testing.assert_close(found, difference(whole(student), whole(teacher)[index]))
    logps, ids = whole(teacher).log_softmax(-1).topk(5, dim=-1)

    def on_kept(logits: Tensor, top: Top) -> Tensor:
        return (logits.gather(1, top.ids) * top.logps.exp()).sum(-1) + top.rest

    kept = student.map(on_kept, TopRows(ids, logps).select(index))
    torch.testing.assert_close(kept, on_kept(whole(student), Top(ids[index], logps[index])))


def test_no_rows_give_an_empty_result() -> None:
    rows = rows_of("linear", tile_rows=3).select(torch.zeros(0, dtype=torch.long))
    assert rows.map(lambda logits: logits.logsumexp(-1)).shape == (0,)


def test_rest_is_the_probability_of_what_was_not_kept() -> None:
    logps, ids = torch.randn(3, V, dtype=torch.float64).log_softmax(-1).topk(V, dim=-1)
    torch.testing.assert_close(Top(ids[:, :4], logps[:, :4]).rest, logps[:, 4:].exp().sum(-1))
