"""Tokens of two models grouped by the text that they spell.

Shape legend: N scored tokens of one model, K those of them that are in a group, G groups of a batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ctpd.objectives.distillation import Tokens


class Grouped(NamedTuple):
    """The tokens of one model that are in a group, in order: the index of each among the N, and its group."""

    token: Int[Tensor, " K"]
    group: Int[Tensor, " K"]


def shared_groups(
    student: Tokens, teacher: Tokens, *, by_position: bool = False, skip_last: bool = False
) -> tuple[Int[Tensor, " G"], Grouped, Grouped]:
    """The response of each group, and its tokens of both models; a group has at least one token of each.

    Args:
        student: the scored tokens of one model.
        teacher: those of the other, of the same responses.
        by_position: the k-th token of a response with the k-th, instead of spans.
        skip_last: the last token of each response is in no group, on either side.
    """
    sides = (student, teacher)
    units = [tokens.index if by_position else tokens.unit.long() for tokens in sides]
    width = 1 + max(int(unit.max()) for unit in units)
    num_keys = width * (1 + int(student.row.max()))
    kept = [~tokens.is_last if skip_last else torch.ones_like(tokens.row, dtype=torch.bool) for tokens in sides]
    keys = [tokens.row * width + unit for tokens, unit in zip(sides, units, strict=True)]
    shared = torch.ones(num_keys, dtype=torch.bool, device=student.row.device)
    for key_N, keep_N in zip(keys, kept, strict=True):
        shared &= torch.bincount(key_N[keep_N], minlength=num_keys) > 0
    number = shared.cumsum(0) - 1
    ours, theirs = (
        _grouped((keep_N & shared[key_N]).nonzero()[:, 0], key_N, number)
        for key_N, keep_N in zip(keys, kept, strict=True)
    )
    return shared.nonzero()[:, 0] // width, ours, theirs


def _grouped(index: Tensor, key_N: Tensor, number: Tensor) -> Grouped:
    return Grouped(index, number[key_N[index]])
