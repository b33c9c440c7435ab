"""Check aligned spans: the characters that offsets cover, and the decoded tokens of both sides against the text.

docs/method.md#properties-of-spans: coverage is complete; decoded text is equal after NFKC, case folding and removal of white space, with every
class of exceptions counted.

Shapes: R texts, N tokens of one side, S spans; flat as in `ctpd.text.mismatch`.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ctpd.text.align import BoolArray, IntArray, row_starts
from ctpd.text.mismatch import AlignedTexts, Tokenized, span_tokens
from ctpd.text.render import unknown_id
from ctpd.text.templates import FastTokenizer

COVERAGE = ("offsets", "cleaning", "white_space", "dropped")
FORGIVEN = ("exact", "inserted_prefix", "spacing", "case", "compatibility")  # equal after normalisation
EXCEPTIONS = ("unknown_token", "cut_character", "normalizer", "dropped_text", "other")
MEANINGS = {
    "offsets": "characters inside a token's own offsets",
    "cleaning": "characters that an end was moved over: composed or removed by the normalizer",
    "white_space": "white space that the tokenizer drops",
    "dropped": "other characters without a token: they belong to the next span",
    "exact": "the tokens spell the span's text byte for byte",
    "inserted_prefix": "the text with a space before it, which the tokenizer inserted",
    "spacing": "the text with other white space",
    "case": "the text in another case",
    "compatibility": "the text in another Unicode form (NFKC)",
    "unknown_token": "a token for unknown text",
    "cut_character": "bytes that are not complete characters: a span ends inside a character",
    "normalizer": "what the tokenizer's normalizer makes of the text",
    "dropped_text": "the text without some characters",
    "other": "none of these",
}
NUM_EXAMPLES = 3


class SpanFidelity(NamedTuple):
    """The result of `compare_spans`; counters of several blocks of texts can be added."""

    both: Counter[str]  # spans; equal_exactly and equal: what the two sides spell, compared with each other
    teacher: Counter[str]  # spans by class (FORGIVEN, EXCEPTIONS): what a side spells, compared with the text
    student: Counter[str]
    examples: dict[str, list[dict[str, str]]]  # "side: class" -> the first exceptions


class Speller:
    """The bytes that each token of one tokenizer stands for, independent of its neighbours.

    `decode` of the libraries depends on neighbouring tokens (it strips the first space, puts spaces between words). This
    class instead translates the vocabulary's alphabet as the tokenizer's decoder describes it.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        backend = tokenizer.backend_tokenizer
        parts = list(_parts(json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}))
        self._types = {part.get("type") for part in parts}
        self._prefixes = [part["prefix"] for part in parts if part.get("type") == "WordPiece"]
        self._suffixes = [part["suffix"] for part in parts if part.get("type") == "BPEDecoder"]
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self._token: Callable[[int], str | None] = backend.id_to_token
        self.unknown_id = unknown_id(tokenizer)
        normalizer = backend.normalizer
        self.normalize: Callable[[str], str] = normalizer.normalize_str if normalizer is not None else str
        self._spelled: dict[int, bytes] = {}

    def __call__(self, id: int) -> bytes:
        """The bytes that a token stands for; the space mark of SentencePiece is a space."""
        found = self._spelled.get(id)
        if found is None:
            found = self._spelled[id] = self._spell(id)
        return found

    def _spell(self, id: int) -> bytes:
        token = self._token(id) or ""
        if "ByteLevel" in self._types:
            alphabet = _byte_alphabet()
            if id in self._added or any(character not in alphabet for character in token):
                return str(self._added.get(id, token)).encode()
            return bytes(alphabet[character] for character in token)
        if "ByteFallback" in self._types and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        for prefix in self._prefixes:
            token = token.removeprefix(prefix)
        for suffix in self._suffixes:
            token = token.removesuffix(suffix)
        return token.replace("▁", " ").encode()


def coverage(aligned: AlignedTexts, side: Tokenized) -> Counter[str]:
    """Count characters by what covers them (`COVERAGE`). Every character is in a span: a span begins where the last one ends.

    Args:
        aligned: the texts.
        side: its teacher or its student.
    """
    lengths = np.array([len(text) for text in aligned.texts], dtype=np.int64)
    counts = np.diff(side.starts)
    limits, bases = np.repeat(lengths, counts), np.repeat(row_starts(lengths)[:-1], counts)
    starts, ends = (np.clip(side.offsets[:, i], 0, limits) for i in (0, 1))
    size = int(lengths.sum())
    own = _covered(starts + bases, ends + bases, size)
    cleaned = own | _covered(np.minimum(starts, side.ends) + bases, side.ends + bases, size)
    blank = np.fromiter((character.isspace() for text in aligned.texts for character in text), dtype=bool, count=size)
    flags = (own, cleaned & ~own, blank & ~cleaned, ~blank & ~cleaned)
    return Counter({name: int(np.count_nonzero(flag)) for name, flag in zip(COVERAGE, flags, strict=True)})


def compare_spans(aligned: AlignedTexts, *, teacher: Speller, student: Speller) -> SpanFidelity:
    """Compare what the tokens of each span spell on both sides, with each other and with the span's text."""
    both: Counter[str] = Counter(spans=0, equal_exactly=0, equal=0)
    sides: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    examples: dict[str, list[dict[str, str]]] = {}
    spellers = (teacher, student)
    kinds: dict[tuple[int, str, bytes, bool], str] = {}
    for text, pieces, unknown in _spans(aligned, spellers):
        both["spans"] += 1
        both["equal_exactly"] += pieces[0] == pieces[1]
        both["equal"] += pieces[0] == pieces[1] or _squeezed(pieces[0]) == _squeezed(pieces[1])
        expected = text.encode()
        for i in (0, 1):
            if pieces[i] == expected and not unknown[i]:
                sides[i]["exact"] += 1
                continue
            case = (i, text, pieces[i], unknown[i])
            kind = kinds.get(case)
            if kind is None:
                kind = kinds[case] = difference(
                    pieces[i], text, has_unknown=unknown[i], normalize=spellers[i].normalize
                )
            sides[i][kind] += 1
            if kind in EXCEPTIONS:
                kept = examples.setdefault(f"{('teacher', 'student')[i]}: {kind}", [])
                if len(kept) < NUM_EXAMPLES:
                    kept.append(
                        {"text": text, **{s: readable(p) for s, p in zip(("teacher", "student"), pieces, strict=True)}}
                    )
    return SpanFidelity(both, sides[0], sides[1], examples)


def difference(spelled: bytes, text: str, *, has_unknown: bool, normalize: Callable[[str], str]) -> str:
    """The class (`FORGIVEN` or `EXCEPTIONS`) of what one side's tokens spell, compared with the span's text.

    Args:
        spelled: the tokens' bytes.
        text: the span's characters.
        has_unknown: whether one of the tokens is the one for unknown text.
        normalize: the tokenizer's own normalizer.
    """
    if has_unknown:
        return "unknown_token"
    try:
        found = spelled.decode()
    except UnicodeDecodeError:
        return "cut_character"
    if found == f" {text}":
        return "inserted_prefix"
    for name, form in _FORMS.items():
        if form(found) == form(text):
            return name
    normal = normalize(text).replace("▁", " ")
    if _squeezed(found.encode()) == _squeezed(normal.encode()):
        return "normalizer"
    rest = iter(_normal_form(text))
    return "dropped_text" if all(character in rest for character in _normal_form(found)) else "other"


def readable(spelled: bytes) -> str:
    """Bytes as text; incomplete characters as hexadecimal numbers, as in ``⟨F0 9F⟩``."""
    try:
        return spelled.decode()
    except UnicodeDecodeError as error:
        good, bad = spelled[: error.start].decode(), spelled[error.start : error.end]
        rest = readable(spelled[error.end :])
        return f"{good}⟨{bad.hex(' ').upper()}⟩{rest}".replace("⟩⟨", " ")


def _spans(
    aligned: AlignedTexts, spellers: tuple[Speller, Speller]
) -> Iterator[tuple[str, tuple[bytes, bytes], tuple[bool, bool]]]:
    """The text of each span, what both sides spell there, and whether they hold a token for unknown text."""
    spans = aligned.spans
    sides = [
        _pieces(side, span, spans.span_starts, speller)
        for side, span, speller in zip(
            (aligned.teacher, aligned.student), (spans.teacher_span, spans.student_span), spellers, strict=True
        )
    ]
    boundaries = spans.boundaries.tolist()
    for r, text in enumerate(aligned.texts):
        begin = 0
        for s in range(int(spans.span_starts[r]), int(spans.span_starts[r + 1])):
            (first, first_unknown), (second, second_unknown) = sides[0][s], sides[1][s]
            yield text[begin : boundaries[s]], (first, second), (first_unknown, second_unknown)
            begin = boundaries[s]


def _pieces(side: Tokenized, span: IntArray, span_starts: IntArray, speller: Speller) -> list[tuple[bytes, bool]]:
    """``[sum S]`` what one side spells in each span, and whether a token for unknown text is in it."""
    spelled = [speller(id) for id in side.ids.tolist()]
    unknown = (side.ids == speller.unknown_id).tolist() if speller.unknown_id is not None else [False] * side.ids.size
    return [
        (spelled[a], unknown[a]) if b == a + 1 else (b"".join(spelled[a:b]), any(unknown[a:b]))
        for a, b in span_tokens(side, span, span_starts)
    ]


def _covered(starts: IntArray, ends: IntArray, size: int) -> BoolArray:
    opened = np.bincount(np.minimum(starts, ends), minlength=size + 1)
    covered: BoolArray = np.cumsum(opened - np.bincount(ends, minlength=size + 1))[:size] > 0
    return covered


def _squeezed(spelled: bytes) -> str:
    return _normal_form(spelled.decode(errors="surrogateescape"))


@lru_cache(maxsize=1 << 16)
def _normal_form(text: str) -> str:
    """After NFKC, case folding and removal of white space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _without_space(folded)


def _without_space(text: str) -> str:
    return "".join(text.split())


# From the strictest to the most forgiving; the first form in which both are equal names the difference.
_FORMS: dict[str, Callable[[str], str]] = {
    "exact": str,
    "spacing": _without_space,
    "case": lambda text: _without_space(text.casefold()),
    "compatibility": _normal_form,
}


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder's description, and those of the decoders in it."""
    if isinstance(decoder, dict):
        yield decoder
        for inner in decoder.get("decoders", ()):
            yield from _parts(inner)


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
