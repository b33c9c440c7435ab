"""Rows of known data sets in their own form: what is read of them, with and without `columns` and `form`."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpd.core.config import validate
from ctpd.core.errors import UserError
from ctpd.pipeline.peeks import first_rows, reading_of
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Work
from ctpd.pipeline.stages import pairs
from ctpd.pipeline.stages.pairs import FilePairs, HubPairs, read_pair_file
from ctpd.text.config import Columns, Layout
from ctpd.text.layouts import PLAIN, READING, holds_more
from ctpd.text.messages import Message
from ctpd.text.pairs import Dropped, Pair, check_columns, parse_pairs, usable_rows
from ctpd.text.recognise import recognise

SYSTEM, WHY, SO, AND = (
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "So."),
    Message("user", "And?"),
)


def said(*messages: Message) -> list[dict[str, str]]:
    """Messages in ShareGPT's form."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[role], "value": content} for role, content in messages]


def layout(form: Any = None, **columns: str) -> Layout:
    return Layout(columns=Columns(**columns) if columns else None, form=form)


YES, NO = said(Message("assistant", "Yes."), Message("assistant", "No."))
CHAT = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:"
ULTRAFEEDBACK: dict[str, Any] = {
    "prompt": "Why?",
    "prompt_id": "0a",
    "chosen": [{"content": "Why?", "role": "user"}, {"content": "Yes.", "role": "assistant"}],
    "rejected": [{"content": "Why?", "role": "user"}, {"content": "No.", "role": "assistant"}],
    "messages": [{"content": "Why?", "role": "user"}, {"content": "Yes.", "role": "assistant"}],
    "score_chosen": 8.0,
}
# name -> layout that the recipe says, row, prompt that is read
FORMS: Mapping[str, tuple[Layout, dict[str, Any], tuple[Message, ...]]] = {
    "sharegpt": (PLAIN, {"conversations": said(WHY, SO, AND), "chosen": YES, "rejected": NO}, (WHY, SO, AND)),
    "sharegpt, system column": (PLAIN, {"conversations": said(WHY), "system": "Be brief.", "chosen": [YES], "rejected": [NO]}, (SYSTEM, WHY)),
    "sharegpt, responses as texts": (PLAIN, {"conversations": said(SYSTEM, WHY), "chosen": "Yes.", "rejected": "No."}, (SYSTEM, WHY)),
    "sharegpt, whole conversations": (PLAIN, {"chosen": [*said(WHY), YES], "rejected": [*said(WHY), NO]}, (WHY,)),
    "lists in an object": (PLAIN, {"prompt": {"from": np.array(["human"]), "value": ["Why?"]}, "chosen": {"role": ["assistant"], "content": ["Yes."]},
                           "rejected": NO}, (WHY,)),
    "nulls of a parquet schema": (PLAIN, {"prompt": [{"from": "human", "value": "Why?", "role": None, "content": None}], "chosen": YES, "rejected": NO}, (WHY,)),
    "alpaca": (layout(prompt="instruction", input="input"), {"instruction": "Add.", "input": "1, 2", "chosen": "Yes.", "rejected": "No."},
               (Message("user", "Add.\n1, 2"),)),
    "alpaca, no input": (layout(prompt="instruction", input="input"), {"instruction": "Why?", "input": "", "chosen": "Yes.", "rejected": "No."}, (WHY,)),
    "alpaca, output": (layout(prompt="instruction", input="input", responses="output"), {"instruction": "Why?", "input": "", "output": ["Yes.", "No."]}, (WHY,)),
    "alpaca, output in a cell": (layout(prompt="instruction", responses="output"), {"instruction": "Why?", "output": '["Yes.", "No."]'}, (WHY,)),
    "orca_dpo_pairs": (layout(prompt="question"), {"system": "Be brief.", "question": "Why?", "chosen": "Yes.", "rejected": "No."}, (SYSTEM, WHY)),
    "orca_dpo_pairs, no system": (layout(prompt="question"), {"system": "", "question": "Why?", "chosen": "Yes.", "rejected": "No."}, (WHY,)),
    "ultrafeedback_binarized": (PLAIN, ULTRAFEEDBACK, (WHY,)),
    "hh-rlhf": (layout("transcript"), {"chosen": f"{CHAT} Yes.", "rejected": f"{CHAT} No."}, (WHY, SO, AND)),
    "hh-rlhf, prompt apart": (layout("transcript"), {"prompt": CHAT, "chosen": " Yes.", "rejected": " No."}, (WHY, SO, AND)),
    "messages": (layout(prompt="messages"), {"messages": [SYSTEM._asdict(), WHY._asdict()], "chosen": "Yes.", "rejected": [NO][0]["value"]}, (SYSTEM, WHY)),
    "other names": (layout(prompt="q", chosen="a.good", rejected="a bad", system="sys"), {"q": "Why?", "a.good": "Yes.", "a bad": "No.", "sys": "Be brief.", "chosen": "x"},
                    (SYSTEM, WHY)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_known_data_sets_are_read_as_the_pair_that_they_hold(name: str) -> None:
    given, row, prompt = FORMS[name]
    assert parse_pairs([row], source="f", layout=given) == [Pair("0", prompt, "Yes.", "No.")]


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("other names", "lists in an object")])
def test_the_layout_is_recognised_or_needs_no_word(name: str) -> None:
    """What `ctpd init` writes reads the same pair; only `conversations` is named although it need not be."""
    given, row, prompt = FORMS[name]
    found = recognise([row, row], source="f")
    assert parse_pairs([row], source="f", layout=found.layout) == [Pair("0", prompt, "Yes.", "No.")]
    if "conversations" in row:
        given = layout(prompt="conversations")
    if name == "alpaca, output in a cell":
        assert found.layout.columns is not None
    else:
        assert found.layout == given


def test_what_was_recognised_is_said_with_what_is_not_read() -> None:
    rows = [
        {**FORMS["alpaca"][1], "id": 3},
        {"instruction": "a", "input": None, "chosen": None, "rejected": "b", "id": 4},
    ]
    assert recognise(rows, source="f").sentence() == (
        "texts; read: instruction as prompt, input, chosen, rejected; not read: 'id'; 1 of the first 2 rows are no pairs "
        "and will be dropped"
    )
    assert recognise([ULTRAFEEDBACK], source="f").sentence() == (
        "messages; read: prompt, chosen, rejected; not read: 'prompt_id', 'messages', 'score_chosen'"
    )
    assert (
        recognise([FORMS["hh-rlhf"][1]], source="f").sentence().startswith("transcripts, whose turns become messages")
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a"}, "'prompt', 'response_a', 'response_b', 'winner'.*--column prompt=COLUMN"),
        ({"question": "a", "query": "b", "chosen": "c", "rejected": "d"}, "the prompt may be in 'question', 'query'.*`columns: {prompt: COLUMN}`"),
        ({"chosen": "yes", "rejected": "no"}, "the columns are 'chosen', 'rejected'.*the prompt is empty"),
        ({}, "the rows have no columns"),
        ({"prompt": "a", "response_1": "b", "chosen": 0, "rejected": 1}, "'response_1'.*found int 0.*--column chosen=COLUMN"),
        ({"Prompt": "a", "Chosen": "b", "Rejected": "c"}, "differ in case or spaces.*--column prompt=Prompt --column chosen=Chosen"),
        ({"prompt": "a", " chosen": "b", " rejected": "c"}, "--column 'chosen= chosen' --column 'rejected= rejected'`.*`columns: {chosen: \" chosen\","),
        ({"Prompt": "a", "chosen": "So it is.", "rejected": "So not."}, "'Prompt' differs in case or spaces.*`--column prompt=Prompt`"),
    ],
)  # fmt: skip
def test_an_unknown_layout_lists_the_columns_and_shows_what_to_write(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        recognise([row], source="f")
    assert "\n" not in str(caught.value)


TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("given", "row", "message"),
    [
        (layout(prompt="qestion"), {"question": "a", "chosen": "b", "rejected": "c"}, "the column 'qestion', which `columns` names as `prompt`, is missing.*Did you mean 'question'"),
        (layout(system="sys"), TEXT, "none of the first 1 rows has the column 'sys', which `columns` names as `system`"),
        (layout(responses="output", prompt="prompt"), {"prompt": "a", "output": ["b"]}, "column 'output': expected a list of two responses"),
        (layout(responses="output", prompt="prompt"), {"prompt": "a", "output": "b"}, "expected a list of two responses.*found str"),
        (layout(chosen="x"), {**TEXT, "x": 3}, "column 'x': expected a string"),
        (layout(prompt="instruction"), {"instruction": "a", "input": "1", "chosen": "b", "rejected": "c"}, "filled `input` beside its instruction"),
        (layout(prompt="instruction"), {"instruction": "a", "history": [["x", "y"]], "chosen": "b", "rejected": "c"}, "filled `history`"),
        (layout(prompt="p", input="input"), {"p": [WHY._asdict()], "input": "1", "chosen": "b", "rejected": "c"}, "column 'p': expected texts, found list"),
        (layout("transcript"), TEXT, "the text is no transcript"),
        (layout("transcript"), {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "does not end with an assistant's message"),
        (PLAIN, {"question": "Why?", "chosen": "It is so.", "rejected": "It is not."}, "its column 'question' is not read.*`columns: {prompt: question}`"),
        (PLAIN, {"messages": [WHY._asdict()], "chosen": [YES], "rejected": [NO]}, "its column 'messages' is not read"),
        (PLAIN, {**TEXT, "images": ["x.png"]}, "the row has images"),
        (PLAIN, {**TEXT, "prompt": [{"from": "function_call", "value": "f()"}]}, "uses a tool"),
        (PLAIN, {**TEXT, "prompt": [{"from": "humn", "value": "a"}]}, "unknown role 'humn'. Did you mean 'human'"),
        (PLAIN, {**TEXT, "prompt": [{"from": "human", "value": None}]}, "the content is nothing"),
        (PLAIN, {**TEXT, "prompt": {"role": ["user"], "content": []}}, "have not the same length"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_refused_with_column_and_way_out(
    given: Layout, row: dict[str, Any], message: str
) -> None:
    """Also where a silent reading would lose a part of the prompt, or take the answers' common words for it."""
    with pytest.raises(UserError, match=message) as caught:
        list(usable_rows([row], source="f", layout=given))
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_a_text_that_holds_its_prompt_needs_no_column_of_it() -> None:
    row = {"question": "Why?", "chosen": "Why? So.", "rejected": "Why? No."}
    assert parse_pairs([row], source="f") == [Pair("0", (WHY,), "So.", "No.")]
    assert recognise([row], source="f").layout == PLAIN


def test_transcripts_are_refused_until_the_recipe_says_what_they_are() -> None:
    """They were trained as one text, markers of turns included; a few such rows among others stay texts."""
    row = FORMS["hh-rlhf"][1]
    for read in (parse_pairs, lambda rows, source: list(usable_rows(rows, source=source)), check_columns):
        with pytest.raises(UserError, match=r"f: the texts are transcripts.*`form: transcript`.*`form: text`"):
            read([row, row], source="f")  # type: ignore[operator]
        read([row, *[{"chosen": "a b", "rejected": "a c"}] * 2], source="f")  # type: ignore[operator]
    (pair,) = parse_pairs([row], source="f", layout=layout("text"))
    assert pair.prompt == (Message("user", CHAT),)
    renamed = {"good": row["chosen"], "bad": row["rejected"]}
    with pytest.raises(UserError, match="are transcripts"):
        parse_pairs([renamed], source="f", layout=layout(chosen="good", rejected="bad"))


ODD_ROWS = {
    "null_content": {"chosen": None, "rejected": "x"},
    "roles": {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    "malformed": {"chosen": "Hi x", "rejected": "Hi y"},
}


@pytest.mark.parametrize("reason", ODD_ROWS)
def test_one_odd_row_does_not_hide_that_the_others_are_transcripts(reason: str) -> None:
    """It turned off the refusal for the whole file, which was then trained on as one text for each conversation."""
    rows = [FORMS["hh-rlhf"][1], ODD_ROWS[reason], FORMS["hh-rlhf"][1]]
    with pytest.raises(UserError, match="are transcripts"):
        check_columns(rows, source="f")
    assert recognise(rows, source="f").layout.form == "transcript"
    _, lost, _ = usable_rows(rows, source="f", layout=layout("transcript"))
    assert isinstance(lost, Dropped)
    assert lost.reason == reason


def test_transcripts_of_windows_are_read_and_other_spellings_refused() -> None:
    row = FORMS["hh-rlhf"][1]
    windows = {name: text.replace("\n", "\r\n") for name, text in row.items()}
    assert recognise([windows], source="f").layout.form == "transcript"
    (pair,) = parse_pairs([windows], source="f", layout=layout("transcript"))
    assert pair == Pair("0", (WHY, SO, AND), "Yes.", "No.")
    for old, new in (("\n\n", "\n"), ("Human:", "User:"), ("\n\n", "\n\n### "), ("\n\nAssistant:", "\n\nASSISTANT:")):
        other = {name: text.replace(old, new) for name, text in row.items()}
        for look in (check_columns, recognise):
            with pytest.raises(UserError, match=r"are transcripts.*each turn behind an empty line"):
                look([other, TEXT], source="f")
        with pytest.raises(UserError, match="the text is no transcript"):
            check_columns([other], source="f", layout=layout("transcript"))


def test_turns_of_a_transcript_keep_their_line_breaks_and_lose_their_ends() -> None:
    """A name inside a turn, or behind a single line break, begins no turn."""
    text = (
        "\n\nHuman: Who is\nHuman: a name?\n\nOne line.\n\nAssistant:  I said Human: no.\n\nHuman:\n\nAssistant: Yes."
    )
    (pair,) = parse_pairs([{"chosen": text, "rejected": text[:-4] + "No."}], source="f", layout=layout("transcript"))
    assert pair.prompt == (
        Message("user", "Who is\nHuman: a name?\n\nOne line."),
        Message("assistant", "I said Human: no."),
        Message("user", ""),
    )
    assert (pair.chosen, pair.rejected) == ("Yes.", "No.")


def test_transcripts_that_part_before_the_last_answer_are_dropped_and_counted() -> None:
    good = FORMS["hh-rlhf"][1]
    bad = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    first, second = usable_rows([good, bad], source="f", layout=layout("transcript"))
    assert isinstance(first, Pair)
    assert isinstance(second, Dropped)
    assert (second.row, second.reason) == ("1", "different_prompts")


def test_a_column_that_only_some_rows_have_is_read_where_it_is() -> None:
    rows = [TEXT, {**TEXT, "sys": "Be brief."}]
    first, second = parse_pairs(rows, source="f", layout=layout(system="sys"))
    assert (first.prompt[0].role, second.prompt[0]) == ("user", SYSTEM)
    with pytest.raises(
        UserError, match="none of the first 100 rows has the column 'sys'"
    ):  # also where a `limit` stops
        next(usable_rows([TEXT] * 200, source="f", layout=layout(system="sys")))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "names no column"),
        ({"responses": "output", "chosen": "a"}, "give it, or `chosen` and `rejected`"),
        ({"chosen": "a", "rejected": "a"}, "names 'a' twice"),
        ({"promt": "a"}, "Did you mean 'prompt'"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_columns_that_contradict_are_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Columns, columns, source="recipe.yaml")


def test_what_earlier_versions_read_otherwise_is_told_from_the_first_rows() -> None:
    plain = [
        TEXT,
        ULTRAFEEDBACK,
        {"chosen": [WHY._asdict(), SO._asdict()], "rejected": "x"},
        {**TEXT, "system": None, "tools": "[]"},
    ]
    assert not any(holds_more(row) for row in plain)
    new = [
        {**TEXT, "system": "Be brief."},
        {**TEXT, "prompt": said(WHY)},
        {**TEXT, "chosen": YES},
        {**TEXT, "prompt": [{**WHY._asdict(), "reasoning_content": "hm"}]},
        {**TEXT, "images": ["x.png"]},
        {"question": "a", "chosen": "b", "rejected": "c"},
    ]
    assert all(holds_more(row) for row in new)


def test_plain_files_keep_their_keys_and_others_have_the_version_of_their_reading(tmp_path: Path) -> None:
    """An artifact of a version that ignored a column `system` is no hit; what the recipe says of rows is in the key."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TEXT) + "\n")
    assert reading_of(path, PLAIN) is None
    assert FilePairs(str(path), "d").identity == {"sha256": "d"}
    path.write_text(json.dumps({**TEXT, "system": "Be brief."}) + "\n")
    assert reading_of(path, PLAIN) == 2
    assert FilePairs(str(path), "d", reading=2).identity == {"sha256": "d", "reading": 2}
    asked = WHY._asdict()
    for row in (
        {**TEXT, "prompt": None},
        {"prompt": [asked], "chosen": [SYSTEM._asdict(), asked, YES], "rejected": "x"},
    ):
        path.write_text(json.dumps(TEXT) + "\n" + json.dumps(row) + "\n")
        assert reading_of(path, PLAIN) == READING
    assert FilePairs("p", "d", layout=layout("transcript", prompt="q")).identity == {
        "sha256": "d",
        "layout": {"columns": {"prompt": "q"}, "form": "transcript"},
    }
    assert "layout" not in HubPairs("org/name", None, "train", "0" * 40).identity
    assert HubPairs("org/name", None, "train", "0" * 40, layout(prompt="q")).identity["layout"]["columns"] == {
        "prompt": "q"
    }


def test_a_plan_refuses_columns_that_no_first_row_has(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(UserError, match="its column 'question' is not read"):
        reading_of(path, PLAIN)
    assert reading_of(path, layout(prompt="question")) == 2
    path.write_text(json.dumps({**TEXT, "chosen": None}) + "\n")  # such rows are dropped and counted when they are read
    assert reading_of(path, PLAIN) is None
    assert first_rows(path)[0]["chosen"] is None


def test_the_split_of_a_hub_data_set_is_read_in_its_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def rows(name: str, **given: Any) -> Iterator[dict[str, Any]]:
        asked.update(given, name=name)
        return iter([FORMS["orca_dpo_pairs"][1], {"question": "a", "chosen": None, "rejected": "b"}])

    monkeypatch.setattr(pairs, "read_hub", rows)
    work = Work(tmp_path, Runtime(device="cpu"), lambda done, total: None)
    found = HubPairs("Intel/orca_dpo_pairs", None, "train", "0" * 40, layout(prompt="question")).read(work)
    pair, loss = found.rows
    assert pair == Pair("0", (SYSTEM, WHY), "Yes.", "No.")
    assert isinstance(loss, Dropped)
    assert loss.reason == "null_content"
    lost = FORMS["orca_dpo_pairs"][1] | {"history": [["Hi", "Yo"]]}
    monkeypatch.setattr(pairs, "read_hub", lambda name, **given: iter([lost]))
    source = HubPairs("Intel/orca_dpo_pairs", None, "train", "0" * 40, layout(prompt="question"))
    with pytest.raises(UserError, match="the column 'history' is filled in row 0"):
        source.read(work)
    ignoring = replace(source, ignored=("history",))
    assert len(list(ignoring.read(work).rows)) == 1
    assert ignoring.identity == source.identity
    assert asked == {"name": "Intel/orca_dpo_pairs", "config": None, "split": "train", "revision": "0" * 40}


@pytest.mark.parametrize("name", ["sharegpt", "sharegpt, whole conversations", "ultrafeedback_binarized"])
def test_messages_in_cells_of_a_csv_file_are_read(name: str, tmp_path: Path) -> None:
    _, row, prompt = FORMS[name]
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow(value if isinstance(value, str) else json.dumps(value) for value in row.values())
    assert read_pair_file(path) == [Pair("0", prompt, "Yes.", "No.")]
    path.write_text(path.read_text().replace("'", "").replace('""', "'"))
    with pytest.raises(UserError, match="messages in Python's notation"):
        read_pair_file(path)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("system_prompt", "Be kind.", "`columns: {system: system_prompt}`"),
        ("history", [["Hi", "Yo"]], "Write the turns as messages"),
        ("input", "1, 2", "`columns: {input: input}`"),
        ("instruction", "Answer in French.", "`columns: {prompt: instruction}`"),
        ("question", "Why?", "`columns: {prompt: question}`"),
        ("reasoning_content", "hm", "<think>"),
        ("thinking", "hm", "<think>"),
        ("chosen_reasoning", "hm", "<think>"),
    ],
)
def test_a_column_of_the_conversation_that_is_not_read_is_refused_by_the_plan(
    name: str, value: object, fix: str, tmp_path: Path
) -> None:
    """It was lost without a word in every row; the recipe names it, or says that it is left out."""
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "Ask", "chosen": "Yes.", "rejected": "No."}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, name: value}) + "\n")
    with pytest.raises(UserError, match=f"column '{name}' is filled in row 1 and is not read") as caught:
        reading_of(path, PLAIN)
    assert fix in str(caught.value.fix)
    assert f"`ignore: [{name}]`" in str(caught.value.fix)
    assert reading_of(path, PLAIN, ignored=[name]) is None
    for harmless in ("", None, [], "Ask"):  # the last stands in the prompt
        path.write_text(json.dumps({**row, name: harmless}) + "\n")
        assert reading_of(path, PLAIN) is None
    if name == "system_prompt":
        path.write_text(json.dumps({**row, name: value}) + "\n")
        reading_of(path, layout(system=name))
