"""Names of recipes, tables, runs and columns: files stay in their folder, and what is shown is shown literally."""

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ctpd.core.errors import UserError
from ctpd.core.names import LONGEST_NAME
from ctpd.core.printing import one_line, printable, printable_lines
from ctpd.pipeline.progress import Progress
from ctpd.recipe import load_recipe, shipped_recipes
from harness import comparison
from harness.files import file_stem
from harness.formats import FORMATS, write_table
from harness.sheet import Table, TableSpec
from harness.suites import load_suite
from harness.tables import build_tables
from tests.conftest import Cli, SmokeRun
from tests.fixtures.records import record, result
from tests.fixtures.waiting import HANGS

OUTSIDE = ["../../x", "..", ".", "/tmp/x", "a/b", "C:\\x", "~", ".hidden", "CON", "x" * LONGEST_NAME]
REFUSED = {
    "": "is empty|must be a string that is not empty",
    " ": "is empty",
    "a\0b": "has a control character, U\\+0000, as character 2",
    "a\nb": "has a line break",
    "\x1b[31mred": "has a control character, U\\+001B, as character 1",
    "a\x9b2J": "has a control character, U\\+009B",
    "\ud800": "half of a surrogate pair, U\\+D800",
    "a\u202eb": "turns the direction of text",
    "a\ufffe": "no character",
    "x" * (LONGEST_NAME + 1): "has 201 characters, more than 200",
}
PLACES = ("name", "runs", "untrained", "ablations", "label", "tables")
SHOWN = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)")


def smoke_recipe() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(shipped_recipes()["testbed-smoke"].read_text())
    for rate in ("sft", "positive", "negative", "pretrain"):
        for role in ("teacher", "student"):
            data["shared"][role][rate]["learning_rate"] = 0.005  # YAML 1.1 reads `5e-3` as a text
    for run in data["runs"].values():
        run["tuned"]["learning_rate"] = 0.001
    return data


def named(place: str, name: str) -> dict[str, Any]:
    """The smallest recipe with this name in one place."""
    data = smoke_recipe()
    if place == "name":
        data["name"] = name
    elif place == "label":
        data["ablations"]["weights"]["values"][name] = "random"
    else:
        data[place][name] = next(iter(data[place].values()))
    return data


def written(data: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=False, width=10**6), encoding="utf-8")
    return path


@pytest.mark.tries("hostile names")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_cannot_be_shown_is_refused_with_its_line(name: str, place: str, tmp_path: Path) -> None:
    path = written(named(place, name), tmp_path)
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        load_recipe(path)
    assert re.match(rf"{re.escape(str(path))}, line \d+: ", str(caught.value))
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.tries("hostile names")
@pytest.mark.parametrize("name", [*OUTSIDE, "Ω → μ: −1", "日本語", "a\u2028b"], ids=ascii)
@pytest.mark.parametrize("place", PLACES)
def test_any_other_name_is_a_name(name: str, place: str, tmp_path: Path) -> None:
    load_recipe(written(named(place, name), tmp_path))


@pytest.mark.parametrize("key", ["about", "caption", "note"])
def test_a_text_may_have_lines_and_no_other_control_characters(key: str, tmp_path: Path) -> None:
    for text, is_right in (("a\nb\tc", True), ("a\x1bb", False)):
        data = smoke_recipe()
        (data if key == "about" else data["tables"]["main"])[key] = text
        path = written(data, tmp_path)
        if is_right:
            load_recipe(path)
            continue
        with pytest.raises(UserError, match=rf"the text of '.*{key}' has a control character, U\+001B"):
            load_recipe(path)


@pytest.mark.parametrize("key", ["name", "task", "metric"])
def test_names_of_a_suite_are_checked_alike(key: str, tmp_path: Path) -> None:
    column = {"name": "A", "task": "t", "metric": "acc,none", "version": 1.0} | {key: "\x1b,x"}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "columns": [column]}))
    with pytest.raises(UserError, match=rf"columns\[0\]\.{key}' has a control character"):
        load_suite(path)


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
@example(["mu: -1", "mu: 1"])
@example(["a/b", "a b"])
@example(["A", "a"])
@example(["a b", file_stem("a b")])
@example(["x" * 300, "x" * 301])
@example(["\ud800", "\ud801"])
def test_stems_are_short_stay_in_their_folder_and_differ(names: list[str]) -> None:
    stems = [file_stem(name) for name in names]
    assert stems[0] != stems[1]
    assert all(re.fullmatch(r"[a-z0-9_-]{1,100}", stem) for stem in stems)


def test_records_and_tables_of_names_that_differ_in_punctuation_are_all_kept(tmp_path: Path) -> None:
    names = ["mu: -1", "mu: 1", "mu, 1", "../mu", "..\\mu", "/mu 1"]
    records = [record(name, 0, result("A", [1, 0])) for name in names]
    paths = comparison.write_records(records, tmp_path / "records")
    tables = build_tables(records, [TableSpec(name, "C", ((name, name),)) for name in names])
    paths += [path for table in tables for path in write_table(table, tmp_path / "tables")]
    assert len({str(path).lower() for path in paths}) == 5 * len(names)
    assert {path.parent for path in tmp_path.rglob("*.*")} == {tmp_path / "records", tmp_path / "tables"}


def test_names_that_look_like_paths_write_into_the_store_alone(smoke: SmokeRun, cli: Cli, tmp_path: Path) -> None:
    """Of a recipe, a table and a run; the names were parts of paths."""
    inside = tmp_path / "a" / "b" / "store"
    shutil.copytree(smoke.pristine, inside, symlinks=True)
    text = shipped_recipes()["testbed-smoke"].read_text().replace("name: testbed-smoke", "name: ../../outside")
    (tmp_path / "recipe.yaml").write_text(text.replace("  main: {", "  ../../table: {"))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(inside)}
    for command in ("run", "compare"):
        code, _, err = cli(
            command, tmp_path / "recipe.yaml", "--store", inside, *(["--device", "cpu"] * (command == "run"))
        )
        assert code == 0, err
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(inside)} == before
    (made,) = (path for path in inside.rglob("table-*.md"))
    assert made.parent.parent == inside / "tables"
    assert "outside" in made.parent.name


def labelled(*labels: str, caption: str = "C", note: str | None = None) -> Table:
    """A table whose rows have these labels."""
    records = [record(label, None, result("A", [1, 0])) for label in labels]
    spec = TableSpec("t", caption, tuple((label, label) for label in labels), base=labels[0], note=note)
    (table,) = build_tables(records, [spec])
    return table


def test_no_cell_of_a_csv_is_a_formula() -> None:
    lines = list(csv.reader(io.StringIO(FORMATS["csv"](labelled(*SHOWN, "plain")))))
    assert [line[0] for line in lines[1:]] == [*(f"'{label}" for label in SHOWN), "plain"]
    assert all(not cell.startswith(("=", "+", "@")) for line in lines for cell in line)
    assert all(re.fullmatch(r"-[0-9.]+", cell) for line in lines for cell in line if cell.startswith("-"))


def test_markdown_shows_names_literally_on_one_line() -> None:
    labels = ["a|b", "x\ny", "[x](javascript:alert(1))", "~~s~~", "_i_", "snake_case", "&lt;", "<b>", "a\\|b"]
    text = FORMATS["md"](labelled(*labels, caption="two\n\nlines"))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(labels)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {len(re.findall(r"\|", rows[1]))}
    for shown in (
        r"a\|b",
        "x y",
        r"[x\](javascript",
        r"\~\~s\~\~",
        r"\_i\_",
        "snake_case",
        r"\&lt;",
        r"\<b>",
        r"a\\\|b",
    ):
        assert f"| {shown}" in text or f"|{shown}" in text.replace("**", "").replace("| ", "|"), shown
    assert "**two lines**" in text.replace("  ", " ")


def test_latex_has_names_on_one_line_and_no_row_begins_with_an_argument(tmp_path: Path) -> None:
    table = labelled("[1]", "*", "a\n\nb", "\x1b[0m", "100% {$x_1^2$} \\input{/etc/passwd}", caption="two\n\nlines")
    text = FORMATS["tex"](table)
    assert "two lines" in text.replace("  ", " ")
    assert "a  b" in text
    assert "\x1b" not in text
    assert not re.search(r"^\s*[*\[]", text, re.MULTILINE)
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    if shutil.which("pdflatex") is None:
        return
    (tmp_path / "t.tex").write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("kind", FORMATS)
def test_no_escape_sequence_reaches_the_terminal(kind: str) -> None:
    text = FORMATS[kind](labelled("\x1b[31mred", "\x9b2J", "\x07", caption="c\x1bc", note="n\x1bn"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_html_shows_names_literally() -> None:
    text = FORMATS["html"](labelled("<script>alert(1)</script>", '"><img src=x>', caption="<b>", note="`<i>`"))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "<i>" not in text


def test_progress_shows_labels_literally() -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("train: \x1b[31mred\nsecond line", index=1, total=1):
        pass
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


@given(st.text())
def test_text_for_a_terminal_holds_no_control_character(text: str) -> None:
    for shown, kept in (
        (printable(text), ""),
        (printable_lines(text), "\n\t"),
        (printable_lines(one_line(text)), "\t"),
    ):
        assert not [
            c for c in shown if (ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000) and c not in kept
        ]
