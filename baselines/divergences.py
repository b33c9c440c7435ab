"""Divergences of two distributions over one vocabulary, a number a row (docs/method.md#token-level-distillation).

Formulas of DSKD (Zhang et al., EMNLP 2024) and TRL (generalised JSD: Agarwal et al., ICLR 2024). Gradients flow to
both arguments: a caller that wants a constant teacher detaches it. There is no factor `temperature ** 2`.

Shape legend: R rows, V vocabulary. p is the teacher's distribution, q the student's, both at the temperature.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

RowDivergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(p || q)`: [R], nats."""
    return _kl(_logp(teacher_logits_RV, temperature), _logp(student_logits_RV, temperature))


def reverse_kl(student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(q || p)`: [R]."""
    return _kl(_logp(student_logits_RV, temperature), _logp(teacher_logits_RV, temperature))


def generalised_jsd(
    student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`: [R]; TRL's GKD.

    At beta 0 and 1 it is exactly the forward and the reverse divergence, as in TRL; the formula's own limits are 0.
    """
    if beta == 0.0:
        return forward_kl(student_logits_RV, teacher_logits_RV, temperature=temperature)
    if beta == 1.0:
        return reverse_kl(student_logits_RV, teacher_logits_RV, temperature=temperature)
    logp_RV, logq_RV = _logp(teacher_logits_RV, temperature), _logp(student_logits_RV, temperature)
    logm_RV = _log_mix(logp_RV, logq_RV, beta)
    return beta * _kl(logp_RV, logm_RV) + (1.0 - beta) * _kl(logq_RV, logm_RV)


def js_divergence(student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`, every logarithm of its argument + 1e-9: [R]; DSKD's."""
    p_RV, q_RV = (teacher_logits_RV / temperature).softmax(-1), (student_logits_RV / temperature).softmax(-1)
    logm_RV = ((p_RV + q_RV) / 2.0 + 1e-9).log()
    sides_RV = p_RV * ((p_RV + 1e-9).log() - logm_RV) + q_RV * ((q_RV + 1e-9).log() - logm_RV)
    return sides_RV.sum(-1) / 2.0


def skewed_forward_kl(
    student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """`KL(p || skew p + (1 - skew) q)`: [R] (Ko et al., ICML 2024)."""
    logp_RV, logq_RV = _logp(teacher_logits_RV, temperature), _logp(student_logits_RV, temperature)
    return _kl(logp_RV, _log_mix(logp_RV, logq_RV, skew))


def skewed_reverse_kl(
    student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """`KL(q || (1 - skew) p + skew q)`: [R]."""
    logp_RV, logq_RV = _logp(teacher_logits_RV, temperature), _logp(student_logits_RV, temperature)
    return _kl(logq_RV, _log_mix(logq_RV, logp_RV, skew))


def adaptive_kl(
    student_logits_RV: Tensor, teacher_logits_RV: Tensor, *, temperature: float = 1.0, tail_mass: float = 0.5
) -> Tensor:
    """`w KL(p || q) + (1 - w) KL(q || p)`: [R] (Wu et al., 2024).

    `w` is the share of `sum |p - q|` that lies in the head of p; the tail are its least likely tokens, up to
    `tail_mass` of probability together. No gradient flows through `w`.
    """
    logp_RV, logq_RV = _logp(teacher_logits_RV, temperature), _logp(student_logits_RV, temperature)
    with torch.no_grad():
        p_RV, order_RV = logp_RV.exp().sort(-1)
        gap_RV = (p_RV - logq_RV.exp().gather(-1, order_RV)).abs()
        in_tail_RV = p_RV.cumsum(-1) <= tail_mass
        head_R, whole_R = gap_RV.masked_fill(in_tail_RV, 0.0).sum(-1), gap_RV.sum(-1)
        # Equal distributions have no gap to share, and both divergences are 0.
        share_R = torch.where(whole_R > 0, head_R / whole_R.clamp(min=torch.finfo(whole_R.dtype).tiny), 0.5)
    return share_R * _kl(logp_RV, logq_RV) + (1.0 - share_R) * _kl(logq_RV, logp_RV)


DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "generalised_jsd",
    "js_divergence",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
]
DIVERGENCES: Mapping[DivergenceName, Callable[..., Tensor]] = MappingProxyType(
    {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "generalised_jsd": generalised_jsd,
        "js_divergence": js_divergence,
        "skewed_forward_kl": skewed_forward_kl,
        "skewed_reverse_kl": skewed_reverse_kl,
        "adaptive_kl": adaptive_kl,
    }
)


def find_divergence(
    name: DivergenceName, *, temperature: float, beta: float = 0.5, skew: float = 0.1, tail_mass: float = 0.5
) -> RowDivergence:
    """The divergence of that name, `(student_logits_RV, teacher_logits_RV) -> [R]`; each takes those of the numbers that it has."""
    shares = {"beta": beta, "skew": skew, "tail_mass": tail_mass}
    own = {
        "generalised_jsd": ("beta",),
        "skewed_forward_kl": ("skew",),
        "skewed_reverse_kl": ("skew",),
        "adaptive_kl": ("tail_mass",),
    }.get(name, ())
    return partial(DIVERGENCES[name], temperature=temperature, **{key: shares[key] for key in own})


def _logp(logits_RV: Tensor, temperature: float) -> Tensor:
    return (logits_RV / temperature).log_softmax(-1)


def _kl(logp_RV: Tensor, logq_RV: Tensor) -> Tensor:
    return (logp_RV.exp() * (logp_RV - logq_RV)).sum(-1)


def _log_mix(loga_RV: Tensor, logb_RV: Tensor, share: float) -> Tensor:
    """`log(share a + (1 - share) b)`; a share of 0 or 1 is one of the two."""
    if share in (0.0, 1.0):
        return loga_RV if share else logb_RV
    log_share_R = loga_RV.new_tensor([share, 1.0 - share]).log()
    return torch.logaddexp(loga_RV + log_share_R[0], logb_RV + log_share_R[1])
