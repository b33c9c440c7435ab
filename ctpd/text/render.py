"""Render and tokenize many rows in one tokenizer call, with cleaned offsets (docs/method.md#tokenization).

Shapes: R rows, each one rendered (prompt, response); N tokens of a row, up to and including its end token. Ragged
arrays are flat, row r in ``[starts[r], starts[r + 1])``.
"""

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from ctpd.core.errors import UserError
from ctpd.text.align import BoolArray, IntArray, clean_ends, row_starts
from ctpd.text.pairs import Message
from ctpd.text.plain import PlainTemplate as PlainTemplate
from ctpd.text.templates import (
    DIFFERENCES,
    EndToken,
    FastTokenizer,
    Frame,
    Refused,
    Row,
    Template,
    special_pattern,
    special_texts,
)
from ctpd.text.templates import ChatTemplate as ChatTemplate

REFUSED_FIX = "Use another template, `system: merge` if it has no system role, or remove the row"
_SPACE_MARKS = ("▁", "Ġ")  # SentencePiece's, byte-level BPE's


class Encoded(NamedTuple):
    """R rows tokenized for one side: prompt, response, template text up to the end token, end token."""

    ids: NDArray[np.int32]  # [sum N]
    row_starts: IntArray  # [R + 1]
    prompt_tokens: IntArray  # [R] tokens before the response, BOS included
    response_tokens: IntArray  # [R]
    response_ends: IntArray  # [sum of response_tokens] cleaned character ends, relative to the response
    crossing: BoolArray  # [R] whether the first response token also covers the end of the prompt
    difference: IntArray  # [R] of the template's own rendering: index in DIFFERENCES, -1 for none

    @property
    def response_starts(self) -> IntArray:
        """``[R + 1]`` where each row begins in ``response_ends``."""
        return row_starts(self.response_tokens)

    def select(self, keep: BoolArray) -> "Encoded":
        """The rows where ``keep [R]`` is true."""
        lengths = np.diff(self.row_starts)
        return Encoded(
            self.ids[np.repeat(keep, lengths)],
            row_starts(lengths[keep]),
            self.prompt_tokens[keep],
            self.response_tokens[keep],
            self.response_ends[np.repeat(keep, self.response_tokens)],
            self.crossing[keep],
            self.difference[keep],
        )


@final
class TemplatedTokenizer:
    """A tokenizer with the template that one model is prompted with.

    Args:
        tokenizer: a fast tokenizer; its settings are not changed.
        template: how conversations are written.
        name: "teacher" or "student", for errors.

    Raises:
        UserError: the tokenizer is slow, and so gives no offsets; a plain template is used with a tokenizer without
            EOS.
    """

    def __init__(self, tokenizer: FastTokenizer, template: Template, name: str) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.ends_from: set[str] = set()  # what said which token ends the responses that were encoded
        if not tokenizer.is_fast:
            raise UserError(
                f"the {name}'s tokenizer '{tokenizer.name_or_path}' is a slow one, which gives no character "
                "offsets of its tokens",
                fix="Give a model directory with a tokenizer.json; with sentencepiece and protobuf installed "
                "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one for most tokenizers",
            )
        if not template.writes_end and tokenizer.eos_token_id is None:
            raise UserError(
                f"the {name}'s tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token to end a response",
                fix="Set eos_token in the model's tokenizer_config.json, or use a chat template",
            )
        added = tokenizer.added_tokens_decoder
        self.special_texts = special_texts(tokenizer)
        special = {
            *tokenizer.convert_tokens_to_ids(sorted(self.special_texts)),
            *(i for i, t in added.items() if t.special),
        }
        extra = []
        if template.end is not None:
            special.update(self._end_ids(template.end))
            extra = [template.end.text] if template.end.origin == "recipe" else []
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        self._space_ids = space_mark_ids(tokenizer)
        self._special = special_pattern(tokenizer, extra)
        self.adds_bos = not template.writes_end and self._tokenizer_adds_bos()

    def holds_special_text(self, text: str) -> bool:
        """Whether ``text`` contains the text of a special token of this side (docs/method.md#tokenization)."""
        return self._special.search(text) is not None

    def frames(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Frame]:
        """The text around the responses to each prompt.

        Raises:
            UserError: the template does not render one of them.
        """
        found = []
        for frame, name in zip(self.template.frames(prompts, where=where), where, strict=True):
            if isinstance(frame, Refused):
                raise UserError(frame.why, where=name, fix=REFUSED_FIX)
            found.append(frame)
        return found

    def refused(self, prompts: Sequence[Sequence[Message]], *, where: Sequence[str]) -> list[Refused | None]:
        """Why the template does not render each prompt; None if it does."""
        found = self.template.frames(prompts, where=where)
        return [frame if isinstance(frame, Refused) else None for frame in found]

    def prompt_tokens(self, frames: Sequence[Frame]) -> IntArray:
        """``[R]`` number of tokens of the text before the response, tokenized without it; BOS included."""
        ids = self._call([frame.before for frame in frames])["input_ids"]
        return np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)) + int(self.adds_bos)

    def encode(self, rows: Sequence[Row], *, frames: Sequence[Frame], where: Sequence[str]) -> Encoded:
        """Render and tokenize R rows ``(prompt, response)`` in one call of the tokenizer (docs/method.md#tokenization).

        Args:
            rows: prompts with their responses, which are not empty.
            frames: ``[R]`` the text around each response (`frames`).
            where: ``[R]`` names each row in errors.
        """
        texts = [frame.before + response + frame.after for (_, response), frame in zip(rows, frames, strict=True)]
        self.ends_from.update(frame.end_from for frame in frames)
        kinds = self.template.differences(rows, frames=frames, where=where)
        output = self._call(texts, return_offsets_mapping=True)
        counts = np.fromiter(map(len, output["input_ids"]), dtype=np.int64, count=len(texts))
        size = int(counts.sum())
        tokens = _Tokens(
            ids=np.fromiter(chain.from_iterable(output["input_ids"]), dtype=np.int32, count=size),
            offsets=np.fromiter(
                chain.from_iterable(chain.from_iterable(output["offset_mapping"])), dtype=np.int64, count=2 * size
            ).reshape(size, 2),
            starts=row_starts(counts),
        )
        begin = np.array([len(frame.before) for frame in frames], dtype=np.int64)
        length = np.array([len(response) for _, response in rows], dtype=np.int64)
        first, stop = _response_range(tokens, texts, begin, begin + length)
        if self.template.writes_end:
            end = self._end_tokens(tokens, begin + length, first, stop, where)
        else:
            end = np.diff(tokens.starts)
            stop = np.where(stop > first, end, first)  # a plain template has no text after the response
        in_row = np.arange(size) - np.repeat(tokens.starts[:-1], counts)
        in_response = (in_row >= np.repeat(first, counts)) & (in_row < np.repeat(stop, counts))
        response_starts = row_starts(stop - first)
        offsets = tokens.offsets[in_response] - np.repeat(begin, stop - first)[:, None]
        ends = clean_ends(
            offsets[:, 0],
            offsets[:, 1],
            token_starts=response_starts,
            texts=[response for _, response in rows],
            space_only=np.isin(tokens.ids[in_response], self._space_ids),
        )
        crossing = self._crossing(tokens, texts, begin, first, stop)
        ids, starts = self._closed(tokens, in_row <= np.repeat(end, counts))
        difference = np.array([DIFFERENCES.index(kind) if kind else -1 for kind in kinds], dtype=np.int64)
        return Encoded(ids, starts, first + int(self.adds_bos), stop - first, ends, crossing, difference)

    def _call(self, texts: list[str], **wanted: bool) -> Any:
        if not texts:  # of a block whose rows a template refuses all; the library has no answer to an empty batch
            return {"input_ids": [], "offset_mapping": []}
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **wanted,
        )

    def _end_ids(self, end: EndToken) -> list[int]:
        ids: list[int] = self.tokenizer(end.text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return ids
        if end.origin != "recipe":
            return []
        raise UserError(
            f"`end_token: {end.text}` of the {self.name} is {len(ids)} tokens of '{self.tokenizer.name_or_path}'",
            fix="Give the text of one token of the tokenizer",
        )

    def _tokenizer_adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        with_special, bare = (self.tokenizer("a", add_special_tokens=add)["input_ids"][:1] for add in (True, False))
        return bos is not None and list(with_special) == [bos] and list(bare) != [bos]

    def _end_tokens(
        self, tokens: "_Tokens", response_end: IntArray, first: IntArray, stop: IntArray, where: Sequence[str]
    ) -> IntArray:
        """``[R]`` index in its row of the end token: the first special token after the response (docs/method.md#end-token)."""
        rows = tokens.rows
        is_end = np.isin(tokens.ids, self._special_ids) & (tokens.offsets[:, 0] >= response_end[rows])
        index, found = _first(is_end, tokens)
        if not found.all():
            raise UserError(
                f"the {self.name}'s chat template writes no special token after the response to stop generation",
                where=where[int(np.argmin(found))],
                fix="Use a template that ends the assistant's turn with a special token, or a plain template",
            )
        return index

    def _crossing(
        self, tokens: "_Tokens", texts: Sequence[str], begin: IntArray, first: IntArray, stop: IntArray
    ) -> BoolArray:
        """``[R]`` whether the first response token also covers the end of the prompt (docs/method.md#tokenization)."""
        has_tokens = stop > first
        at = np.minimum(tokens.starts[:-1] + first, len(tokens.ids) - 1)
        starts = tokens.offsets[at, 0]
        # If offsets are trimmed, an uncovered space at the end of the prompt belongs to the first response token.
        hidden = has_tokens & (starts == begin) & self._uncovered_space(tokens, texts, begin, at)
        for row in np.flatnonzero(hidden):
            token = self.tokenizer.convert_ids_to_tokens(int(tokens.ids[at[row]]))
            hidden[row] = token.startswith(_SPACE_MARKS)
        crossing: BoolArray = has_tokens & ((starts < begin) | hidden)
        return crossing

    @staticmethod
    def _uncovered_space(tokens: "_Tokens", texts: Sequence[str], begin: IntArray, at: IntArray) -> BoolArray:
        previous_end = np.where(at > tokens.starts[:-1], tokens.offsets[at - 1, 1], 0)
        return _follows_space(texts, begin) & (previous_end < begin)

    def _closed(self, tokens: "_Tokens", kept: BoolArray) -> tuple[NDArray[np.int32], IntArray]:
        """The kept tokens of each row, with BOS and EOS added where the text does not contain them."""
        ids, counts = tokens.ids[kept], np.bincount(tokens.rows[kept], minlength=tokens.starts.size - 1)
        if self.template.writes_end:
            return ids, row_starts(counts)
        starts = row_starts(counts + int(self.adds_bos) + 1)
        result = np.empty(starts[-1], dtype=np.int32)
        inner = np.ones(result.size, dtype=bool)
        inner[starts[1:] - 1] = False
        result[starts[1:] - 1] = self.tokenizer.eos_token_id
        if self.adds_bos:
            inner[starts[:-1]] = False
            result[starts[:-1]] = self.tokenizer.bos_token_id
        result[inner] = ids
        return result, starts


def space_mark_ids(tokenizer: FastTokenizer) -> IntArray:
    """The ids of the tokens that are only the tokenizer's mark for a space."""
    marks = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in _SPACE_MARKS}
    found = [id for mark, id in marks.items() if id is not None and tokenizer.convert_ids_to_tokens(id) == mark]
    return np.array(found, dtype=np.int64)


def unknown_id(tokenizer: FastTokenizer) -> int | None:
    """The id of the token for unknown text: a Unigram model gives it only in its serialized state."""
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ == "Unigram":
        found = json.loads(backend.model.__getstate__())["unk_id"]
    else:
        token = getattr(backend.model, "unk_token", None)
        found = backend.token_to_id(token) if token else None
    return None if found is None else int(found)


class _Tokens(NamedTuple):
    """R tokenized texts, flat, as the tokenizer gives them."""

    ids: NDArray[np.int32]
    offsets: IntArray  # [sum, 2]
    starts: IntArray  # [R + 1]

    @property
    def rows(self) -> IntArray:
        return np.repeat(np.arange(self.starts.size - 1), np.diff(self.starts))


def _response_range(tokens: _Tokens, texts: Sequence[str], begin: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
    """``[R]`` indices in its row of the first response token and of the token after the last; equal if there is none.

    A token belongs to the response if it covers a character of it. So does a token of width 0 at the start of the response
    (trimmed offsets give an inserted prefix, or a byte of one character, this width), unless it stands for the prompt's last
    space. Without response tokens both indices are the number of prompt tokens.
    """
    rows, (starts, ends) = tokens.rows, tokens.offsets.T
    inside = (ends > begin[rows]) & ((starts < end[rows]) | (ends <= end[rows]))
    at_border = np.flatnonzero((starts == ends) & (starts == begin[rows]))
    if at_border.size:
        row = rows[at_border]
        previous = np.where(at_border > tokens.starts[row], ends[at_border - 1], 0)
        inside[at_border] = ~(_follows_space(texts, begin)[row] & (previous < begin[row]))
    first, found = _first(inside, tokens)
    backwards = _Tokens(tokens.ids, tokens.offsets, tokens.starts[-1] - tokens.starts[::-1])
    after = _first(inside[::-1], backwards)[0][::-1]
    num_before = np.bincount(rows[ends <= begin[rows]], minlength=begin.size)
    return np.where(found, first, num_before), np.where(found, np.diff(tokens.starts) - after, num_before)


def _first(flags: BoolArray, tokens: _Tokens) -> tuple[IntArray, BoolArray]:
    """``[R]`` index in its row of the first true flag, and whether there is one."""
    at = np.flatnonzero(flags)
    begins = np.searchsorted(at, tokens.starts)
    found = begins[1:] > begins[:-1]
    index = np.zeros(found.size, dtype=np.int64)
    index[found] = at[begins[:-1][found]] - tokens.starts[:-1][found]
    return index, found


def _follows_space(texts: Sequence[str], begin: IntArray) -> BoolArray:
    return np.array(
        [text[max(at - 1, 0) : at].isspace() for text, at in zip(texts, begin.tolist(), strict=True)], dtype=bool
    )
