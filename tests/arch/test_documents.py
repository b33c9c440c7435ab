"""Documents are correct: citations, links, paths and named functions exist, examples are run."""

import re
from pathlib import Path

import pytest

from tests.fixtures import documents
from tests.fixtures.documents import Step

ROOT = Path(__file__).resolve().parents[2]
HISTORY = {"CHANGELOG.md", "results/LOG.md"}  # what was true when it was written
FOLDERS = ("ctpd", "baselines", "harness", "benchmarks", "scripts", "tests", "docs", "results")
TEXTS = sorted(
    path
    for pattern in ("*.py", "*.md", "*.yaml", "*.html", "*.json")
    for folder in FOLDERS
    for path in (ROOT / folder).rglob(pattern)
    if "results" not in path.parts or path.suffix == ".md"
) + sorted([*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"])
PAGES = [path for path in TEXTS if path.suffix == ".md"]
GUIDES = [path for path in PAGES if "results" not in path.parts and str(path.relative_to(ROOT)) not in HISTORY]
PATHS = documents.sections((ROOT / "docs/architecture.md").read_text(encoding="utf-8"), level=3)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_citation_points_at_a_heading_that_exists() -> None:
    found = {name_of(path): documents.broken_citations(path.read_text(encoding="utf-8"), ROOT) for path in TEXTS}
    assert {name: broken for name, broken in found.items() if broken and name != name_of(Path(__file__))} == {}


def test_the_code_cites_the_method() -> None:
    """An empty search would pass the test above."""
    cited = [c for path in TEXTS for c in documents.CITATION.findall(path.read_text(encoding="utf-8"))]
    assert len({c for c in cited if c.startswith("docs/method.md#")}) >= 25


def test_nothing_is_cited_by_number() -> None:
    """The documents with numbered sections are not in the repository."""
    found = {name_of(path): documents.numbered_citations(path.read_text(encoding="utf-8")) for path in TEXTS}
    assert {name: cited for name, cited in found.items() if cited and name not in HISTORY} == {}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    assert documents.broken_links(path) == []


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of the tables of a page by their first cell, without marks of the best."""
    plain = re.sub(r"\*\*|</?ins>", "", text)
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in plain.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}


def test_the_table_of_the_readme_is_that_of_the_study() -> None:
    """Every row with its score, difference and rank; only p-values and numbers of seeds are left out."""
    written = rows_of((ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0])
    made = rows_of((ROOT / "results" / "testbed" / "main.md").read_text(encoding="utf-8"))
    names = [name for name in made if name not in ("", "---")]
    assert len(names) > 10
    assert {name: written[name] for name in names} == {name: [*made[name][:6], made[name][7]] for name in names}


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_every_path_that_a_page_names_exists(path: Path) -> None:
    assert documents.missing_paths(path.read_text(encoding="utf-8"), ROOT) == []


@pytest.mark.parametrize("path", [path for path in GUIDES if path.parent.name == "docs"], ids=name_of)
def test_every_function_that_a_page_names_exists(path: Path) -> None:
    for name in documents.DOTTED.findall(path.read_text(encoding="utf-8")):
        assert documents.resolve(name) is not None, name


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_formulas_survive_markdown(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert documents.unsafe_formulas(text) == []
    assert documents.prose(text).count("$$") % 2 == 0


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_each_row_of_a_table_is_one_line(path: Path) -> None:
    assert documents.broken_rows(path.read_text(encoding="utf-8")) == []


def test_the_example_of_the_method_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (
        b for b in documents.blocks((ROOT / "docs/method.md").read_text(encoding="utf-8")) if b.language == "python"
    )
    exec(compile(example.text, "docs/method.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*?\)  # (.*)", example.text)


@pytest.mark.parametrize("title", [title for title in PATHS if title.startswith("From ")])
def test_a_reader_gets_there_in_eight_steps(title: str) -> None:
    """Each step is a function that exists; one of two neighbours names the other in its source: no string is looked up."""
    path = documents.steps(PATHS[title])
    assert 2 <= len(path) <= 8
    for step in path:
        assert callable(documents.resolve(step.name)), step.name
    assert documents.unconnected(path) == []


def test_there_are_two_paths_for_the_reader() -> None:
    assert len([title for title in PATHS if title.startswith("From ")]) == 2


# The tests above can fail: made-up documents with one mistake each.


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Data step", "data-step"),
        ("From `ctpd run` to the loss", "from-ctpd-run-to-the-loss"),
        ("Deviations from lm-eval", "deviations-from-lm-eval"),
        ("What is refused?", "what-is-refused"),
        ("DCKD, ADPA & more", "dckd-adpa--more"),
        ("A [link](x.md) to `k_mu`", "a-link-to-k_mu"),
    ],
)
def test_anchors_are_those_of_github(heading: str, anchor: str) -> None:
    assert documents.slug(heading) == anchor


def test_headings_that_occur_twice_are_numbered_and_code_holds_none() -> None:
    assert documents.anchors("# A\n## B c\n```\n# no heading\n```\n## B c\n") == {"a", "b-c", "b-c-1"}


def test_broken_citations_and_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("# Here\n[a](#here) [b](#there) [c](other.md) [d](https://x.y/z) `[e](none.md)`\n")
    cited = ["docs/page.md", "docs/page.md#here", "docs/page.md#there", "docs/none.md#here"]
    assert documents.broken_citations(", ".join(cited), tmp_path) == cited[2:]
    assert documents.broken_links(page) == ["#there", "other.md"]
    assert documents.missing_paths("`docs/page.md`, `docs/*.md`, `docs/none.md`", tmp_path) == ["docs/none.md"]


@pytest.mark.parametrize(
    "rest", [" 3", " 2.5 to 3", " section 2", "\n    3, point 1", "' `mined`", ' "Pairs in"', ".md"]
)
def test_citations_by_number_are_found(rest: str) -> None:
    assert documents.numbered_citations("METHOD" + rest)
    assert not documents.numbered_citations("METHODS" + rest.replace(".md", ""))


def test_formulas_that_markdown_breaks_are_found() -> None:
    assert documents.unsafe_formulas(r"$a\,b$ and $\{c\}$ but $\lbrace d \rbrace$, `$e\,f$`") == [r"$a\,b$", r"$\{c\}$"]


def test_rows_of_a_table_that_are_cut_are_found() -> None:
    assert documents.broken_rows("| a | b |\n|---|---|\n| c\nd | e |\n```\n| code\n```\n") == ["| c"]


def test_steps_that_are_not_connected_are_found() -> None:
    text = "1. `json.dumps` writes\n2. `json.JSONEncoder.encode` encodes\n3. `textwrap.dedent` through `sub`\n"
    path = documents.steps(text)
    assert [step.through for step in path] == [None, None, "sub"]
    assert documents.unconnected(path) == []
    assert documents.unconnected([*path[:2], Step("textwrap.dedent", None)]) == [
        "json.JSONEncoder.encode and textwrap.dedent"
    ]
    assert documents.unconnected(path[1::-1]) == []
    with pytest.raises(AttributeError):
        documents.resolve("json.JSONEncoder.nothing")
    with pytest.raises(ImportError):
        documents.resolve("nothing.at.all")
