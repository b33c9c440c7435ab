"""Cells that hold messages as JSON text, and texts that only look like them."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctpd.core.errors import UserError
from ctpd.pipeline.peeks import reading_of, recognised
from ctpd.pipeline.stages.pairs import read_pair_file
from ctpd.text.config import Layout
from ctpd.text.layouts import PLAIN, READING
from ctpd.text.messages import Message
from ctpd.text.pairs import Dropped, Pair, check_columns, parse_pairs, usable_rows
from ctpd.text.recognise import recognise

WHY = Message("user", "Why?")
YES, NO = ({"from": "gpt", "value": text} for text in ("Yes.", "No."))
TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_messages_as_json_text_are_read_in_every_format(ending: str, tmp_path: Path) -> None:
    """Only those of CSV files were; the others were trained on as texts, brackets and keys included."""
    line = Message("user", "One\nline")
    cells = [json.dumps(value).replace("\\n", "\n") for value in ([line._asdict()], [YES], NO)]
    row = dict(zip(("prompt", "chosen", "rejected"), cells, strict=True))
    path = tmp_path / f"pairs.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([row, row.values()])
    assert read_pair_file(path) == [Pair("0", (line,), "Yes.", "No.")]
    assert reading_of(path, PLAIN) == READING
    assert recognised(path).form == "messages"
    (text,) = read_pair_file(path, layout=Layout(form="text"))
    assert text.chosen == cells[1]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('[{"role": "user", "content": "cut', "begins like messages and is no valid JSON"),
        ('[{"content": "cut', "begins like messages"),
        ('{"from": "human", "value": "cut', "begins like messages"),
        ('[{"role": "user", "content": "' + "x" * 32_737, "are as many as a spreadsheet keeps"),
        (repr([YES]), "Python's notation"),
        (repr([WHY._asdict()]), "Python's notation"),
        ("[{'name': None, 'role': 'user', 'content': 'Q'}]", "Python's notation"),
        ("({'role': 'assistant', 'content': 'Q'},)", "Python's notation"),
        ('[{"text": "a", "role": "assistant"}]', "as `text`.*Rename the key"),
    ],
    ids=range(9),
)
def test_what_begins_like_messages_and_is_none_is_dropped_or_refused_by_the_plan(cell: str, message: str) -> None:
    bad = {**TEXT, "prompt": cell}
    _, lost = usable_rows([TEXT, bad], source="f")
    assert isinstance(lost, Dropped)
    assert lost.reason == "malformed"
    check_columns([TEXT, bad], source="f")
    with pytest.raises(UserError, match=message):
        check_columns([bad, {**TEXT, "chosen": None}], source="f")
    with pytest.raises(UserError, match=message) as caught:
        recognise([bad], source="f")
    assert "--column" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "Bob", "age": 3}, {"na',
        '{"model": "m", "messages": [{"role": "user", "content": "Hi"}]',
        '[{"role": "user", "content": "Hi"}]\n\nis a list of messages.',
        '[{"role": "admin", "scope": "all"}]',
        "{'a': 1}",
    ],
)
def test_other_texts_with_brackets_stay_texts(text: str) -> None:
    (pair,) = parse_pairs([{**TEXT, "chosen": text}], source="f")
    assert pair.chosen == text


def test_an_answer_that_is_json_stays_a_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    answers = ['{"from": "Paris", "value": "3"}', '{"role": "admin", "content": "x"}']
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), ("Why?", *answers)])
    assert read_pair_file(path) == [Pair("0", (WHY,), *answers)]
