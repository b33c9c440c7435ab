"""Every form of pairs that is accepted, and one paragraph for each that is not."""

import numpy as np
import pytest

from ctpd.core.errors import UserError
from ctpd.text.pairs import Dropped, Message, Pair, parse_pairs, usable_rows

USER, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in [("user", "Why?"), ("assistant", "So."), ("assistant", "No.")]
)
PROMPT = (Message("user", "Why?"),)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "So.", "rejected": "No."},
        {"prompt": "Why?", "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": "Why? So.", "rejected": "Why? No."},
        {"prompt": "Why?", "chosen": " So.\n", "rejected": "\tNo. "},
        {"prompt": np.array([USER]), "chosen": np.array([ANSWER]), "rejected": np.array([OTHER]), "score": 1.0},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "tools": None, "chat_template_kwargs": {}},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "tools": "[]"},
        {"prompt": [USER], "chosen": [{**ANSWER, "tool_calls": None}], "rejected": [OTHER]},
    ],
    ids=range(14),
)
def test_every_form_is_read_as_the_same_pair(row: dict) -> None:
    """Strings and messages, explicit and implicit prompts are one pair; responses are stripped once."""
    assert parse_pairs([row], source="f") == [Pair("0", PROMPT, "So.", "No.")]


def test_the_last_assistant_message_is_the_response() -> None:
    """Earlier turns, those in chosen and rejected too, belong to the prompt (docs/method.md#preference-pairs)."""
    system = {"role": "system", "content": "Be brief."}
    turns = [USER, ANSWER, {"role": "user", "content": "And?"}]
    row = {"prompt": [system], "chosen": [*turns, ANSWER], "rejected": [*turns, OTHER]}
    (pair,) = parse_pairs([row], source="f")
    assert [message.content for message in pair.prompt] == ["Be brief.", "Why?", "So.", "And?"]
    assert (pair.chosen, pair.rejected) == ("So.", "No.")


SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN = {"role": "user", "content": "And?"}


@pytest.mark.parametrize(
    ("prompt", "before", "read"),
    [
        ([USER], [SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),
        ([{**USER, "content": "Why? "}], [USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([USER], [ANSWER, AGAIN], [USER, ANSWER, AGAIN]),
        ([USER, ANSWER], [AGAIN], [USER, ANSWER, AGAIN]),
        ([SYSTEM, USER], [{**SYSTEM, "content": "Be long."}, USER], None),
        ([AGAIN], [USER], None),
        ([USER, ANSWER, AGAIN], [USER], None),
        ([USER, ANSWER], [USER, OTHER, AGAIN], None),
        ([USER, ANSWER], [SYSTEM, AGAIN], None),
    ],
    ids=range(12),
)
def test_messages_that_stand_in_the_prompt_and_in_the_conversation_are_read_once(
    prompt: list, before: list, read: list | None
) -> None:
    """A prompt that was not the exact beginning of the conversation was doubled: user, system, user."""
    row = {"prompt": prompt, "chosen": [*before, ANSWER], "rejected": [*before, OTHER]}
    found, _ = usable_rows([row, GOOD], source="f")
    if read is None:
        assert isinstance(found, Dropped)
        assert found.reason == "different_prompts"
    else:
        assert isinstance(found, Pair)
        assert found.prompt == tuple(Message(**message) for message in read)


def test_ids_are_row_numbers_and_empty_responses_are_left_to_be_counted() -> None:
    rows = [{"prompt": "a", "chosen": " ", "rejected": "x"}, {"prompt": "a", "chosen": "x", "rejected": "x"}]
    assert [(pair.id, pair.chosen) for pair in parse_pairs(rows, source="f")] == [("0", ""), ("1", "x")]


def test_marks_follow_the_stripped_response() -> None:
    row = {"prompt": "a", "chosen": "  yes no ", "rejected": "no"}
    row |= {"chosen_marks": [[2, 5, True], [6, 9, False], [0, 2, True]], "rejected_marks": np.array([])}
    (pair,) = parse_pairs([row], source="f")
    assert pair.chosen_marks == ((0, 3, True), (4, 6, False))
    assert [pair.chosen[start:end] for start, end, _ in pair.chosen_marks] == ["yes", "no"]


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
TWO_TURNS = [USER, ANSWER, USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "the column 'rejected' is missing"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "column 'chosen' is missing.*Did you mean 'choosen'"),
        ({}, "the row has no columns"),
        ("abc", "the row is str"),
        (GOOD | {"chosen": 3}, "column 'chosen': expected a string or a list of messages, found int 3"),
        (GOOD | {"chosen": None}, "column 'chosen': expected .* found nothing"),
        (GOOD | {"chosen": float("nan")}, "column 'chosen': expected .* found nothing"),
        (GOOD | {"chosen": b"x"}, "column 'chosen': expected a string"),
        (GOOD | {"prompt": 1.5}, "column 'prompt': expected a string"),
        (GOOD | {"prompt": " \n"}, "the prompt is empty"),
        (GOOD | {"chosen": [ANSWER]}, "one of chosen and rejected is a string"),
        (GOOD | {"tools": [{"name": "f"}]}, "column 'tools': the row has tools"),
        (GOOD | {"tools": '[{"name": "f"}]'}, "the row has tools"),
        (GOOD | {"chat_template_kwargs": {"x": 1}}, "the row has chat_template_kwargs"),
        (GOOD | {"prompt": [{"role": "tool", "content": "3"}]}, "message 0: the message uses a tool"),
        (GOOD | {"prompt": [USER, {**ANSWER, "tool_calls": [1]}]}, "message 1: the message uses a tool"),
        (GOOD | {"prompt": [{"role": "usr", "content": "3"}]}, "unknown role 'usr'. Did you mean 'user'"),
        (GOOD | {"prompt": [{"content": "3"}]}, "unknown role None"),
        (GOOD | {"prompt": ["hello"]}, "expected an object with role and content"),
        (GOOD | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "the content is list"),
        (GOOD | {"prompt": [USER, ANSWER]}, "the message before the response is the assistant's"),
        (GOOD | {"prompt": [], "chosen": [ANSWER], "rejected": [OTHER]}, "share no prompt"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "share no prompt"),
        ({"chosen": "yes", "rejected": "no"}, "column 'prompt': the prompt is null"),
        ({"chosen": [USER], "rejected": [USER]}, "column 'chosen': .* does not end with an assistant's message"),
        ({"chosen": [*TWO_TURNS, ANSWER], "rejected": [USER, OTHER, USER, OTHER]}, "differ before their last message"),
        (GOOD | {"chosen": "half \ud83d"}, "column 'chosen': character 5 of the text is half of a surrogate pair"),
        (GOOD | {"prompt": [USER, {**ANSWER, "reasoning_content": "hm"}, USER]}, "message 1: .*`reasoning_content`"),
        (GOOD | {"prompt": [{**USER, "thinking": "hm"}]}, "the message has `thinking`"),
        (GOOD | {"prompt": [{"role": "system", "content": "a"}, USER], "system": "b"}, "column 'system': .* another"),
        (GOOD | {"system": 3}, "column 'system': expected a string"),
        (GOOD | {"chosen_marks": [[0, 2, True]]}, "column 'chosen_marks': .* is no mark"),
        (GOOD | {"chosen_marks": [[0, 1, 1]]}, "is no mark"),
        (GOOD | {"chosen_marks": ["0-1"]}, "is no mark"),
        (GOOD | {"chosen_marks": "x"}, "expected a list of marks"),
    ],
)
def test_bad_rows_are_refused_in_one_paragraph(row: object, message: str) -> None:
    """Errors name source, row and column and stand on one line."""
    with pytest.raises(UserError, match=message) as error:
        parse_pairs([GOOD, row], source="data.jsonl")  # type: ignore[list-item]
    assert str(error.value).startswith("data.jsonl, row 1")
    assert "\n" not in str(error.value)
    assert error.value.fix


def test_a_system_column_is_the_prompts_system_message() -> None:
    for row in ({"prompt": "Why?"}, {"prompt": [USER]}, {"prompt": [{"role": "system", "content": "Be brief."}, USER]}):
        (pair,) = parse_pairs([{**row, "chosen": [ANSWER], "rejected": [OTHER], "system": "Be brief."}], source="f")
        assert pair.prompt == (Message("system", "Be brief."), *PROMPT)
    (pair,) = parse_pairs([{**GOOD, "system": ""}, {**GOOD, "system": None}][:1], source="f")
    assert pair.prompt == (Message("user", "a"),)


def test_one_bad_row_is_dropped_with_reason_number_and_what_is_wrong() -> None:
    bad = {
        "null_content": {"prompt": [USER], "chosen": [{**ANSWER, "content": None}], "rejected": [OTHER]},
        "roles": {**GOOD, "prompt": [USER, ANSWER]},
        "different_prompts": {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "How?"}, OTHER]},
        "unread_field": {"prompt": [USER], "chosen": [{**ANSWER, "reasoning_content": "hm"}], "rejected": [OTHER]},
        "malformed": {**GOOD, "prompt": ["hello"]},
    }
    rows = [{**GOOD, "tools": '[{"name": "f"}]'}, *bad.values(), GOOD]
    *dropped, last = usable_rows(rows, source="f.jsonl")
    assert isinstance(last, Pair)
    assert last.id == "6"
    assert all(isinstance(row, Dropped) for row in dropped)
    assert [(loss.row, loss.reason) for loss in dropped] == [
        (str(i), reason) for i, reason in enumerate(["unread_field", *bad])
    ]
    assert dropped[1].detail == "column 'chosen', message 0: the content is nothing (null), not a string"


def test_what_two_answers_begin_with_is_no_prompt_where_the_data_have_prompts() -> None:
    """A null or missing prompt of texts was replaced by the answers' common beginning, `Sure`."""
    texts = {"chosen": "Sure thing", "rejected": "Sure no"}
    nan = {**texts, "prompt": float("nan")}
    for rows in ([{**texts, "prompt": None}, GOOD], [GOOD, texts], [texts, GOOD], [GOOD, nan]):
        (lost,) = [row for row in usable_rows(rows, source="f") if isinstance(row, Dropped)]
        assert lost.reason == "null_content"
        assert lost.detail.startswith("column 'prompt': the prompt is null")
    with pytest.raises(UserError, match=r"the prompt is null.*remove the column"):
        list(usable_rows([{**texts, "prompt": None}], source="f"))
    (pair,) = parse_pairs([texts], source="f")
    assert pair.prompt == (Message("user", "Sure"),)


def test_a_source_without_a_pair_is_refused_with_its_first_row() -> None:
    with pytest.raises(UserError, match="the row has no columns") as error:
        list(usable_rows([{}, {}], source="f"))
    assert error.value.where == "f, row 0"
    assert list(usable_rows([], source="f")) == []
