"""A causal language model of transformers under masks, positions and keys and values of our own.

Shape legend: B rows of a batch, T tokens of a row, P tokens of a prefix, K kept positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ctpd.probes import other_mixing
from harness.prefixes import Group, Request, Row, pack

Past = list[tuple[Tensor, Tensor]]
"""Keys and values [1, heads, P, width] of each layer."""


ROWS_AT_ONCE = 256
"""Rows of logits in float32 at a time: 128 MiB for a vocabulary of 128k."""


class Unsupported(Exception):
    """The model cannot be called this way; the message says why."""


class BranchingModel:
    """Calls a model on trees of tokens (`Row`), after prefixes that are computed once.

    Layers with a sliding window get a mask of their own and keep all keys; windows count positions, as in transformers.

    Raises:
        Unsupported: the model's attention, positions or cache are of another kind, or a trial gives other logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        config: Any = model.config
        text = config.get_text_config()
        self._kinds = set(getattr(text, "layer_types", None) or ())
        self._window: int | None = getattr(text, "sliding_window", None)
        if self._kinds == {"full_attention"} or not getattr(text, "use_sliding_window", True):
            self._window = None
        _check_configuration(self._model)
        self._try()

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return next(self._model.parameters()).device

    @torch.no_grad()
    def prefix(self, tokens: Sequence[int]) -> Past:
        """Keys and values of a prefix."""
        cache = DynamicCache()
        ids = torch.tensor([tokens], device=self.device)
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    @torch.no_grad()
    def logits(self, rows: Sequence[Row], past: Past) -> Tensor:
        """Logits [B, K, V] of the last K tokens of each row: all that are read. Rows are padded on the left."""
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
            _see_ancestors(allowed[number, first:, length + first :], row)
        of_keys = torch.cat([torch.arange(length).expand(len(rows), -1), positions], dim=1)
        outputs = self._model(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=self.masks(allowed, positions, of_keys),
            past_key_values=_cache(past, len(rows)) if past else None,
            use_cache=bool(past),
            logits_to_keep=kept,
        )
        return outputs.logits

    @torch.no_grad()
    def prefill(self, ids: Tensor, padding: Sequence[int], cache: Any) -> Tensor:
        """Logits [B, V] after prompts [B, T] that are padded on the left; fills an empty cache."""
        width = ids.shape[1]
        positions = torch.arange(width) - torch.tensor(padding)[:, None]
        masks = None
        if any(padding):
            allowed = torch.ones(width, width, dtype=torch.bool).tril() & (positions >= 0)[:, None]
            masks = self.masks(allowed, positions, positions)
        positions = positions.clamp(min=0).to(self.device)
        return self._model(
            input_ids=ids, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    @torch.no_grad()
    def step(self, ids: Tensor, padding: Sequence[int], cache: Any) -> Tensor:
        """Logits [B, V] after one more token [B] of each row; ``padding`` as for the prompts."""
        length = cache.get_seq_length()
        of_keys = torch.arange(length + 1) - torch.tensor(padding)[:, None]
        positions = of_keys[:, -1:]
        masks = self.masks((of_keys >= 0)[:, None], positions, of_keys) if any(padding) else None
        return self._model(
            input_ids=ids[:, None], position_ids=positions.to(self.device), attention_mask=masks,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    def masks(self, allowed: Tensor, of_queries: Tensor, of_keys: Tensor) -> Any:
        """What transformers takes as a finished mask: added to the scores, [B, 1, queries, keys], or one a kind of layer.

        Args:
            allowed: [B, queries, keys], whether a query may see a key, windows aside.
            of_queries: [B, queries] positions.
            of_keys: [B, keys] positions.
        """
        if self._window is None:
            return self._added(allowed)
        near = self._added(allowed & (of_queries[:, :, None] - of_keys[:, None] < self._window))
        if self._kinds <= {"sliding_attention"}:
            return near
        return {"full_attention": self._added(allowed), "sliding_attention": near}

    def _added(self, allowed: Tensor) -> Tensor:
        dtype = self._model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
        # The least number, not -inf: a padding query sees nothing, and its softmax must not be NaN.
        return mask.masked_fill_(~allowed.to(self.device), torch.finfo(dtype).min)[:, None]

    def _try(self) -> None:
        """Compare a made-up group with plain passes."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        numbers = [i * 7919 % vocabulary for i in range(1, 13)]
        shared, branches = numbers[:5], (numbers[5:8], numbers[8:10], numbers[10:])
        requests = {i: Request((*shared, *branch, 0), len(branch)) for i, branch in enumerate(branches)}
        rows = [pack(requests, skip=2), pack({2: requests[2]}, skip=2)]
        training = self._model.training
        self._model.eval()
        try:
            plain = [self._plain(requests[index]) for index in requests]
            # After a prefix, in a batch with padding; then the same again in one row.
            for tried, past in ((rows, self.prefix(shared[:2])), ([pack(requests, skip=0)], [])):
                found = self.logits(tried, past)
                for number, row in enumerate(tried):
                    for index, nodes in row.readings:
                        last = found.shape[1] - len(row.tokens)
                        _check_equal(found[number, [last + node for node in nodes]], plain[index])
        except Unsupported:
            raise
        except Exception as error:  # whatever a model of another kind raises: it is then called plainly
            raise Unsupported(f"{type(error).__name__}: {error}") from error
        finally:
            self._model.train(training)

    @torch.no_grad()
    def _plain(self, request: Request) -> Tensor:
        ids = torch.tensor([request.tokens[:-1]], device=self.device)
        return self._model(ids).logits[0, -request.scored :]


def choices(
    model: BranchingModel, group: Group, requests: Sequence[Request], *, batch_size: int
) -> Iterator[tuple[int, float, bool]]:
    """Yield ``(request, log-likelihood, whether greedy)`` for every request of a group."""
    past = model.prefix(group.prefix) if group.prefix else []
    for start in range(0, len(group.rows), batch_size):
        rows = group.rows[start : start + batch_size]
        logits_BKV = model.logits(rows, past)
        kept = logits_BKV.shape[1]
        places = [
            (number, kept - len(row.tokens) + node, target, index)
            for number, row in enumerate(rows)
            for index, nodes in row.readings
            for node, target in zip(nodes, requests[index].tokens[-requests[index].scored :], strict=True)
        ]
        logps, hits = [], []
        for part in torch.tensor(places, device=logits_BKV.device).split(ROWS_AT_ONCE):
            row_N, at_N, target_N, _ = part.unbind(1)
            logits_NV = logits_BKV[row_N, at_N].float()
            logps += (logits_NV.gather(1, target_N[:, None])[:, 0] - logits_NV.logsumexp(-1)).tolist()
            hits += (logits_NV.argmax(-1) == target_N).tolist()
        answers: dict[int, tuple[float, bool]] = {}
        for (_, _, _, index), logp, hit in zip(places, logps, hits, strict=True):
            before, greedy = answers.get(index, (0.0, True))
            answers[index] = before + logp, greedy and hit
        for index, (value, greedy) in answers.items():
            yield index, value, greedy


def _check_configuration(model: Any) -> None:
    text = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported("encoder and decoder")
    if getattr(text, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        raise Unsupported(f"attention implementation {text._attn_implementation} takes no mask of ours")
    if reason := other_mixing(model):
        raise Unsupported(reason)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds_of_rope = {rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))}
    if kinds_of_rope & {"dynamic", "longrope"}:
        raise Unsupported("positions that depend on the length of the whole batch")


def _check_equal(found: Tensor, plain: Tensor) -> None:
    limit = (1e-4 if plain.dtype == torch.float32 else 4e-2) * float(plain.abs().max())
    worst = float((found - plain).abs().max())
    if not worst <= limit:
        raise Unsupported(f"logits differ by {worst:.1e} from those of a plain pass")


def _see_ancestors(allowed: Tensor, row: Row) -> None:
    """Set [T, T] to who sees whom in a tree; parents come before children."""
    for start, end, parent in row.branches:
        if parent >= 0:
            allowed[start:end, : parent + 1] = allowed[parent, : parent + 1]
        allowed[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()


def _cache(past: Past, rows: int) -> DynamicCache:
    """The prefix for every row, without a copy; what the rows add grows elsewhere."""
    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        cache.layers.append(layer)
    return cache
