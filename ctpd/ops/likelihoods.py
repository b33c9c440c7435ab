"""Distances between two likelihoods of one event: what approximate likelihood matching compares chunks with.

`true` is the teacher's log-likelihood, `pred` the student's, both at most 0 and of one shape; all are after tokenkit's
`compute_alm_loss`, in whose names they are known.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["binary_ce", "reverse_binary_kl", "binary_kl_temp_limit", "abs_exp", "joschu_k2", "joschu_k3"]

_EPSILON = 1e-6  # keeps a likelihood below 1


def _log1mexp(logp: Tensor) -> Tensor:
    """`log(1 - exp(logp))`: of the two exact forms, the one that does not cancel there."""
    near_one = logp > -math.log(2.0)
    # Each form gets a harmless number where the other one is used: the gradient of `where` is 0 times it.
    near = torch.log(-torch.expm1(logp.masked_fill(~near_one, -0.5)))
    return torch.where(near_one, near, torch.log1p(-torch.exp(logp.masked_fill(near_one, -1.0))))


def _binary_ce(true: Tensor, pred: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of two events; its least value is the entropy of `true`, not 0."""
    true, pred = true / temperature - _EPSILON, pred / temperature - _EPSILON
    return -(true.exp() * pred - true.expm1() * _log1mexp(pred))


def _reverse_binary_kl(true: Tensor, pred: Tensor, temperature: float) -> Tensor:
    true, pred = true / temperature - _EPSILON, pred / temperature - _EPSILON
    return pred.exp() * (pred - true) - pred.expm1() * (_log1mexp(pred) - _log1mexp(true))


def _binary_kl_temp_limit(true: Tensor, pred: Tensor, temperature: float) -> Tensor:
    """The divergence times the temperature, in the limit of a high one."""
    true, pred = true - _EPSILON, pred - _EPSILON
    return true - pred + true * (torch.log(-pred) - torch.log(-true))


def _abs_exp(true: Tensor, pred: Tensor, temperature: float) -> Tensor:
    return ((true / temperature - _EPSILON).exp() - (pred / temperature - _EPSILON).exp()).abs()


def _joschu_k2(true: Tensor, pred: Tensor, temperature: float) -> Tensor:
    return ((true - pred) / temperature).square() / 2.0


def _joschu_k3(true: Tensor, pred: Tensor, temperature: float) -> Tensor:
    ratio = (true - pred) / temperature
    return ratio.expm1() - ratio


# k2 and k3: estimators of a divergence from one ratio.
DISTANCES: dict[Distance, Callable[[Tensor, Tensor, float], Tensor]] = {
    "binary_ce": _binary_ce,
    "reverse_binary_kl": _reverse_binary_kl,
    "binary_kl_temp_limit": _binary_kl_temp_limit,
    "abs_exp": _abs_exp,
    "joschu_k2": _joschu_k2,
    "joschu_k3": _joschu_k3,
}
