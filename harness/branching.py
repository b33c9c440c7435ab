"""Log-likelihoods of requests from trees of tokens (`harness.prefixes`), after prefixes that are computed once.

Shape legend: B rows of a batch, T tokens of a row, P tokens of a prefix, K positions whose logits are computed, V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ctpd.decoding import MaskedModel, Unsupported
from ctpd.probes import largest_difference, same_logits
from harness.prefixes import Group, Request, TokenTree, pack

Past = list[tuple[Tensor, Tensor]]
"""Keys and values [1, heads, P, width] of each layer."""


ROWS_AT_ONCE = 256
"""Rows of logits in float32 at a time: 128 MiB for a vocabulary of 128k."""


class BranchingModel:
    """Calls a model on trees of tokens after a common prefix; all keys are kept, also where a layer has a window.

    Raises:
        Unsupported: the model's attention, positions or cache are of another kind, or a trial gives other logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.masked = MaskedModel(model)
        self._model: Any = model
        self._try()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.masked.device

    @torch.no_grad()
    def prefix(self, tokens: Sequence[int]) -> Past:
        """Keys and values of a prefix."""
        cache = DynamicCache()
        ids = torch.tensor([tokens], device=self.device)
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: list[Any] = cache.layers  # the library's base class does not declare keys and values
        return [(layer.keys, layer.values) for layer in layers]

    @torch.no_grad()
    def logits(self, rows: Sequence[TokenTree], past: Past) -> Tensor:
        """Logits [B, K, V] of the last K tokens of each row, from the first that is read. Rows are padded on the left."""
        width, kept = max(len(row.tokens) for row in rows), max(row.kept for row in rows)
        length = past[0][0].shape[2] if past else 0
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        allowed = torch.zeros(len(rows), width, length + width, dtype=torch.bool)
        for number, row in enumerate(rows):
            first = width - len(row.tokens)
            ids[number, first:] = torch.tensor(row.tokens)
            positions[number, first:] = torch.tensor(row.positions)
            allowed[number, first:, :length] = True
            _allow_ancestors(allowed[number, first:, length + first :], row)
        of_keys = torch.cat([torch.arange(length).expand(len(rows), -1), positions], dim=1)
        outputs = self._model(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=self.masked.masks(allowed, positions, of_keys),
            past_key_values=_cache(past, len(rows)) if past else None,
            use_cache=bool(past),
            logits_to_keep=kept,
        )
        logits_BKV: Tensor = outputs.logits
        return logits_BKV

    def _try(self) -> None:
        """Compare the logits of a made-up group with those of plain passes."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        numbers = [i * 7919 % vocabulary for i in range(1, 13)]
        shared, branches = numbers[:5], (numbers[5:8], numbers[8:10], numbers[10:])
        requests = {i: Request((*shared, *branch, 0), len(branch)) for i, branch in enumerate(branches)}
        rows = [pack(requests, skip=2), pack({2: requests[2]}, skip=2)]
        training = self._model.training
        self._model.eval()
        try:
            plain = [self._plain(requests[index]) for index in requests]
            # After a prefix, in a batch with padding; then without a prefix, in one row.
            for tried, past in ((rows, self.prefix(shared[:2])), ([pack(requests, skip=0)], [])):
                found = self.logits(tried, past)
                for number, row in enumerate(tried):
                    for index, nodes in row.readings:
                        last = found.shape[1] - len(row.tokens)
                        _check_equal(found[number, [last + node for node in nodes]], plain[index])
        except Unsupported:
            raise
        except Exception as error:  # a model that takes other arguments or another cache raises whatever it likes
            raise Unsupported(f"{type(error).__name__}: {error}") from error
        finally:
            self._model.train(training)

    @torch.no_grad()
    def _plain(self, request: Request) -> Tensor:
        ids = torch.tensor([request.tokens[:-1]], device=self.device)
        logits: Tensor = self._model(ids).logits[0, -request.scored :]
        return logits


def choices(
    model: BranchingModel, group: Group, requests: Sequence[Request], *, batch_size: int
) -> Iterator[tuple[int, float, bool]]:
    """Yield ``(request, log-likelihood, whether greedy)`` for every request of a group."""
    past = model.prefix(group.prefix) if group.prefix else []
    for start in range(0, len(group.rows), batch_size):
        rows = group.rows[start : start + batch_size]
        logits_BKV = model.logits(rows, past)
        kept = logits_BKV.shape[1]
        wanted = [
            (number, kept - len(row.tokens) + node, target, index)
            for number, row in enumerate(rows)
            for index, nodes in row.readings
            for node, target in zip(nodes, requests[index].tokens[-requests[index].scored :], strict=True)
        ]
        logps, hits = [], []
        for part in torch.tensor(wanted, device=logits_BKV.device).split(ROWS_AT_ONCE):
            row_N, at_N, target_N, _ = part.unbind(1)
            logits_NV = logits_BKV[row_N, at_N].float()
            logps += (logits_NV.gather(1, target_N[:, None])[:, 0] - logits_NV.logsumexp(-1)).tolist()
            hits += (logits_NV.argmax(-1) == target_N).tolist()
        answers: dict[int, tuple[float, bool]] = {}
        for (_, _, _, index), logp, hit in zip(wanted, logps, hits, strict=True):
            before, greedy = answers.get(index, (0.0, True))
            answers[index] = before + logp, greedy and hit
        for index, (value, greedy) in answers.items():
            yield index, value, greedy


def _check_equal(found: Tensor, plain: Tensor) -> None:
    if not same_logits(plain, found):
        worst = largest_difference(plain, found)
        raise Unsupported(f"logits differ by {worst:.1e} from those of a plain pass")


def _allow_ancestors(allowed: Tensor, row: TokenTree) -> None:
    """Set [T, T], which tokens of a tree attend to which: each to the path that leads to it. Parents come first."""
    for start, end, parent in row.branches:
        if parent >= 0:
            allowed[start:end, : parent + 1] = allowed[parent, : parent + 1]
        allowed[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()


def _cache(past: Past, rows: int) -> DynamicCache:
    """The prefix for every row, as views; the keys and values that the rows add are new tensors."""
    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        cache.layers.append(layer)
    return cache
