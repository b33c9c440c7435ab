"""A scoring pass: one pass of a frozen model over many rows, whose result is stored as a signal.

Shape legend: R rows of a batch, T tokens of the longest row, N scored tokens, V vocabulary, K stored tokens of a
distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctpd.core.errors import NotFinite, listed
from ctpd.core.processes import processes
from ctpd.models import Outputs, packed_arguments
from ctpd.ops.boundaries import boundary_logps
from ctpd.ops.shared_rows import MOST_OF_SEPARATE, PackedLayout, pack_pairs
from ctpd.text.blocks import TokenRows
from ctpd.train.batches import to_device

# The names of the arrays of stored signals.
TOKEN_LOGPS, TOP_IDS, TOP_LOGPS, BOUNDARY_LOGPS = "logps", "top_ids", "top_logps", "boundary_logps"

Arrays = dict[str, NDArray[np.generic]]


class ScoredTokens(NamedTuple):
    """N scored tokens of a batch: the flat indices of the positions that predict them, their own, and their ids."""

    predictors: Tensor
    positions: Tensor
    targets: Tensor


Measure = Callable[[Outputs, ScoredTokens], dict[str, Tensor]]
"""What is kept of the scored tokens: name of an array -> [N, ...]."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How a scoring pass is executed; no number depends on it beyond rounding.

    Attributes:
        max_tokens: tokens of one forward pass, padding included; a longer row is a batch of its own.
        progress: called with the rows that all ranks have done, and the number of all rows.
        shares_prompts: whether rows 2 i and 2 i + 1, the sides of a pair, may share a sequence where that saves enough;
            the model must have been prepared by `ctpd.train.sharing.enable_prompt_sharing`.
        model: what the model is called in errors.
        row_name: what a row is called in errors.
    """

    max_tokens: int
    progress: Callable[[int, int], None]
    shares_prompts: bool = False
    model: str = "the model"
    row_name: Callable[[int], str] = "row {}".format


def token_logps(outputs: Outputs, scored: ScoredTokens) -> dict[str, Tensor]:
    """Measure: the log-probability of each token, float32 [N]."""
    return {TOKEN_LOGPS: outputs.every.select(scored.predictors).logps(scored.targets)}


def top_k(k: int, temperature: float) -> Measure:
    """Measure: the k likeliest tokens at each scored token, int32 ids and float32 log-probabilities [N, K].

    Args:
        temperature: divides the logits.
    """

    def measure(outputs: Outputs, scored: ScoredTokens) -> dict[str, Tensor]:
        def of_tile(logits_RV: Tensor) -> Tensor:
            logps_RK, ids_RK = (logits_RV / temperature).log_softmax(-1).topk(min(k, logits_RV.shape[1]), dim=-1)
            return torch.cat([ids_RK.to(logps_RK.dtype), logps_RK], dim=1)  # float32 holds ids exactly up to 2**24

        ids_NK, logps_NK = outputs.every.select(scored.predictors).map(of_tile).chunk(2, dim=1)
        return {TOP_IDS: ids_NK.to(torch.int32), TOP_LOGPS: logps_NK}

    return measure


def logps_with_boundary(boundary_ids: Sequence[int]) -> Measure:
    """Measure: the log-probability of each token, and that of any of ``boundary_ids`` after it, float32 [N] both."""

    def measure(outputs: Outputs, scored: ScoredTokens) -> dict[str, Tensor]:
        ids_S = torch.tensor(boundary_ids, device=scored.targets.device)
        after_N = boundary_logps(outputs.every.select(scored.positions), ids_S)
        return token_logps(outputs, scored) | {BOUNDARY_LOGPS: after_N}

    return measure


@torch.no_grad()
def scoring_pass(model: nn.Module, rows: TokenRows, *, measure: Measure, settings: ScoringSettings) -> Arrays:
    """What ``measure`` keeps of the scored tokens (``rows.unit >= 0``), in their order; ranks work on different batches.

    Rows go through the model longest first, so that running out of memory shows at once and little is padded. Batches
    do not depend on the number of ranks, so no number does; every rank returns the whole result.

    Args:
        model: frozen, with the scorer installed.

    Raises:
        NotFinite: the model gives a number that is NaN or infinite.
    """
    ranks = processes()
    scored = rows.unit >= 0
    batches, packed = _batches_of(rows, settings)
    rows_done = np.cumsum([len(batch) for batch in batches])
    index = np.cumsum(scored) - 1
    result: Arrays = {}
    for number in _own_batches(len(batches)):
        tokens_N, kept = _measured(model, rows, batches[number], measure=measure, packed=packed)
        _refuse_non_finite(kept, rows, tokens_N, settings)
        for name, values in kept.items():
            if name not in result:
                result[name] = np.zeros((int(scored.sum()), *values.shape[1:]), dtype=values.dtype)
            if number % ranks.world_size == ranks.rank:
                result[name][index[tokens_N]] = values
        done = rows_done[min(number + ranks.world_size, len(batches)) - 1]
        settings.progress(int(done), int(rows_done[-1]))
    return {name: _of_all_ranks(values) for name, values in sorted(result.items())}


def _refuse_non_finite(kept: Arrays, rows: TokenRows, tokens_N: NDArray[np.int64], settings: ScoringSettings) -> None:
    for values in kept.values():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        bad_N = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        bad_rows = np.unique(np.searchsorted(rows.row_starts, tokens_N[bad_N], side="right") - 1)
        raise NotFinite(
            f"the log-probabilities that the model gives to {listed([settings.row_name(int(row)) for row in bad_rows])} "
            "are not finite",
            where=settings.model,
            fix="Give a model whose numbers are finite; `precision: float32` helps where one overflows in bfloat16",
        )


def _own_batches(num_batches: int) -> range:
    """The batches of this rank; an idle rank computes the first one, for the shapes that `all_reduce` needs."""
    ranks = processes()
    if ranks.rank >= num_batches:
        return range(min(num_batches, 1))
    return range(ranks.rank, num_batches, ranks.world_size)


def _batches_of(rows: TokenRows, settings: ScoringSettings) -> tuple[list[NDArray[np.int64]], bool]:
    """The rows of each batch, and whether pairs are packed: then a batch's first rows come before its second rows."""
    lengths, starts = np.diff(rows.row_starts), rows.row_starts
    separate = _cut(lengths, settings.max_tokens)
    if not settings.shares_prompts:
        return separate, False
    scored = np.append(np.flatnonzero(rows.unit >= 0), starts[-1])
    prompts = np.minimum(scored[np.searchsorted(scored, starts[:-1])] - starts[:-1], lengths)
    packed = lengths.reshape(-1, 2).sum(axis=1) - prompts.reshape(-1, 2).min(axis=1)
    pairs = _cut(packed, settings.max_tokens)
    if _padded_size(pairs, packed) > MOST_OF_SEPARATE * _padded_size(separate, lengths):
        return separate, False
    return [np.concatenate([2 * batch, 2 * batch + 1]) for batch in pairs], True


def _cut(lengths: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """Batches of sequences, longest first, of at most so many tokens with padding."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    done = 0
    while done < len(order):
        batches.append(order[done : done + max(1, max_tokens // int(lengths[order[done]]))])
        done += len(batches[-1])
    return batches


def _padded_size(batches: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> int:
    """Positions of these batches, padding included."""
    return sum(len(batch) * int(lengths[batch[0]]) for batch in batches)


def _measured(
    model: nn.Module, rows: TokenRows, batch: NDArray[np.int64], *, measure: Measure, packed: bool
) -> tuple[NDArray[np.int64], Arrays]:
    """The scored tokens of one batch, as indices into ``rows.input_ids``, and what is kept of them."""
    device = next(model.parameters()).device
    lengths = np.diff(rows.row_starts)[batch]
    column_T = np.arange(lengths.max())[None, :]
    inside_RT = column_T < lengths[:, None]
    token_RT = np.where(inside_RT, rows.row_starts[batch][:, None] + column_T, 0)
    ids_RT = np.where(inside_RT, rows.input_ids[token_RT], 0).astype(np.int64)
    scored_RT = inside_RT & (rows.unit[token_RT] >= 0)
    ids, layout, wanted = _inputs(ids_RT, lengths, scored_RT, packed=packed)
    ids, layout, wanted = to_device((ids, layout, wanted), device)

    def use(outputs: Outputs) -> dict[str, Tensor]:
        return measure(outputs, wanted)

    kept: dict[str, Tensor] = model(input_ids=ids, score=use, **packed_arguments(layout, ids))
    return token_RT[scored_RT], {name: _array(values) for name, values in kept.items()}


def _inputs(
    ids_RT: NDArray[np.int64], lengths: NDArray[np.int64], scored_RT: NDArray[np.bool_], *, packed: bool
) -> tuple[Tensor, PackedLayout | None, ScoredTokens]:
    index_N = torch.from_numpy(np.flatnonzero(scored_RT))
    targets_N = torch.from_numpy(ids_RT.reshape(-1))[index_N]
    found = pack_pairs(ids_RT, lengths) if packed else None
    if found is None:
        return torch.from_numpy(ids_RT), None, ScoredTokens(index_N - 1, index_N, targets_N)
    unpack = found[1].unpack.flatten()
    return torch.from_numpy(found[0]), found[1], ScoredTokens(unpack[index_N - 1], unpack[index_N], targets_N)


def _array(values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (values.float() if values.is_floating_point() else values).cpu().numpy()
    return array


def _of_all_ranks(part: NDArray[np.generic]) -> NDArray[np.generic]:
    """The sum of arrays that are zero where another rank has filled in. As integers: -0.0 + 0.0 would lose the sign."""
    return processes().all_reduce(part.view(f"i{part.dtype.itemsize}")).view(part.dtype)
