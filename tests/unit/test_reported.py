"""`ctpd compare --published`: rows of others are checked, marked, and neither ranked nor compared."""

from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from harness import comparison
from harness.formats import FORMATS, view
from harness.published import read_reported
from harness.sheet import TableSpec
from harness.tables import build_tables
from tests.conftest import Cli, SmokeRun
from tests.fixtures.records import record, result

COLUMNS = ("Facts", "Words", "Average")


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "theirs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_scores_are_read_by_column_and_nothing_is_computed(tmp_path: Path) -> None:
    path = written(tmp_path, '\ufeffrow,Words,Facts\r\nPaper\'s CTPD,48.31,\r\n\r\n"A, B", 7 ,0.5\r\n')
    first, second = read_reported(path, COLUMNS)
    assert first == ("Paper's CTPD", (None, 48.31, None))
    assert second == ("A, B", (0.5, 7.0, None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "theirs.csv: the file has no rows. Begin with the line `row,Facts,Words,Average`"),
        ("row,Facts\n", "the file has no rows"),
        ("name,Facts\na,1\n", "line 1: the first column is 'name', not `row`"),
        ("row,Fact\na,1\n", "line 1, column 2: the table has no column 'Fact'. Did you mean 'Facts'?"),
        ("row,Facts,Facts\na,1,2\n", "line 1, column 3: the column 'Facts' is given twice"),
        ("row,Facts\na,1\n\na,2\n", "line 4: the row 'a' is given twice"),
        ("row,Facts\na,48,31\n", "line 2: the line has 3 cells, and the header has 2"),
        ("row,Facts,Words\na,1,x\n", "line 2, column 3 ('Words'): 'x' is no score between 0 and 100"),
        ("row,Facts\na,101\n", "line 2, column 2 ('Facts'): '101' is no score"),
        ("row,Facts\na,nan\n", "'nan' is no score"),
        ("row,Facts\n,1\n", "line 2, column 1: the name of the row is empty"),
        ("row,Facts\na\x1b[2J,1\n", "line 2, column 1: the name of the row has a control character"),
        ("row,Facts\nÉ,1\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_column(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_reported(written(tmp_path, text), COLUMNS)
    assert said in str(caught.value)
    assert str(tmp_path / "theirs.csv") in str(caught.value)


def test_rows_of_others_are_marked_and_change_nothing_of_ours(tmp_path: Path) -> None:
    records = [record(run, 0, result("Facts", scores), kind="trained") for run, scores in RUNS.items()]
    specs = [TableSpec(name, "Caption", (("A", "A"), ("B", "B")), base="A") for name in ("main", "second")]
    made = build_tables(records, specs)
    with_theirs = comparison.with_reported(made, written(tmp_path, "row,Facts\n<Theirs>,99.9\n"))
    assert with_theirs[1] == made[1]
    assert with_theirs[0].rows == made[0].rows
    ours, theirs = view(made[0]).rows, view(with_theirs[0]).rows
    assert theirs[:-1] == ours
    assert [cell.text for cell in theirs[-1]][:3] == ["<Theirs> (published)", "99.90", "–"]
    assert {cell.rank for cell in theirs[-1]} == {None}
    assert {cell.text for cell in theirs[-1][3:]} == {"–"}
    assert "not measured here; neither ranked nor compared" in with_theirs[0].footnotes[-1]
    for kind in ("md", "tex", "html", "txt"):
        assert "(published)" in FORMATS[kind](with_theirs[0])
    assert FORMATS["csv"](with_theirs[0]) == FORMATS["csv"](made[0])
    assert "<Theirs>" not in FORMATS["html"](with_theirs[0])


RUNS = {"A": [1.0, 0.0, 1.0, 0.0], "B": [1.0, 1.0, 1.0, 0.0]}


def test_compare_shows_them_and_refuses_a_wrong_file(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    compare = ("compare", "testbed-smoke", "--store", smoke.store, "--only", "CTPD", "--published")
    outcome = cli(*compare, written(tmp_path, "row,Average\nPaper,55.5\n"))
    assert outcome.code == 0, outcome.err
    assert "Paper (published)" in outcome.out
    outcome = cli(*compare, tmp_path / "none.csv")
    assert outcome.code == 2
    assert "none.csv" in outcome.err
