"""One pass of a frozen model over many rows: a stored signal.

Shape legend: R rows of a batch, T tokens of the longest row, N scored tokens, K entries kept of a distribution.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctpd.core.processes import processes
from ctpd.models import Outputs, row_layout
from ctpd.ops.boundaries import boundary_logps
from ctpd.ops.shared_rows import MOST_OF_SEPARATE, SharedRows, share_rows

TOP_IDS, TOP_LOGPS, COLUMNS = "ids", "logps", "columns"  # the arrays of a stored signal of distributions


class Scored(NamedTuple):
    """N scored tokens of a batch: the flat positions that predict them, their own, and the tokens."""

    predictors: Tensor
    places: Tensor
    targets: Tensor


Measure = Callable[[Outputs, Scored], dict[str, Tensor]]
"""What is kept of the scored tokens: name -> [N, ...]."""


def log_probabilities(outputs: Outputs, scored: Scored) -> dict[str, Tensor]:
    """The log-probability of each token."""
    return {"logps": outputs.every.select(scored.predictors).logps(scored.targets)}


def top(k: int, temperature: float) -> Measure:
    """The k likeliest tokens at each place, with their log-probabilities at this temperature."""

    def measure(outputs: Outputs, scored: Scored) -> dict[str, Tensor]:
        def of_tile(logits_RV: Tensor) -> Tensor:
            logps_RK, ids_RK = (logits_RV / temperature).log_softmax(-1).topk(min(k, logits_RV.shape[1]), dim=-1)
            return torch.cat([ids_RK.to(logps_RK.dtype), logps_RK], dim=1)  # float32 holds ids exactly up to 2**24

        ids_NK, logps_NK = outputs.every.select(scored.predictors).map(of_tile).chunk(2, dim=1)
        return {TOP_IDS: ids_NK.to(torch.int32), TOP_LOGPS: logps_NK}

    return measure


def with_boundary(boundary_ids: Sequence[int]) -> Measure:
    """Two columns: the log-probability of each token, and that of any of `boundary_ids` following it."""

    def measure(outputs: Outputs, scored: Scored) -> dict[str, Tensor]:
        ids_S = torch.tensor(boundary_ids, device=scored.targets.device)
        own_N = outputs.every.select(scored.predictors).logps(scored.targets)
        after_N = boundary_logps(outputs.every.select(scored.places), ids_S)
        return {COLUMNS: torch.stack([own_N.to(after_N.dtype), after_N], dim=1)}

    return measure


@torch.no_grad()
def sweep(
    model: nn.Module,
    input_ids: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    scored: NDArray[np.bool_],
    *,
    measure: Measure,
    max_tokens: int,
    progress: Callable[[int, int], None],
    shares_prompts: bool = False,
) -> dict[str, NDArray[np.generic]]:
    """What ``measure`` keeps of the scored tokens, in their order; the processes of a launch share the batches.

    Rows go through the model longest first, as many at a time as fit ``max_tokens`` when padded: an out-of-memory
    error, if any, comes at once, and little is padded. Batches are cut before they are dealt, so that no number
    depends on how many processes there are; each of them gets the whole result.

    Args:
        shares_prompts: rows 2 i and 2 i + 1 begin alike and may share a sequence, where that saves enough; the model
            must have passed `ctpd.train.sharing.can_share_rows`.
    """
    ranks = processes()
    batches, shared = _planned(row_starts, scored, max_tokens=max_tokens, shares_prompts=shares_prompts)
    rows_done = np.cumsum([len(rows) for rows in batches])
    place = np.cumsum(scored) - 1
    result: dict[str, NDArray[np.generic]] = {}
    # One with nothing to do measures the first batch for its arrays' shapes, which must be the same in all of them.
    for number in (
        range(ranks.rank, len(batches), ranks.world_size) if ranks.rank < len(batches) else [0][: len(batches)]
    ):
        tokens_N, kept = _measured(
            model, input_ids, row_starts, scored, rows=batches[number], measure=measure, shares=shared
        )
        for name, values in kept.items():
            if name not in result:
                result[name] = np.zeros((int(scored.sum()), *values.shape[1:]), dtype=values.dtype)
            if number % ranks.world_size == ranks.rank:
                result[name][place[tokens_N]] = values
        progress(int(rows_done[min(number + ranks.world_size, len(batches)) - 1]), int(rows_done[-1]))
    return {name: _joined(values) for name, values in sorted(result.items())}


def _planned(
    row_starts: NDArray[np.int64], scored: NDArray[np.bool_], *, max_tokens: int, shares_prompts: bool
) -> tuple[list[NDArray[np.int64]], bool]:
    """The rows of each batch, and whether those of a pair share a sequence: then first rows come before second ones."""
    lengths = np.diff(row_starts)
    alone = _batches(lengths, max_tokens)
    if not shares_prompts:
        return alone, False
    places = np.append(np.flatnonzero(scored), row_starts[-1])
    prompts = np.minimum(places[np.searchsorted(places, row_starts[:-1])] - row_starts[:-1], lengths)
    packed = lengths.reshape(-1, 2).sum(axis=1) - prompts.reshape(-1, 2).min(axis=1)
    pairs = _batches(packed, max_tokens)
    if _cost(pairs, packed) > MOST_OF_SEPARATE * _cost(alone, lengths):
        return alone, False
    return [np.concatenate([2 * batch, 2 * batch + 1]) for batch in pairs], True


def _batches(lengths: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """What goes through the model together, longest first."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    done = 0
    while done < len(order):
        batches.append(order[done : done + max(1, max_tokens // int(lengths[order[done]]))])
        done += len(batches[-1])
    return batches


def _cost(batches: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> int:
    """Positions that these batches compute, padding included."""
    return sum(len(batch) * int(lengths[batch[0]]) for batch in batches)


def _measured(
    model: nn.Module,
    input_ids: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    scored: NDArray[np.bool_],
    *,
    rows: NDArray[np.int64],
    measure: Measure,
    shares: bool,
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.generic]]]:
    """The scored tokens of one batch, as indices into ``input_ids``, and what is kept of them."""
    device = next(model.parameters()).device
    lengths = np.diff(row_starts)[rows]
    token_RT = row_starts[rows][:, None] + np.arange(lengths.max())[None, :]
    inside_RT = np.arange(lengths.max())[None, :] < lengths[:, None]
    token_RT = np.where(inside_RT, token_RT, 0)
    ids_RT = np.where(inside_RT, input_ids[token_RT], 0).astype(np.int64)
    wanted_RT = inside_RT & scored[token_RT]
    index_N = torch.from_numpy(np.flatnonzero(wanted_RT))
    targets_N = torch.from_numpy(ids_RT.reshape(-1))[index_N].to(device)
    packed = share_rows(ids_RT, lengths) if shares else None
    if packed is None:
        ids, shared, wanted = ids_RT, None, Scored(index_N - 1, index_N, targets_N)
    else:
        ids, shared = packed[0], SharedRows(*(part.to(device) for part in packed[1]))
        place_RT = packed[1].unpack.flatten()
        wanted = Scored(place_RT[index_N - 1], place_RT[index_N], targets_N)
    wanted = Scored(*(part.to(device) for part in wanted))
    ids_on_device = torch.from_numpy(ids).to(device)

    def use(outputs: Outputs) -> Any:
        return measure(outputs, wanted)

    kept = model(input_ids=ids_on_device, score=use, **row_layout(shared, ids_on_device))
    return token_RT[wanted_RT], {
        name: (values.float() if values.is_floating_point() else values).cpu().numpy() for name, values in kept.items()
    }


def _joined(part: NDArray[np.generic]) -> NDArray[np.generic]:
    """An array of which each process has filled its own places. Added as integers: -0.0 + 0.0 would be another zero."""
    return processes().all_reduce(part.view(f"i{part.dtype.itemsize}")).view(part.dtype)
