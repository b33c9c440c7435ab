"""Prompts and responses that are too long: dropped or cut, at a word or behind a span."""

import pytest

from ctpd.text.lengths import fit_prompts, word_starts
from ctpd.text.pairs import Message, Pair
from ctpd.text.render import PlainTemplate, TemplatedTokenizer
from tests.fixtures.prepared import check_rows, pair, prepare, row, side
from tests.fixtures.tokenizers import tokenizer

LINES = " ".join(f"the {i} quick 日本 fox, won't it?" for i in range(12)) + " what is it?"


def test_a_long_response_is_cut_at_the_last_common_boundary_where_both_fit() -> None:
    """Against a plain search over the boundaries; a cut response has no end span, and both models see the same text."""
    chosen = "Tom has 3 + 4 = 7 apples, and 12345 pears. The quick brown fox 日本 jumps over the lazy dog."
    whole = prepare([pair(chosen)])
    counts = [(len(row(rows, 0)[0]), row(rows, 0)[1]) for rows in (whole.teacher, whole.student)]
    boundaries = whole.boundaries[: whole.boundary_starts[1]]
    shortest, longest = 25, max(length for length, _ in counts)
    for max_tokens in range(shortest, longest + 2):
        cut = prepare([pair(chosen)], max_tokens=max_tokens, max_prompt_tokens=shortest - 1)
        num_spans = len(boundaries)
        if any(length > max_tokens for length, _ in counts):
            fits = [
                all(units.index(span) + sum(u == span for u in units) <= max_tokens for _, units in counts)
                for span in range(num_spans)
            ]
            num_spans = sum(fits)
            assert fits == sorted(fits, reverse=True)
        assert cut.chosen == (chosen[: boundaries[num_spans - 1]],)
        assert cut.has_end.tolist() == [all(length <= max_tokens for length, _ in counts), True]
        assert cut.report["responses_cut"] == (not cut.has_end[0])
        check_rows(cut, (side("byte_bpe"), side("unigram")), max_tokens=max_tokens)


def test_the_end_token_counts_for_the_length() -> None:
    """A response that fits but for its end token keeps all its text and loses the end span."""
    whole = prepare([pair()])
    longest = max(len(row(rows, 0)[0]) for rows in (whole.teacher, whole.student))
    cut = prepare([pair()], max_tokens=longest - 1, max_prompt_tokens=longest - 2)
    assert cut.chosen == whole.chosen
    assert cut.has_end.tolist() == [False, True]


def test_long_prompts_are_dropped_and_counted() -> None:
    long = pair(prompt="what is it? " * 30, id="long")
    prepared = prepare([pair(), long], max_dropped=0.5)
    assert prepared.pair_ids == ("0",)
    assert prepared.dropped["long_prompt"] == 1


@pytest.mark.parametrize("teacher", ["byte_bpe", "gemma_bpe", "wordpiece"])
@pytest.mark.parametrize(
    ("message", "most"),
    [(LINES, 60), (LINES, 61), (LINES, 62), ("what is " + "abcdefghij" * 20, 60), ("日本" * 90, 70)],
)
def test_a_long_prompt_is_cut_to_the_longest_end_that_fits_and_begins_at_a_word(
    teacher: str, message: str, most: int
) -> None:
    """Against a plain search over all ends, on both sides; if no word fits, the longest end of all that fits."""
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", message))
    settings = {"max_tokens": 130, "max_prompt_tokens": most, "long_prompt": "cut"}
    prepared = prepare([pair(), Pair("long", turns, "yes", "no")], teacher, **settings)

    def fits(start: int) -> bool:
        text = f"Question: a\nAnswer:\nb\nQuestion: {message[start:]}\nAnswer:\n"
        both = (side(kind).tokenizer(text, add_special_tokens=False)["input_ids"] for kind in (teacher, "unigram"))
        return max(map(len, both)) <= most

    words = [i for i in word_starts(message) if fits(i)]
    longest = min(words) if words else min(i for i in range(len(message)) if fits(i))
    assert prepared.report["cut_prompts"] == 1
    assert prepared.prompts[1] == message[longest:]
    rows = [row(of_side, 2)[1].count(-1) for of_side in (prepared.teacher, prepared.student)]
    assert max(rows) <= most


@pytest.mark.parametrize(
    ("message", "most", "kept"),
    [
        ("The quick brown fox jumps over the lazy dog", 4, " lazy dog"),
        ("it is fine won't it", 7, " is fine won't it"),
    ],
)
def test_an_end_that_begins_at_a_word_is_preferred_to_a_longer_one_inside_a_word(
    message: str, most: int, kept: str
) -> None:
    """Token counts of ends are not monotone: `lazy dog` has more tokens than ` lazy dog`, and a bisection alone errs."""
    plain = TemplatedTokenizer(
        tokenizer("byte_bpe"), PlainTemplate(user="{content}\n", assistant="{content}\n"), "both"
    )
    cut = fit_prompts([pair(prompt=message)], sides=(plain, plain), max_prompt_tokens=most, cut=True, where="here")
    assert [one.prompt[-1].content for one in cut.pairs] == [kept]
    assert cut.num_cut == 1


def test_words_begin_after_white_space_and_at_wide_characters() -> None:
    assert word_starts("it is  日本 won't") == [0, 2, 3, 6, 7, 8, 9, 10]
    assert word_starts("  a ") == [1, 2]
    assert word_starts("") == []


def test_a_prompt_that_is_too_long_without_its_message_is_dropped() -> None:
    turns = (Message("user", "a " * 300), Message("assistant", "b"), Message("user", "c"))
    prepared = prepare([pair(), Pair("long", turns, "yes", "no")], long_prompt="cut", max_dropped=0.5)
    assert prepared.pair_ids == ("0",)
    assert prepared.dropped["long_prompt"] == 1
