"""`ctpd inspect` end to end: spans, tokenizers and weights, and errors of bad input."""

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from rich.cells import cell_len

from ctpd.cli import draw
from ctpd.core.store import Store
from ctpd.recipe import load_recipe
from tests.conftest import Cli, SmokeRun
from tests.fixtures.tokenizers import tokenizer

TEXT = "The quick fox: 12345 pears!\n\nIt is 🙂 <b>fine</b>."
TYPES = ("1:1", "1:n", "n:1", "n:m")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a byte-level BPE and of a Unigram tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("byte_bpe", "unigram"):
        tokenizer(kind).save_pretrained(str(folder / kind))
    return folder / "byte_bpe", folder / "unigram"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Which?", "chosen": TEXT, "rejected": "no"}, {"prompt": "Who?", "chosen": "Tom", "rejected": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_spans_prints_tokens_types_and_fidelity(cli: Cli, sides: tuple[Path, Path]) -> None:
    text = TEXT.replace("🙂", "fox")  # whose bytes may be separate tokens
    outcome = cli("inspect", "spans", *sides, "--text", text)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    teacher, student = ("".join(line[2:] for line in lines if line.startswith(f"{side} ")) for side in "TS")
    assert re.sub(r"[ |]", "", teacher) == text.replace(" ", "·").replace("\n", "⏎")
    assert "quick" in re.sub(r"[ |]", "", student)
    for part in ("Span types", "one teacher token, several student tokens", "characters in a span", "100.00 %"):
        assert part in outcome.out


def test_spans_of_pairs_as_json_add_up(cli: Cli, sides: tuple[Path, Path], pairs: Path) -> None:
    found = json.loads(cli("inspect", "spans", *sides, "--data", pairs, "--show", 1, "--json").out)
    assert found["counts"]["texts"] == 3
    assert found["counts"]["skipped"] == 1
    assert sum(found["types"][name] for name in TYPES) == found["counts"]["spans"] == found["both"]["spans"]
    assert sum(found["percent"].values()) == pytest.approx(100, abs=0.001)
    assert [("".join(span["text"] for span in text)) for text in found["drawn"]] == [TEXT]
    first = json.loads(cli("inspect", "spans", *sides, "--data", pairs, "--limit", 1, "--json").out)
    assert first["counts"]["texts"] == 2


def test_spans_as_a_page_is_one_safe_file_for_light_and_dark(
    cli: Cli, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    page = tmp_path / "spans.html"
    outcome = cli("inspect", "spans", *sides, "--text", TEXT, "--html", page)
    assert f"Written to {page}" in outcome.out
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|<script|<link|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert "<b>fine" not in html.replace("<b>fine</b></span>", "")  # the text's own tags are escaped
    tokens = re.findall(r"<b>(.*?)</b>", html)
    assert any("&lt;" in token for token in tokens)
    assert (
        html.count('class="span ')
        == json.loads(cli("inspect", "spans", *sides, "--text", TEXT, "--json").out)["counts"]["spans"]
    )


def test_each_span_type_has_a_colour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = {
        name: draw.spans([{"type": name, "text": "ab", "teacher": ["ab"], "student": ["a", "b"]}], title="")
        for name in TYPES
    }
    assert len({re.sub("[^\x1b\\[0-9m]", "", text) for text in drawn.values()}) == 4


def test_wide_characters_keep_both_lines_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    span = {"type": "1:1", "text": "日本", "teacher": ["日本"], "student": ["日", "本"]}
    lines = draw.spans([span] * 20, title="text").splitlines()
    assert all(cell_len(click.unstyle(line)) <= 40 for line in lines)
    assert len(lines) > 4


def test_tokenizers_prints_a_table_with_the_same_numbers_as_json(
    cli: Cli, sides: tuple[Path, Path], pairs: Path
) -> None:
    files = [side / "tokenizer.json" for side in sides]
    text = cli("inspect", "tokenizers", *files, "--data", pairs).out
    found = json.loads(cli("inspect", "tokenizers", *files, "--data", pairs, "--json").out)
    for name in TYPES:
        assert f"| {name} | {found['types'][name]:,} | {found['percent'][name]:.2f} % |" in text
    assert "| model | BPE | Unigram |" in text
    assert found["vocabularies"]["teacher"]["tokens"] == len(tokenizer("byte_bpe"))
    assert 0 < found["vocabularies"]["student"]["shared"] < 1
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def weights_of(cli: Cli, *args: object) -> dict[str, Any]:
    outcome = cli("inspect", "weights", *args, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_responses_are_read_in_the_form_that_the_data_have(cli: Cli, sides: tuple[Path, Path], tmp_path: Path) -> None:
    """As `ctpd init` recognises it."""
    rows = {
        "plain": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        "orca": {"question": "Why?", "chosen": "Because.", "rejected": "No."},
        "hh": {side: f"\n\nHuman: Why?\n\nAssistant: {text}" for side, text in (("chosen", "Because."), ("rejected", "No."))},
    }  # fmt: skip
    counts = []
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        found = cli("inspect", "spans", *sides, "--data", tmp_path / f"{name}.jsonl", "--json")
        assert found.code == 0, found.err
        counts.append(json.loads(found.out)["counts"])
    assert counts[0] == counts[1] == counts[2]
    missing = cli("inspect", "template", sides[0], "--data", tmp_path / "no.jsonl")
    assert missing.code == 2
    assert "does not exist" in missing.err


def test_weights_of_a_recipe_agree_with_the_record(cli: Cli, smoke: SmokeRun) -> None:
    found = weights_of(cli, "testbed-smoke", "--store", smoke.store)
    assert {name for names in found for name in names.split(", ")} > set(load_recipe("testbed-smoke").runs) - {"DPO"}
    ctpd = next(one for names, one in found.items() if names.startswith("CTPD"))
    for bound in ("clamped_low", "clamped_high"):
        for parts in (ctpd["positions"], list(ctpd["types"].values())):
            units = [part["units"] for part in parts]
            assert sum(units) == ctpd["units"]
            share = sum(n * part[bound] for n, part in zip(units, parts, strict=True) if n) / ctpd["units"]
            assert share == pytest.approx(ctpd[bound])
    assert ctpd["clamped_low"] > 0
    for side in ctpd["sides"].values():
        assert sum(side["histogram"]["counts"]) == side["units"]
        assert side["quantiles"]["0"] >= 0.22  # exp(-1.5)
    student = found["TIS-DPO, seed 0"]
    assert student["settings"]["granularity"] == "tokens"
    assert "types" not in student
    random = next(one for names, one in found.items() if names.startswith("weights: Random"))
    assert random["positions"][0]["clamped_low"] is None


def test_weights_of_a_key_are_those_of_the_recipe(cli: Cli, smoke: SmokeRun) -> None:
    found = weights_of(cli, "testbed-smoke", "--store", smoke.store, "--only", "CTPD")
    (ctpd,) = found.values()
    assert list(weights_of(cli, ctpd["key"][:12], "--store", smoke.store).values()) == [ctpd]
    text = cli("inspect", "weights", ctpd["key"], "--store", smoke.store).out
    for part in ("clamped to [-0.5, 1.5]", "tenth of the response", "span type", "AUROC"):
        assert part in text


def test_bad_input_is_refused_in_one_paragraph(
    cli: Cli, sides: tuple[Path, Path], tmp_path: Path, pairs: Path, smoke: SmokeRun
) -> None:
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    (tmp_path / "none.jsonl").write_text("")
    model = next(a.key for a in Store(smoke.store).artifacts() if a.stage == "train")
    both = (*sides, "--data")
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("spans", *sides), ("--data or --text",)),
        (("spans", *both, pairs, "--text", "a"), ("--data or --text",)),
        (("spans", *both, "nowhere.jsonl"), ("nowhere.jsonl", "does not exist", "Correct the path")),
        (("tokenizers", *both, tmp_path / "rows.jsonl"), ("row 0", "'rejected'")),
        (("tokenizers", *both, tmp_path / "none.jsonl"), ("no text has tokens",)),
        (("tokenizers", tmp_path / "broken.json", sides[1], "--text", "a"), ("broken.json", "no tokenizer.json")),
        (("spans", tmp_path, sides[1], "--text", "a"), (str(tmp_path), "no tokenizer could be loaded")),
        (("spans", "nobody/nothing@abc", sides[1], "--text", "a"), ("nobody/nothing@abc", "no tokenizer could be loaded")),
        (("spans", *sides, "--text", "a", "--html", tmp_path / "no" / "x.html"), ("x.html", "cannot be written")),
        (("weights", "abcdef", "--store", smoke.store), ("'abcdef'", "ctpd store du")),
        (("weights", f"train/{model}", "--store", smoke.store), ("train", "no importance weights")),
        (("weights", "testbed-smoke", "--store", tmp_path / "empty"), ("testbed-smoke", "ctpd train testbed-smoke")),
        (("weights", "testbed-smoke", "--store", smoke.store, "--only", "DPO"), ("none of its runs",)),
    ]  # fmt: skip
    for args, parts in cases:
        outcome = cli("inspect", *args)
        assert outcome.code == 2, (args, outcome.err)
        assert outcome.out == ""
        message = outcome.err[outcome.err.index("Error: ") :]
        assert message.count("\n") == 1
        for part in parts:
            assert part in message, (args, message)


def test_weights_without_their_pairs_say_what_is_missing(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "store"
    shutil.copytree(smoke.store / "weights", store / "weights")
    key = next(a.key for a in Store(store).artifacts())
    outcome = cli("inspect", "weights", key, "--store", store)
    assert outcome.code == 2
    assert "pairs that the weights were made from are not in the store" in outcome.err
