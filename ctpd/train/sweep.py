"""One pass of a frozen model over many rows: a stored signal.

Shape legend: R rows of a batch, T tokens of the longest row, N scored tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ctpd.models import Score, score


@torch.no_grad()
def sweep(
    model: nn.Module,
    input_ids: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    scored: NDArray[np.bool_],
    *,
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> NDArray[np.float32]:
    """Log-probabilities of the scored tokens, flat like ``input_ids``; 0 elsewhere.

    Rows go through the model longest first, as many at a time as fit ``max_tokens`` when padded: an out-of-memory
    error, if any, comes at once, and little is padded.
    """
    device = next(model.parameters()).device
    lengths = np.diff(row_starts)
    order = np.argsort(-lengths, kind="stable")
    result = np.zeros(len(input_ids), dtype=np.float32)
    done = 0
    while done < len(order):
        width = int(lengths[order[done]])
        rows = order[done : done + max(1, max_tokens // width)]
        token = row_starts[rows][:, None] + np.arange(width)[None, :]
        inside = np.arange(width)[None, :] < lengths[rows][:, None]
        token = np.where(inside, token, 0)
        ids_RT = np.where(inside, input_ids[token], 0).astype(np.int64)
        wanted_RT = inside & scored[token]
        index_N = np.flatnonzero(wanted_RT)
        request = Score(
            torch.from_numpy(index_N - 1).to(device), torch.from_numpy(ids_RT.reshape(-1)[index_N]).to(device)
        )
        logps_N = score(model, torch.from_numpy(ids_RT).to(device), request)
        result[token[wanted_RT]] = logps_N.float().cpu().numpy()
        done += len(rows)
        progress(done, len(order))
    return result
