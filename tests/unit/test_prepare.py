"""The data step (docs/method.md#data-step): rows, spans, lengths and losses, checked against the tokenizers and plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load, save

from ctpd.core.errors import UserError
from ctpd.text.align import align_spans
from ctpd.text.config import PairsConfig
from ctpd.text.pairs import Dropped, Message, Pair, ReadPairs, parse_pairs
from ctpd.text.prepare import Preparation, PreparedPairs, prepare_pairs
from ctpd.text.prepared_files import read_prepared, write_prepared
from ctpd.text.render import ChatTemplate, PlainTemplate, TemplatedTokenizer
from tests.fixtures.prepared import LONG, PLAIN, check_rows, pair, prepare, row, side
from tests.fixtures.tokenizers import CHATML, KINDS, tokenizer, with_bos, with_template


def test_a_pair_becomes_two_rows_of_prompt_spans_and_end() -> None:
    """Row 2i is the chosen, row 2i + 1 the rejected response; the spans are those of align_spans."""
    prepared = prepare([pair(), pair("it is fine.", "日本 🙂", id="7")])
    assert prepared.pair_ids == ("0", "7")
    assert prepared.split == ("train", "train")
    assert prepared.prompts == ("what is it?",) * 2
    assert prepared.chosen == ("yes, it is", "it is fine.")
    sides = side("byte_bpe"), side("unigram")
    check_rows(prepared, sides, max_tokens=400)
    for r, response in enumerate(["yes, it is", "no", "it is fine.", "日本 🙂"]):
        text = f"Question: what is it?\nAnswer:\n{response}"
        cleaned = []
        for rows, of in ((prepared.teacher, sides[0]), (prepared.student, sides[1])):
            output = of.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, units = row(rows, r)
            assert ids == [*output["input_ids"], of.tokenizer.eos_token_id]
            begin = len(text) - len(response)
            offsets = [(start - begin, end - begin) for start, end in output["offset_mapping"]]
            assert units[: sum(end <= 0 for _, end in offsets)] == [-1] * sum(end <= 0 for _, end in offsets)
            cleaned.append([(max(start, 0), end) for start, end in offsets if end > 0])
        spans = align_spans(*cleaned, len(response))
        for rows, expected in ((prepared.teacher, spans.teacher_span), (prepared.student, spans.student_span)):
            units = [unit for unit in row(rows, r)[1] if unit >= 0]
            assert units == [*expected.tolist(), len(spans.boundaries)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@pytest.mark.parametrize("teacher", KINDS)
@given(
    contents=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4),
    student=st.sampled_from(KINDS),
    max_tokens=st.integers(24, 60),
    cut=st.booleans(),
)
def test_rows_hold_on_any_text_and_length(
    teacher: str, contents: list[tuple[str, str, str]], student: str, max_tokens: int, cut: bool
) -> None:
    """On arbitrary Unicode, lengths and tokenizer kinds: no scored token is lost, no row is too long, counts add up."""
    pairs = [
        pair("x", "it", id="always"),
        *(pair(c.strip(), r.strip(), p, id=str(i)) for i, (p, c, r) in enumerate(contents)),
    ]
    prepared = prepare(
        pairs,
        teacher,
        student,
        max_tokens=max_tokens + 30,
        max_prompt_tokens=max_tokens,
        long_prompt="cut" if cut else "drop",
        max_dropped=1.0,
    )
    check_rows(prepared, (side(teacher), side(student)), max_tokens=max_tokens + 30)
    assert len(prepared.pair_ids) + sum(prepared.dropped.values()) == len(pairs)
    report = prepared.report
    assert (
        sum(report[f"spans_{kind}"] for kind in ("1_1", "1_n", "n_1", "n_m"))
        == report["spans"]
        == len(prepared.boundaries)
    )
    for name, rows in (("teacher", prepared.teacher), ("student", prepared.student)):
        assert (rows.unit >= 0).sum() == report[f"{name}_response_tokens"] + prepared.has_end.sum()


def test_every_reason_to_drop_is_counted() -> None:
    """Empty, equal and special texts; a response for which one side has no token counts as empty."""
    pairs = [
        pair(id="good"),
        pair(chosen=""),
        pair(chosen="same", rejected="same"),
        pair(rejected="no </s>"),
        pair(prompt="what is <|im_end|>?"),
        pair(chosen="\x08"),  # WordPiece removes control characters
    ]
    prepared = prepare(pairs, student="wordpiece", max_dropped=0.9)
    assert prepared.pair_ids == ("good",)
    assert prepared.dropped == {"empty": 2, "equal": 1, "special_token_text": 2, "long_prompt": 0}


def test_responses_that_a_cut_makes_equal_are_dropped() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    pairs = [pair(), pair(text + "yes", text + "no", id="long")]
    prepared = prepare(pairs, max_tokens=40, max_prompt_tokens=39, max_dropped=0.5)
    assert prepared.pair_ids == ("0",)
    assert prepared.dropped["equal"] == 1


def test_a_response_that_cannot_be_cut_to_fit_counts_as_empty() -> None:
    """One span that does not fit leaves no text: here the student has one token where the teacher has hundreds."""
    pairs = [pair("x", "it"), pair("🙂" * 60, "no")]
    prepared = prepare(pairs, student="wordpiece", max_tokens=60, max_prompt_tokens=50, max_dropped=0.5)
    assert prepared.pair_ids == ("0",)
    assert prepared.chosen == ("x",)
    assert prepared.dropped["empty"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_on_both_sides_gives_equal_rows(kind: str) -> None:
    prepared = prepare([pair(), pair("日本 is ½ ok 🙂 e\u0301", "no")], kind, kind)
    assert np.array_equal(prepared.teacher.input_ids, prepared.student.input_ids)
    assert np.array_equal(prepared.teacher.unit, prepared.student.unit)
    assert prepared.report["spans_1_n"] == prepared.report["spans_n_1"] == 0


def test_sides_may_differ_in_template_and_bos() -> None:
    """A chat model teaches a base model: only the response and its end are shared."""
    chat_tokenizer = with_template("gemma_bpe", CHATML)
    teacher = TemplatedTokenizer(chat_tokenizer, ChatTemplate(chat_tokenizer, {}), "teacher")
    student = TemplatedTokenizer(with_bos("byte_bpe"), PLAIN, "student")
    prepared = prepare_pairs({"train": [pair()]}, PairsConfig(**LONG), teacher=teacher, student=student)  # type: ignore[arg-type]
    (teacher_ids, teacher_units), (student_ids, student_units) = (
        row(rows, 0) for rows in (prepared.teacher, prepared.student)
    )
    assert chat_tokenizer.decode(teacher_ids).endswith("assistant\nyes, it is<|im_end|>")
    assert student_ids[0] == student.tokenizer.bos_token_id
    assert student_units[0] == -1
    assert teacher_units[-1] == student_units[-1] == prepared.num_spans[0] - 1


def test_crossing_tokens_are_counted_per_side() -> None:
    crossing = TemplatedTokenizer(
        tokenizer("byte_bpe"), PlainTemplate(user="{content}\n", assistant="Answer: {content}"), "teacher"
    )
    prepared = prepare([pair()], crossing)
    assert prepared.report["teacher_crossing_tokens"] == 2
    assert prepared.report["student_crossing_tokens"] == 0


def test_marks_fall_on_the_spans_that_they_overlap() -> None:
    """+1 for right, -1 for wrong, 0 elsewhere; the first of two marks wins; marks behind a cut vanish."""
    text = "yes it is, no it is not"
    marked = pair(text, "no", chosen_marks=((4, 6, True), (11, 13, False), (12, 13, True)))
    for max_tokens in (400, 26):
        prepared = prepare([marked, pair(id="1")], "byte_bpe", "byte_bpe", max_tokens=max_tokens, max_prompt_tokens=24)
        assert prepared.marks is not None
        assert len(prepared.marks) == len(prepared.boundaries)
        begin = 0
        for end, mark in zip(prepared.boundaries[: prepared.boundary_starts[1]], prepared.marks, strict=False):
            overlaps = [right for start, stop, right in marked.chosen_marks if start < end and begin < stop]
            assert mark == (0 if not overlaps else 1 if overlaps[0] else -1)
            begin = end
    assert prepared.marks[prepared.boundary_starts[1] :].tolist() == [0] * (
        len(prepared.marks) - prepared.boundary_starts[1]
    )
    assert prepare([pair()]).marks is None


def test_limit_and_selection_act_on_each_split() -> None:
    """The first or the shortest valid pairs, in the data's order; pairs that are not examined are not counted as dropped."""
    pairs = [pair("a" * n, "no", id=str(n)) for n in (9, 3, 7, 5)]
    pairs.insert(1, pair("", id="empty"))
    sides = {"teacher": side("byte_bpe"), "student": side("unigram")}

    def ids(**settings: object) -> tuple[str, ...]:
        splits = {"train": pairs, "eval": pairs[:1]}
        return prepare_pairs(splits, PairsConfig(**LONG, max_dropped=0.6, **settings), **sides).pair_ids  # type: ignore[arg-type]

    assert ids() == ("9", "3", "7", "5", "9")
    assert ids(limit=2) == ("9", "3", "9")
    assert ids(limit=2, select="shortest") == ("3", "5", "9")
    assert prepare(pairs, limit=1).dropped["empty"] == 0


def test_more_than_the_allowed_share_of_drops_is_refused() -> None:
    """5 % by default, for each split; the error is one paragraph with the reasons."""
    good = [pair(id=str(i)) for i in range(95)]
    assert len(prepare([*good, *[pair("", id="e")] * 5]).pair_ids) == 95
    with pytest.raises(
        UserError, match=r"split 'train': 6 of 101 rows are dropped \(empty 5, equal 1\), 5.9 %"
    ) as error:
        prepare([*good, *[pair("", id="e")] * 5, pair("no", "no")])
    assert "\n" not in str(error.value)
    # With a selection the share of late drops is that among the selected pairs.
    long = [pair(prompt="what is it? " * 30, id="l")] * 2
    with pytest.raises(UserError, match=r"long_prompt 2.* 10\.0 %"):
        prepare([*long, *good], limit=20)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no usable row is left of 0 .the split is empty"),
        ([pair("")], "no usable row is left of 1 .empty 1"),
        ([pair(prompt="what is it? " * 30)], "no usable row is left of 1 .long_prompt 1"),
    ],
)
def test_no_usable_row_is_refused(pairs: list[Pair], message: str) -> None:
    with pytest.raises(UserError, match=f"split 'train': {message}"):
        prepare(pairs, max_dropped=1.0)


def test_lengths_without_room_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_prompt_tokens: 400` leaves no room for a response"):
        prepare([pair()], max_prompt_tokens=400)
    with pytest.raises(UserError, match="there are no pairs"):
        prepare_pairs({}, PairsConfig(**LONG), teacher=side("unigram"), student=side("unigram"))  # type: ignore[arg-type]


def test_rows_that_a_template_changes_are_counted() -> None:
    own = with_template("byte_bpe", CHATML.replace("message.content", "message.content | replace('yes', 'aye')"))
    prepared = prepare([pair("a", "b"), pair(id="3")], TemplatedTokenizer(own, ChatTemplate(own, {}), "teacher"))
    assert prepared.chosen == ("a", "yes, it is")
    assert {name: n for name, n in prepared.report.items() if "template" in name} == {"teacher_template_response": 1}


def test_a_row_that_a_template_refuses_is_dropped_counted_and_listed() -> None:
    """With the number of its row, and the template's own words; more than `max_dropped` are refused with them."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    own = with_template("byte_bpe", refuses)
    bad = Pair("7", (Message("system", "s"), Message("user", "u")), "a", "b")
    side_ = TemplatedTokenizer(own, ChatTemplate(own, {}), "teacher")
    given = ReadPairs([*[pair(id=str(i)) for i in range(7)], bad, Dropped("8", "roles", "why")], "f.jsonl")
    config = PairsConfig(**{**LONG, "max_dropped": 0.3})  # type: ignore[arg-type]
    prepared = prepare_pairs({"train": given}, config, teacher=side_, student=side("unigram"))
    assert prepared.dropped["template"] == prepared.dropped["roles"] == 1
    assert [loss[:4] for loss in prepared.losses] == [
        ("train", "f.jsonl", "7", "template"),
        ("train", "f.jsonl", "8", "roles"),
    ]
    assert "(no system), but renders it with `system: merge`" in prepared.losses[0].detail
    assert prepared.report["train_dropped"] == 2
    strict = PairsConfig(**LONG)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"2 of 9 rows are dropped \(roles 1, template 1; row 8: why\)"):
        prepare_pairs({"train": given}, strict, teacher=side_, student=side("unigram"))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_texts_that_are_unknown_to_a_tokenizer_are_refused(role: str) -> None:
    """Half of the tokens of at least ten pairs; end tokens are not counted."""
    kinds = {"teacher": "byte_bpe", "student": "byte_bpe", role: "unigram"}
    sides = {name: side(kind, name) for name, kind in kinds.items()}
    config = PairsConfig(**LONG)  # type: ignore[arg-type]
    strange = [pair("ж ж", "щ" + " щ" * i, id=str(i)) for i in range(10)]
    with pytest.raises(UserError, match=rf"split 'train': \d+ of the \d+ tokens of the responses are .*the {role}'s"):
        prepare_pairs({"train": strange}, config, **sides)
    assert len(prepare_pairs({"train": strange[:9]}, config, **sides).pair_ids) == 9
    known = [pair("yes, it is", "no" * (i + 1), id=str(i)) for i in range(10, 20)]
    assert len(prepare_pairs({"train": known}, config, **sides).pair_ids) == 10


def test_rows_whose_question_a_template_loses_are_dropped_for_this() -> None:
    own = with_template("byte_bpe", CHATML.replace("message.content", "message.content[:9]"))
    cutting = TemplatedTokenizer(own, ChatTemplate(own, {}), "teacher")
    given = [pair(prompt="Why?", id="0"), pair(prompt="And what is it?", id="1")]
    prepared = prepare(given, cutting, max_dropped=0.5)
    assert (prepared.pair_ids, prepared.dropped["lost_text"]) == (("0",), 1)
    with pytest.raises(UserError, match=r"\(lost_text 1; row 1: .*without the text of.*\), 50.0 %.*Give a template"):
        prepare(given, cutting)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_blocks_whose_rows_a_template_refuses_all_are_dropped_rows(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows around them stay; where none is left, the template's own words say why, and not the tokenizer's."""
    monkeypatch.setattr("ctpd.text.prepare._BLOCK", 2)
    own = with_template(
        "byte_bpe", "{% if '?' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    sides = {"teacher": side("unigram", "teacher"), "student": side("unigram")}
    sides[role] = TemplatedTokenizer(own, ChatTemplate(own, {}), role)
    bad = [pair(id=str(i)) for i in range(4)]
    config = PairsConfig(**{**LONG, "long_prompt": "cut", "max_dropped": 0.9})  # type: ignore[arg-type]
    kept = [pair(prompt="Why", id="4"), pair(prompt="So", id="5"), pair(prompt="Oh", id="9")]
    given = [*kept[:2], *bad, kept[2]]
    prepared = prepare_pairs({"train": given}, config, **sides)  # type: ignore[arg-type]
    assert (prepared.pair_ids, prepared.dropped["template"]) == (("4", "5", "9"), 4)
    alone = prepare_pairs({"train": kept}, config, **sides)  # type: ignore[arg-type]
    assert prepared.student.input_ids.tolist() == alone.student.input_ids.tolist()
    with pytest.raises(UserError, match=r"no usable row is left of 4 \(template 4; row 0: .*\(no\)\).*Give a template"):
        prepare_pairs({"train": bad}, config, **sides)  # type: ignore[arg-type]


def everything(prepared: PreparedPairs) -> dict[str, Any]:
    """All fields but the dropped pairs, those of the token rows included; arrays with their dtype."""
    found = vars(prepared) | {
        f"{name}.{key}": value
        for name in ("teacher", "student")
        for key, value in vars(getattr(prepared, name)).items()
    }
    return {
        name: (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in found.items()
        if name not in ("teacher", "student", "losses")
    }


@pytest.mark.parametrize("marks", [{}, {"chosen_marks": ((0, 3, True),)}], ids=["no marks", "marks"])
def test_the_files_hold_everything(marks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that are written block by block and read are those in memory, in the format that the library writes."""
    monkeypatch.setattr("ctpd.text.prepare._BLOCK", 2)
    rows = ReadPairs(
        [pair('"ü"\n', **marks), *[pair(id=str(i)) for i in range(1, 5)], Dropped("5", "roles", "why")], "f.jsonl"
    )
    sides = {"teacher": side("byte_bpe"), "student": side("unigram")}
    config = PairsConfig(**{**LONG, "max_dropped": 0.5})  # type: ignore[arg-type]
    preparation = Preparation({"train": rows, "eval": ReadPairs([pair(id="9")])}, config, **sides)
    write_prepared(preparation, tmp_path)
    again = everything(read_prepared(tmp_path))
    assert again == everything(prepare_pairs({"train": rows, "eval": [pair(id="9")]}, config, **sides))
    assert (again["marks"] is not None) == bool(marks)
    names = ("teacher.input_ids", "teacher.unit", "num_spans", "boundaries")
    assert {again[name][0] for name in names} == {"int32"}
    assert [json.loads(line)["row"] for line in (tmp_path / "dropped.jsonl").read_text().splitlines()] == ["5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dropped.jsonl", "pairs.json", "pairs.safetensors"]
    written = (tmp_path / "pairs.safetensors").read_bytes()
    assert save(load(written)) == written


def test_equal_responses_are_kept_where_the_source_says_so() -> None:
    """As where the rejected response is the student's own, and the student answers what was chosen."""
    pairs = [pair(id="0", chosen="yes", rejected="yes"), pair(id="1")]
    assert prepare(pairs, max_dropped=0.5).pair_ids == ("1",)
    kept = prepare(ReadPairs(pairs, keeps_equal=True))
    assert (kept.pair_ids, kept.dropped["equal"]) == (("0", "1"), 0)


def test_the_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are processed in blocks, whose size does not change the result."""
    rows = [{"prompt": f"what is {i}?", "chosen": f"yes {i}" * (1 + i % 3), "rejected": "no 日本"} for i in range(7)]
    pairs = parse_pairs(rows, source="rows")
    whole = prepare(pairs)
    monkeypatch.setattr("ctpd.text.prepare._BLOCK", 2)
    parts = prepare(pairs)
    assert everything(whole) == everything(parts)
