"""Hostile files of pairs: each row is used as it was meant, or refused in one paragraph, or dropped with a counted reason."""

import os
from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from ctpd.pipeline.sources import file_digest
from ctpd.pipeline.stages.pairs import read_pair_file
from ctpd.text.config import PairsConfig
from ctpd.text.prepare import prepare_pairs
from ctpd.text.render import PlainTemplate, TemplatedTokenizer
from tests.conftest import Cli
from tests.fixtures.hostile import CASES, HEADER, LINE, Case
from tests.fixtures.tokenizers import tokenizer

LONGEST_MESSAGE = 700  # characters of a paragraph
PLAIN = PlainTemplate(user="Question: {content}\n", assistant="Answer:\n{content}\n")


@pytest.mark.tries("hostile files of pairs")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_is_used_as_meant_or_refused_or_dropped_with_a_count(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    if case.refused is not None:
        with pytest.raises(UserError, match=case.refused) as caught:
            read_pair_file(path, encoding=case.encoding)
        assert len(str(caught.value)) - len(str(path)) < LONGEST_MESSAGE
        assert "\n" not in str(caught.value)
        return
    pairs = read_pair_file(path, encoding=case.encoding)
    if case.used is not None:
        found = tuple((pair.prompt[-1].content, pair.chosen, pair.rejected) for pair in pairs)
        assert found == case.used
        return
    sides = {role: TemplatedTokenizer(tokenizer("byte_bpe"), PLAIN, name=role) for role in ("teacher", "student")}
    config = PairsConfig(max_tokens=64, max_prompt_tokens=32, long_prompt="drop", max_dropped=0.5)
    prepared = prepare_pairs({"train": pairs}, config, **sides)
    assert {reason: number for reason, number in prepared.dropped.items() if number} == {case.dropped: 1}
    assert len(prepared.pair_ids) == 1


def test_the_corpus_is_large_and_each_case_has_one_outcome() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert [case.used, case.refused, case.dropped].count(None) == 2, case.name


@pytest.mark.tries("hostile files of pairs")
@pytest.mark.parametrize("kind", ["folder", "device", "missing", "long", "nul"])
def test_what_is_no_data_file_is_said_with_its_path(kind: str, tmp_path: Path) -> None:
    paths = {
        "folder": (tmp_path, "holds no data file"),
        "device": (Path(os.devnull), "is no regular file"),
        "missing": (tmp_path / "no.csv", "does not exist"),
        "long": (tmp_path / ("x" * 300), "cannot be read"),
        "nul": (Path("a\0b"), "cannot be read"),
    }
    path, said = paths[kind]
    with pytest.raises(UserError, match=said):
        file_digest(path)


def test_the_command_line_says_it_in_one_paragraph(cli: Cli, tmp_path: Path) -> None:
    """Latin-1, which was "a fault of ctpd"."""
    (tmp_path / "pairs.csv").write_bytes((HEADER + LINE + "Où?,Là.,Ça.\n").encode("latin-1"))
    code, out, err = cli("inspect", "spans", "a", "b", "--data", tmp_path / "pairs.csv")
    assert (code, out) == (2, "")
    assert "line 3: the file is not UTF-8 text: byte 0xF9" in err
    assert "Write `encoding: cp1252` beside `path`" in err
    assert "iconv -f WINDOWS-1252 -t UTF-8" in err
    assert len(err.splitlines()) == 1
