"""Span types and tokens per span of two tokenizers on bare texts, on small tokenizers and, where given, on real ones."""

import os
from pathlib import Path

import numpy as np
import pytest

from ctpd.core.errors import UserError
from ctpd.inspection.tokenizers import compare_tokenizers, drawn_spans, read_responses
from ctpd.models import find_tokenizer
from ctpd.text.align import align_spans, clean_offsets
from ctpd.text.mismatch import SPAN_TYPES, align_texts, mismatch_counts, span_sizes, span_types
from tests.fixtures.tokenizers import KINDS, TEXTS, tokenizer

SAMPLES = [*TEXTS[:4], "ok 🙂 then é", "a"]


def test_span_types_are_named_teacher_first() -> None:
    types = span_types(np.array([1, 1, 2, 3]), np.array([1, 4, 1, 2]))
    assert [SPAN_TYPES[i] for i in types] == ["1:1", "1:n", "n:1", "n:m"]


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", ["byte_bpe", "unigram", "wordpiece"])
def test_a_batch_of_texts_has_the_spans_of_each_text_alone(teacher: str, student: str) -> None:
    sides = tokenizer(teacher), tokenizer(student)
    aligned = align_texts(SAMPLES, teacher=sides[0], student=sides[1])
    assert aligned.texts == SAMPLES
    for r, text in enumerate(SAMPLES):
        offsets = []
        for side in sides:
            output = side(text, add_special_tokens=False, return_offsets_mapping=True)
            marks = [token in ("▁", "Ġ") for token in side.convert_ids_to_tokens(output["input_ids"])]
            offsets.append(clean_offsets(output["offset_mapping"], text, space_only=marks))
        alone = align_spans(*offsets, len(text))
        first, stop = aligned.spans.span_starts[r : r + 2]
        assert aligned.spans.boundaries[first:stop].tolist() == alone.boundaries.tolist()


@pytest.mark.parametrize("student", KINDS)
def test_counts_add_up(student: str) -> None:
    """Span types sum to the spans, spans times their tokens to the tokens, and covered characters to all."""
    aligned = align_texts(SAMPLES, teacher=tokenizer("byte_bpe"), student=tokenizer(student))
    counts = mismatch_counts(aligned)
    assert sum(counts[name] for name in SPAN_TYPES) == counts["spans"] == aligned.spans.boundaries.size
    assert counts["covered"] == counts["characters"] == sum(map(len, SAMPLES))
    for side, sizes in zip(("teacher", "student"), span_sizes(aligned), strict=True):
        assert sum(size * number for size, number in sizes.items()) == counts[f"{side}_tokens"]
        assert sum(sizes.values()) == counts["spans"]


def test_exchanging_the_sides_exchanges_the_types() -> None:
    one, other = tokenizer("byte_bpe"), tokenizer("unigram")
    there = compare_tokenizers(SAMPLES, teacher=one, student=other).types
    back = compare_tokenizers(SAMPLES, teacher=other, student=one).types
    assert there["1:n"] != there["n:1"]
    assert [there[name] for name in SPAN_TYPES] == [back[name] for name in ("1:1", "n:1", "1:n", "n:m")]


def test_texts_without_tokens_are_skipped_and_counted() -> None:
    aligned = align_texts(["", "a", "\n"], teacher=tokenizer("byte_bpe"), student=tokenizer("wordpiece"))
    assert aligned.texts == ["a"]
    assert aligned.num_skipped == 2
    with pytest.raises(UserError, match="no text has tokens on both sides"):
        compare_tokenizers(["", "\n"], teacher=tokenizer("byte_bpe"), student=tokenizer("wordpiece"))


def test_blocks_of_texts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"teacher": tokenizer("byte_bpe"), "student": tokenizer("unigram")}
    whole = compare_tokenizers(SAMPLES, **sides)
    monkeypatch.setattr("ctpd.inspection.tokenizers._BLOCK", 2)
    assert compare_tokenizers(SAMPLES, **sides).plain()["types"] == whole.types
    assert compare_tokenizers(SAMPLES, **sides).spelling == whole.spelling


def test_drawn_spans_put_the_text_together_again() -> None:
    drawn = drawn_spans(SAMPLES, teacher=tokenizer("byte_bpe"), student=tokenizer("unigram"), limit=2)
    assert ["".join(span["text"] for span in text) for text in drawn] == SAMPLES[:2]
    for span in drawn[0]:
        assert span["type"] == SPAN_TYPES[2 * (len(span["teacher"]) > 1) + (len(span["student"]) > 1)]


REAL = {
    # spans, not alike byte for byte (3: composed by Qwen's NFC; 2: Llama's tokens cut a Korean character), normalised
    ("qwen3", "llama3_1"): (496378, 3, 0, (98.41, 0.24, 0.91, 0.44)),
    ("gemma3", "llama3_1"): (475586, 2, 2, (89.87, 2.38, 6.09, 1.65)),
}


@pytest.mark.parametrize("pair", REAL, ids=" -> ".join)
def test_real_tokenizers_have_the_known_spans(pair: tuple[str, str], shared_dir: Path) -> None:
    folder = Path(os.environ.get("CTPD_TOKENIZERS", "no such folder"))
    if not all((folder / name).is_dir() for name in pair):
        pytest.skip(reason="$CTPD_TOKENIZERS names no folder with the tokenizers (results/mismatch/README.md says how)")
    texts = read_responses(shared_dir / "data" / "preference" / "ultrafeedback_binarized_train1000.parquet")
    teacher, student = (find_tokenizer(str(folder / name)) for name in pair)
    found = compare_tokenizers(texts, teacher=teacher, student=student)
    num_spans, not_exactly, not_alike, percent = REAL[pair]
    assert found.counts["texts"] == 1998
    assert found.counts["covered"] == found.counts["characters"]
    assert found.counts["spans"] == num_spans
    assert (num_spans - found.both["equal_exactly"], num_spans - found.both["equal"]) == (not_exactly, not_alike)
    assert tuple(round(share, 2) for share in found.plain()["percent"].values()) == percent
