"""Models as lm-eval sees them: one in memory through transformers, or a folder through vLLM.

Shape legend: B rows of a batch, T tokens, K kept positions, V vocabulary.
"""

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ctpd.core.errors import UserError
from harness.isolation import Progress


def open_vllm(
    folder: str | Path,
    tokenizer: str | Path,
    *,
    precision: str,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
) -> LM:
    """A model directory or hub id behind vLLM, which batches by itself.

    Scores differ from those of transformers by the noise of other kernels: one table has one backend.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        module = importlib.import_module("lm_eval.models.vllm_causallms")
    except ImportError as error:
        raise UserError(
            f"`backend: vllm` needs vLLM, which cannot be imported ({error})",
            fix="Install it beside a GPU, `pip install 'ctpd[vllm]'`, or use `backend: hf`",
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM asks for most of the device at its start; a training in this process left blocks
    made: LM = module.VLLM(
        pretrained=str(folder), tokenizer=str(tokenizer), dtype=precision, revision=revision,
        tokenizer_revision=tokenizer_revision,
    )  # fmt: skip
    return made


class LastLogitsLM(HFLM):
    """lm-eval's model for transformers, that computes logits only where continuations are, and reports progress.

    Memory falls from batch x prompt x vocabulary to batch x answer x vocabulary, the scores stay (EVALUATION 3).
    DEVIATION from lm-eval's default: log-softmax in float32 for half-precision models too; sums of bfloat16
    log-probabilities are so coarse that choices tie.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, progress: Progress | None
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
        self.num_truncated = 0
        self._progress = progress
        self._longest_continuation = 0
        self._keeps_last_logits = self._probe()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._report(len(requests))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._report(len(requests))
        for context, options in (request.args for request in requests):
            room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
            if room <= 0:
                raise UserError(
                    f"the model's length of {self.max_length} tokens leaves no room for a prompt beside the "
                    f"{self.max_length - room} tokens that the task generates",
                    fix="Evaluate a model with a longer context, or lower `max_gen_toks` in the task's file",
                )
            self.num_truncated += len(self.tok_encode(context)) > room
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self._longest_continuation = max((len(continuation) for _, _, continuation in requests), default=0)
        self.num_truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, K, V] of the last K positions; the caller's slice counts from the end, so it fits any K."""
        if not self._keeps_last_logits:
            return super()._model_call(inps, attn_mask, labels)
        # lm-eval pads on the right with token 0 and tells nobody the lengths. Trailing zeros are at least the padding.
        padding = int((inps.flip(1) != 0).int().cumsum(1).eq(0).sum(1).max())
        kept = min(inps.shape[1], padding + self._longest_continuation)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=kept).logits

    def _probe(self) -> bool:
        """Whether the model takes ``logits_to_keep`` and means by it what we do."""
        ids = torch.full((1, 3), self.prefix_token_id, device=self.device)
        with torch.no_grad():
            try:
                last = self.model(ids, logits_to_keep=1).logits
            except TypeError:
                return False
            return last.shape[1] == 1 and torch.allclose(last[:, -1], self.model(ids).logits[:, -1], atol=1e-2)

    def _report(self, total: int) -> None:
        if self._progress is not None:
            self._progress(0, total)
            self.set_cache_hook(_ProgressHook(self._progress, total))


class _ProgressHook(CacheHook):
    """lm-eval calls its response cache once per answered request: the one place that tells how far it is."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__(None)
        self._progress, self._done, self._total = progress, 0, total

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._progress(self._done, self._total)
