"""Fidelity of spans: decoded tokens, coverage of characters, and the class of every difference (docs/method.md#properties-of-spans)."""

import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctpd.text.fidelity import (
    COVERAGE,
    EXCEPTIONS,
    FORGIVEN,
    MEANINGS,
    Speller,
    compare_spans,
    coverage,
    difference,
    readable,
)
from ctpd.text.mismatch import align_texts, tokenize_bare
from tests.fixtures.tokenizers import KINDS, tokenizer

TEXT = st.lists(
    st.sampled_from([*"ab \n1é½ẞ", "e\u0301", "🙂", "日本", "  ", " the", "ﬁ", "\u200b", "नि", "dog"]), min_size=1
).map("".join)


def spelled(kind: str, text: str) -> bytes:
    speller = Speller(tokenizer(kind))
    return b"".join(speller(id) for id in tokenize_bare(tokenizer(kind), [text]).ids.tolist())


@given(text=TEXT)
def test_byte_level_tokens_spell_every_byte_of_the_text(text: str) -> None:
    assert spelled("byte_bpe", text) == text.encode()
    assert spelled("byte_bpe_nfc", text) == unicodedata.normalize("NFC", text).encode()
    assert spelled("byte_bpe_prefixed", text) in (text.encode(), f" {text}".encode())


@given(text=TEXT)
def test_byte_fallback_and_space_marks_are_spelled_as_what_they_stand_for(text: str) -> None:
    assert spelled("gemma_bpe", text) == text.encode()
    assert spelled("sentencepiece_bpe", text) == f" {text}".encode()


def test_a_special_token_spells_its_own_text() -> None:
    speller = Speller(tokenizer("byte_bpe"))
    assert speller(tokenizer("byte_bpe").convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"


CASES = {
    "exact": (b"dog", "dog"),
    "inserted_prefix": (b" dog", "dog"),
    "spacing": (b"dog", " dog"),
    "case": (b"dog", " DOG"),
    "compatibility": ("1\u20442".encode(), " \u00bd"),
    "cut_character": (b" \xec\x95", " 애"),
    "normalizer": (b"cafe", "café"),
    "dropped_text": (b"ab", "a\x00b"),
    "other": (b"cat", "dog"),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_class_of_difference_is_recognised(kind: str) -> None:
    def without_accents(text: str) -> str:
        return text.replace("é", "e")

    assert difference(*CASES[kind], has_unknown=False, normalize=without_accents) == kind
    assert difference(*CASES[kind], has_unknown=True, normalize=without_accents) == "unknown_token"


def test_every_class_has_a_case_and_a_meaning() -> None:
    assert {*CASES, "unknown_token"} == {*FORGIVEN, *EXCEPTIONS}
    assert set(MEANINGS) == {*FORGIVEN, *EXCEPTIONS, *COVERAGE}


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_every_character_is_counted_once(kind: str, text: str) -> None:
    aligned = align_texts([text, "a dog"], teacher=tokenizer(kind), student=tokenizer("byte_bpe"))
    assume(aligned.texts)
    for side in (aligned.teacher, aligned.student):
        assert coverage(aligned, side).total() == sum(map(len, aligned.texts))
    assert coverage(aligned, aligned.student)["offsets"] == sum(map(len, aligned.texts))


def test_coverage_says_what_covers_a_character() -> None:
    """A combining mark that NFC composes away, the spaces between words, a removed character at the start."""
    text = "\x00e\u0301 x"
    aligned = align_texts([text], teacher=tokenizer("wordpiece"), student=tokenizer("byte_bpe"))
    found = coverage(aligned, aligned.teacher)
    assert (found["white_space"], found["dropped"]) == (1, 1)
    assert found["offsets"] + found["cleaning"] == 3


@pytest.mark.parametrize("student", ["byte_bpe_trimmed", "gemma_bpe", "sentencepiece_bpe"])
def test_spans_of_lossless_tokenizers_are_spelled_alike(student: str) -> None:
    texts = ["No, Tom! It has 12 lazy\n\nfoxes: the dog is not quick.", "What? A brown pear."]
    sides = tokenizer("byte_bpe"), tokenizer(student)
    aligned = align_texts(texts, teacher=sides[0], student=sides[1])
    found = compare_spans(aligned, teacher=Speller(sides[0]), student=Speller(sides[1]))
    assert found.both["equal"] == found.both["spans"] == aligned.spans.boundaries.size > 15
    assert found.teacher == {"exact": found.both["spans"]}
    assert not set(found.student) & set(EXCEPTIONS)
    assert not found.examples


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "unigram_words"])
def test_the_token_for_unknown_text_is_known(kind: str) -> None:
    core = tokenizer(kind)
    assert Speller(core).unknown_id == core.convert_tokens_to_ids("<unk>") in tokenize_bare(core, ["a 龍"]).ids


def test_exceptions_of_wordpiece_are_counted_by_class_with_examples() -> None:
    sides = tokenizer("byte_bpe"), tokenizer("wordpiece")
    aligned = align_texts(["The dog 龍 é"], teacher=sides[0], student=sides[1])
    found = compare_spans(aligned, teacher=Speller(sides[0]), student=Speller(sides[1]))
    assert found.student["case"] + found.student["spacing"] >= 2
    assert found.student["unknown_token"] == 1
    assert found.both["spans"] - found.both["equal"] == sum(found.student[kind] for kind in EXCEPTIONS)
    assert found.examples["student: unknown_token"] == [{"text": " 龍", "teacher": " 龍", "student": "<unk>"}]
    assert found.student.total() == found.teacher.total() == found.both["spans"]


def test_bytes_of_no_whole_character_are_readable() -> None:
    assert readable(b" \xec\x95") == " ⟨EC 95⟩"
    assert readable(b"\xa0\xed\x8b\x80x\xff\xfe") == "⟨A0⟩틀x⟨FF FE⟩"
