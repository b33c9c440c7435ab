"""One pass of a frozen model over many rows: a stored signal.

Shape legend: R rows of a batch, T tokens of the longest row, N scored tokens, K entries kept of a distribution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctpd.core.processes import processes
from ctpd.models import Outputs
from ctpd.ops.boundaries import boundary_logps

TOP_IDS, TOP_LOGPS, COLUMNS = "ids", "logps", "columns"  # the arrays of a stored signal of distributions

Measure = Callable[[Outputs, Tensor, Tensor], dict[str, Tensor]]
"""What is kept of N scored tokens, given the outputs, their predicting positions (flat) and the tokens: name -> [N, ...]."""


def log_probabilities(outputs: Outputs, predictors_N: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """The log-probability of each token."""
    return {"logps": outputs.every.select(predictors_N).logps(targets_N)}


def top(k: int, temperature: float) -> Measure:
    """The k likeliest tokens at each place, with their log-probabilities at this temperature."""

    def measure(outputs: Outputs, predictors_N: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
        def of_tile(logits_RV: Tensor) -> Tensor:
            logps_RK, ids_RK = (logits_RV / temperature).log_softmax(-1).topk(min(k, logits_RV.shape[1]), dim=-1)
            return torch.cat([ids_RK.to(logps_RK.dtype), logps_RK], dim=1)  # float32 holds ids exactly up to 2**24

        ids_NK, logps_NK = outputs.every.select(predictors_N).map(of_tile).chunk(2, dim=1)
        return {TOP_IDS: ids_NK.to(torch.int32), TOP_LOGPS: logps_NK}

    return measure


def with_boundary(boundary_ids: Sequence[int]) -> Measure:
    """Two columns: the log-probability of each token, and that of any of `boundary_ids` following it."""

    def measure(outputs: Outputs, predictors_N: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
        ids_S = torch.tensor(boundary_ids, device=targets_N.device)
        own_N = outputs.every.select(predictors_N).logps(targets_N)
        after_N = boundary_logps(outputs.every.select(predictors_N + 1), ids_S)
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
) -> dict[str, NDArray[np.generic]]:
    """What ``measure`` keeps of the scored tokens, in their order; the processes of a launch share the batches.

    Rows go through the model longest first, as many at a time as fit ``max_tokens`` when padded: an out-of-memory
    error, if any, comes at once, and little is padded. Batches are cut before they are dealt, so that no number
    depends on how many processes there are; each of them gets the whole result.
    """
    ranks = processes()
    batches = _batches(np.diff(row_starts), max_tokens)
    rows_done = np.cumsum([len(rows) for rows in batches])
    place = np.cumsum(scored) - 1
    result: dict[str, NDArray[np.generic]] = {}
    # One with nothing to do measures the first batch for its arrays' shapes, which must be the same in all of them.
    for number in range(ranks.rank, len(batches), ranks.world) if ranks.rank < len(batches) else [0][: len(batches)]:
        tokens_N, kept = _measured(model, input_ids, row_starts, scored, rows=batches[number], measure=measure)
        for name, values in kept.items():
            if name not in result:
                result[name] = np.zeros((int(scored.sum()), *values.shape[1:]), dtype=values.dtype)
            if number % ranks.world == ranks.rank:
                result[name][place[tokens_N]] = values
        progress(int(rows_done[min(number + ranks.world, len(batches)) - 1]), int(rows_done[-1]))
    return {name: _joined(values) for name, values in sorted(result.items())}


def _batches(lengths: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """The rows of each batch, longest first."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    done = 0
    while done < len(order):
        batches.append(order[done : done + max(1, max_tokens // int(lengths[order[done]]))])
        done += len(batches[-1])
    return batches


def _measured(
    model: nn.Module,
    input_ids: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    scored: NDArray[np.bool_],
    *,
    rows: NDArray[np.int64],
    measure: Measure,
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.generic]]]:
    """The scored tokens of one batch, as indices into ``input_ids``, and what is kept of them."""
    device = next(model.parameters()).device
    lengths = np.diff(row_starts)[rows]
    token_RT = row_starts[rows][:, None] + np.arange(lengths.max())[None, :]
    inside_RT = np.arange(lengths.max())[None, :] < lengths[:, None]
    token_RT = np.where(inside_RT, token_RT, 0)
    ids_RT = np.where(inside_RT, input_ids[token_RT], 0).astype(np.int64)
    wanted_RT = inside_RT & scored[token_RT]
    index_N = np.flatnonzero(wanted_RT)
    predictors_N = torch.from_numpy(index_N - 1).to(device)
    targets_N = torch.from_numpy(ids_RT.reshape(-1)[index_N]).to(device)

    def use(outputs: Outputs) -> Any:
        return measure(outputs, predictors_N, targets_N)

    kept = model(input_ids=torch.from_numpy(ids_RT).to(device), score=use)
    return token_RT[wanted_RT], {
        name: (values.float() if values.is_floating_point() else values).cpu().numpy() for name, values in kept.items()
    }


def _joined(part: NDArray[np.generic]) -> NDArray[np.generic]:
    """An array of which each process has filled its own places. Added as integers: -0.0 + 0.0 would be another zero."""
    return processes().joined(part.view(f"i{part.dtype.itemsize}")).view(part.dtype)
