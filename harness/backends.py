"""Models as lm-eval sees them: one in memory through transformers, or a folder through vLLM.

Shape legend: B rows of a batch, T tokens, K kept positions, V vocabulary.
"""

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ctpd.core.errors import Unmeasurable, UserError
from ctpd.decoding import MaskedModel, Unsupported, end_tokens, greedy_tokens, is_plainly_greedy
from ctpd.probes import same_logits
from harness.branching import BranchingModel, choices
from harness.endings import Endings, room_for_prompt
from harness.isolation import Progress
from harness.prefixes import Group, Request, cost, plain_cost, plan

ENCODED_AT_ONCE = 1024
"""The number of requests whose texts are tokenized in one call."""

WORTHWHILE = 0.9
"""Requests are computed as trees if that takes at most this share of the tokens."""


def open_vllm(
    folder: str | Path,
    tokenizer: str | Path,
    *,
    precision: str,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    think_end_token: str | None = None,
) -> LM:
    """A model directory or hub id in vLLM, which makes batches by itself.

    Scores differ from those of transformers by the noise of other kernels: one table has one backend.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        module = importlib.import_module("lm_eval.models.vllm_causallms")
    except ImportError as error:
        raise UserError(
            f"`backend: vllm` needs vLLM, which cannot be imported ({error})",
            fix="Install it on a machine with a GPU, `pip install 'ctpd[vllm]'`, or use `backend: hf`",
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM reserves most of the device; a training in this process left cached blocks
    made: LM = type("VLLM", (_ScoredAlone, module.VLLM), {})(
        pretrained=str(folder),
        tokenizer=str(tokenizer),
        dtype=precision,
        revision=revision,
        tokenizer_revision=tokenizer_revision,
        think_end_token=think_end_token,
    )
    return made


class _ScoredAlone:
    """Mixed into a model of lm-eval: a continuation that lm-eval leaves no token of is tokenized by itself.

    A continuation whose text is in one token with the end of its context would be empty: lm-eval fails on it, or gives it
    the log-likelihood 0, with which it wins. All others are parted as lm-eval does.
    """

    num_alone = 0
    """The continuations that were tokenized by themselves."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        lm: Any = self
        parted: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)  # type: ignore[misc]
        if all(parted):
            return parted
        self.num_alone += 1
        kept = context.rstrip()  # spaces at its end belong to the continuation, as in lm-eval
        answer: list[int] = lm.tok_encode(context[len(kept) :] + continuation, add_special_tokens=False)
        return parted[0] or [lm.prefix_token_id], answer

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        _refuse_empty(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        return found


class SharedContextLM(_ScoredAlone, HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's model for transformers, which computes common beginnings of requests once, and reports progress.

    The choices of a document are branches after one context, few-shot examples that documents have in common are kept as
    keys and values (`harness.prefixes`), and logits are computed only at the positions of continuations. Scores are
    lm-eval's to rounding. A model that cannot be called so (`unshared` says why) is called as lm-eval does, with the last
    logits only if it takes ``logits_to_keep``: memory falls from batch x prompt x vocabulary to batch x answer x
    vocabulary.
    DEVIATION from lm-eval's default: log-softmax in float32 for half-precision models too; sums of bfloat16
    log-probabilities are so coarse that choices tie.
    DEVIATION in generation with a ``think_end_token``: stop strings end a row only behind its reasoning, as in lm-eval's
    class for vLLM; that for transformers heeds those in the reasoning, too.
    DEVIATION in generation: a row ends at its own first stop string. In lm-eval it goes on until all rows of its batch
    have met the same one; the text after a stop string is cut off either way.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: Progress | None,
        think_end_token: str | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
            think_end_token=_think_end(tokenizer, think_end_token),
        )
        self.num_truncated = 0
        self.endings = Endings()
        self.num_unfinished: int | None = None
        self.unshared: str | None = None
        self._progress = progress
        self._longest_continuation = 0
        self._ahead: dict[str, list[int]] = {}
        self._keeps_last_logits = self._probe()
        self._branching: BranchingModel | None = None
        try:
            self._branching = BranchingModel(model)
        except Unsupported as error:
            self.unshared = str(error)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        if string in self._ahead and add_special_tokens is None and not left_truncate_len and not kwargs:
            return self._ahead[string]
        encoded: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return encoded

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        _refuse_empty(requests)
        self._report(len(requests))
        encoded = []
        for start in range(0, len(requests), ENCODED_AT_ONCE):
            pairs = [request.args for request in requests[start : start + ENCODED_AT_ONCE]]
            self._encode_ahead([text for context, answer in pairs for text in (context.rstrip(), context + answer)])
            encoded += [((context, answer), *self._encode(context, answer)) for context, answer in pairs]
        self._ahead = {}
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _encode(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """Context and continuation, as lm-eval parts them; the continuation of an empty context follows BOS."""
        if context:
            parted: tuple[list[int], list[int]] = self._encode_pair(context, answer)
            return parted
        tokens = self.tok_encode(answer, add_special_tokens=False)
        begun = len(tokens) > 1 and tokens[0] == self.prefix_token_id
        return (tokens[:1], tokens[1:]) if begun else ([self.prefix_token_id], tokens)

    def _encode_ahead(self, texts: Sequence[str]) -> None:
        """Keep the tokens of these texts for `tok_encode`: one call of the tokenizer, and none twice."""
        self._ahead = {}
        bos = self.tokenizer.decode(self.prefix_token_id)
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for begun in (True, False):  # a text that begins with BOS gets none
            some = list(dict.fromkeys(text for text in texts if text and has_bos_prefix(text, bos) is begun))
            if some:
                given = {"add_special_tokens": False} if begun else options
                self._ahead |= dict(zip(some, self.tokenizer(some, **given)["input_ids"], strict=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._report(len(requests))
        self._encode_ahead([request.args[0] for request in requests])
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        for (context, _), options in zip((request.args for request in requests), settings, strict=True):
            room = room_for_prompt(self.max_length, options["max_gen_toks"])
            self.num_truncated += len(self.tok_encode(context)) > room
        own = getattr(self.model, "generation_config", None)
        if self._branching is None or not is_plainly_greedy(own) or not all(map(_plain, settings)):
            found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
            return found
        return self._generate(self._branching.masked, requests, settings)

    def _generate(
        self, model: MaskedModel, requests: list[Instance], settings: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """Greedy texts, in lm-eval's batches: requests of the same settings, the longest prompts first."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self._ahead = {}
        alike: dict[str, list[int]] = {}
        for index, options in enumerate(settings):
            alike.setdefault(repr(options), []).append(index)
        texts = [""] * len(requests)
        for group in alike.values():
            options = settings[group[0]]
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            until = handle_stop_sequences(list(options["until"]), eos=eos)
            finished = self._finish(until)
            order = sorted(group, key=lambda index: (-len(prompts[index]), requests[index].args[0]))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                room = options["max_gen_toks"]
                cut = [prompts[index][-(self.max_length - room) :] for index in batch]
                found = greedy_tokens(model, cut, room=[room] * len(batch), finished=finished)
                for index, tokens in zip(batch, found, strict=True):
                    self.endings.add(ended=finished(tokens))
                    texts[index] = self._answer(tokens, until)
                    self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _answer(self, tokens: list[int], until: Sequence[str]) -> str:
        """The scored text of generated tokens: without reasoning, up to the first stop string; as lm-eval has it."""
        think = self.think_end_token
        if think is None:
            return str(postprocess_generated_text(self.tok_decode(tokens), list(until), None))
        text, has_ended = self._behind_reasoning(tokens)
        self.num_unfinished = (self.num_unfinished or 0) + (not has_ended)
        return str(postprocess_generated_text(text, list(until), None))

    def _behind_reasoning(self, tokens: list[int]) -> tuple[str, bool]:
        """The text behind the last end of reasoning, and whether there is one; without it, all of the text."""
        think = self.think_end_token
        if isinstance(think, int):
            begin = len(tokens) - tokens[::-1].index(think) if think in tokens else 0
            text = str(self.tok_decode(tokens[begin:]))
            return text.lstrip(), begin > 0
        _, found, rest = str(self.tok_decode(tokens)).rpartition(think)
        return rest.lstrip(), bool(found)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """lm-eval's, for models and settings that `_generate` does not take; the endings are read off its tokens."""
        if self.think_end_token is not None:
            stop = [self.tok_decode(self.eot_token_id, skip_special_tokens=False)]
        found: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        ends = end_tokens(getattr(self.model, "generation_config", None)) | {self.eot_token_id}
        for tokens in found[:, context.shape[1] :].tolist():
            text = self.tok_decode(tokens)
            self.endings.add(ended=not ends.isdisjoint(tokens) or any(one in text for one in stop))
        return found

    def _finish(self, until: Sequence[str]) -> Callable[[list[int]], bool]:
        """Whether a row ends: at the model's end token, or where its last tokens read as a stop string (as in lm-eval)."""
        ends = end_tokens(getattr(self.model, "generation_config", None))
        # Two tokens more than the stop has by itself: a model may write it in other pieces.
        longest = 2 + max(len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until)

        def finished(tokens: list[int]) -> bool:
            if tokens[-1] in ends:
                return True
            tail = self.tokenizer.decode(tokens[-longest:])
            if not any(stop in tail for stop in until):
                return False
            if self.think_end_token is None:
                return True
            text, has_ended = self._behind_reasoning(tokens)
            return has_ended and any(stop in text for stop in until)

        return finished

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self._longest_continuation = max((len(continuation) for _, _, continuation in requests), default=0)
        if self._longest_continuation > self.max_length:
            raise Unmeasurable(
                f"a continuation of {self._longest_continuation} tokens is longer than the model's {self.max_length}",
                fix="Evaluate a model with a longer context",
            )
        self.num_truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        if self._branching is not None:
            wanted = [
                Request(tuple((context + answer)[-(self.max_length + 1) :]), len(answer))
                for _, context, answer in requests
            ]
            groups = plan(wanted)
            if cost(groups) <= WORTHWHILE * plain_cost(wanted):
                return self._shared(self._branching, groups, wanted, [text for text, _, _ in requests])
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        return found

    def _shared(
        self, model: BranchingModel, groups: Sequence[Group], wanted: Sequence[Request], texts: Sequence[Any]
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(wanted)
        for group in groups:
            for index, value, greedy in choices(model, group, wanted, batch_size=self.batch_size):
                answers[index] = value, greedy
                if texts[index] is not None:  # the parts of a rolling request have none
                    self.cache_hook.add_partial("loglikelihood", texts[index], answers[index])
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, K, V] of the last K positions; the caller's slice counts from the end, so it fits any K."""
        if not self._keeps_last_logits:
            all_logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return all_logits
        # lm-eval pads on the right with token 0 and does not pass the lengths on. Trailing zeros are at least the padding.
        padding = int((inps.flip(1) != 0).int().cumsum(1).eq(0).sum(1).max())
        kept = min(inps.shape[1], padding + self._longest_continuation)
        with torch.no_grad():
            last_logits: Tensor = self.model(inps, logits_to_keep=kept).logits
        return last_logits

    def _probe(self) -> bool:
        """Whether the model takes ``logits_to_keep`` and means by it what we do."""
        ids = torch.full((1, 3), self.prefix_token_id, device=self.device)
        with torch.no_grad():
            try:
                last = self.model(ids, logits_to_keep=1).logits
            except TypeError:
                return False
            return last.shape[1] == 1 and same_logits(self.model(ids).logits[:, -1], last[:, -1])

    def _report(self, total: int) -> None:
        if self._progress is not None:
            self._progress(0, total)
            self.set_cache_hook(_ProgressHook(self._progress, total))


def _think_end(tokenizer: PreTrainedTokenizerBase, text: str | None) -> str | int | None:
    """The end of reasoning as lm-eval takes it: the id of a special token, which texts are decoded without, or a text."""
    if text is None or text not in tokenizer.all_special_tokens:
        return text
    found: Any = tokenizer.convert_tokens_to_ids(text)
    return int(found)


def _refuse_empty(requests: Sequence[Instance]) -> None:
    """Refuse choices without text, whose log-likelihood would be 0 for every model: they would always win."""
    for context, answer in (request.args for request in requests):
        if not answer:
            raise UserError(
                f"a choice of the task has no text, and no score; it follows {context[-60:]!r}",
                fix="Correct `doc_to_choice`, `target_delimiter` or the documents of the task",
            )


class _ProgressHook(CacheHook):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval calls its response cache once per answered request, and has no other hook for progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__(None)
        self._progress, self._done, self._total = progress, 0, total

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _plain(options: Mapping[str, Any]) -> bool:
    """Whether a request is for greedy text, without any other setting."""
    rest = {name: value for name, value in options.items() if name not in ("until", "max_gen_toks")}
    return not rest.pop("do_sample", False) and not rest.pop("temperature", 0.0) and not rest
