"""The report: complete in itself, well formed, the same numbers as the tables, and for runs that lack things too."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.costs import cost_table, count, duration, mebibytes
from harness.examples import grade
from harness.formats import to_html
from harness.report import clamp_bounds, report, smoothed
from harness.sheet import TableSpec
from harness.tables import build_tables

Record = dict[str, Any]
RESULTS = Path(__file__).parents[2] / "results"
NAMES = ("Teacher", "Student", "DPO", "TIS-DPO", "CTPD")
SPEC = TableSpec("main", "Main results", tuple((name, name) for name in NAMES), base="DPO", unranked=("Teacher",),
                 published="table1_qwen14b_llama8b")  # fmt: skip
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Reads a page and refuses elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.text.setdefault(self.open[-1], []).append(data.strip())

    def count(self, tag: str) -> int:
        return sum(seen == tag for seen, _ in self.seen)


def demo() -> list[Record]:
    """The records of a real run, in the order of the table."""
    folder = RESULTS / "testbed-demo" / "records"
    found = {record["run"]: record for record in (json.loads(path.read_text()) for path in folder.glob("*.json"))}
    return [found[name] for name in NAMES]


def made(records: list[Record], spec: TableSpec = SPEC) -> str:
    return report(build_tables(records, [spec]), records, title="testbed-demo", about="About <it>.")


@pytest.fixture(scope="module")
def page() -> str:
    return made(demo())


def test_the_report_needs_no_script_no_network_and_no_other_file(page: str) -> None:
    tags = {tag for tag, _ in Page(page).seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"https?:|url\(|@import|javascript:| on\w+=", page)
    for tag, attributes in Page(page).seen:
        assert "src" not in attributes
        assert tag != "a" or str(attributes["href"]).startswith("#")


def test_the_report_has_all_its_sections_and_every_link_leads_somewhere(page: str) -> None:
    read = Page(page)
    assert read.text["h2"] == ["Results", "Training", "Importance weights", "Cost", "Provenance"]
    identifiers = [attributes["id"] for _, attributes in read.seen if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert {str(attributes["href"])[1:] for tag, attributes in read.seen if tag == "a"} <= set(identifiers)


def test_the_report_is_accessible(page: str) -> None:
    read = Page(page)
    assert read.count("h1") == 1
    pictures = [attributes for tag, attributes in read.seen if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == len(read.text["desc"]) == len(read.text["title"]) - 1  # and the page's own title
    for tag, attributes in read.seen:
        assert tag != "th" or attributes.get("scope") in ("row", "col")
        assert tag != "html" or attributes["lang"] == "en"
    assert read.count("table") == read.count("caption")
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_report_shows_the_tables_numbers_and_published_ones_apart(page: str) -> None:
    for cell in ('<td class="best">84.50</td>', "<td>+20.01 [+16.83, +23.06]</td>"):
        assert cell in page
        assert cell in to_html(build_tables(demo(), [SPEC])[0])
    ours, _, theirs = page.partition('<div class="published">')
    assert "67.42" in theirs
    assert "67.42" not in ours
    assert "Reported by others; not our measurements." in theirs


def test_the_summary_names_the_best_row_and_its_difference(page: str) -> None:
    summary = re.search(r'<p class="summary">(.*?)</p>', page, re.DOTALL)
    assert summary
    assert (
        summary[1]
        .replace("\N{NO-BREAK SPACE}", " ")
        .startswith("Best Average: CTPD, 69.40 %. Difference to DPO: +20.01 [+16.83, +23.06] points (95 %), p = 0.002")
    )


def test_text_of_the_user_is_escaped() -> None:
    records = demo()
    records[4]["weights"]["examples"][0] = {
        "prompt": "<script>",
        "chosen": [["a<b", 2.5]],
        "rejected": [["&amp;", 0.2]],
    }
    text = made(records)
    assert "About &lt;it&gt;." in text
    assert '<span class="span up3" title="2.50">a&lt;b</span>' in text
    assert '<span class="span down4" title="0.20">&amp;amp;</span>' in text
    assert "<script>" not in text


def test_a_run_without_margins_or_weights_is_left_out_of_those_figures_alone() -> None:
    records = demo()
    for entry in records[4]["training"]["history"]:
        for key in [key for key in entry if "rewards/" in key]:
            del entry[key]
    records[4]["weights"] = None
    lines = dict(zip(("Loss", "Reward margin", "Reward accuracy"), re.findall(r"<desc>(\w.* over step\..*?)</desc>", made(records)), strict=True))  # fmt: skip
    assert "CTPD: from" in lines["Loss"]
    assert all("CTPD: from" not in lines[title] and "TIS-DPO: from" in lines[title] for title in list(lines)[1:])
    assert "Weights of CTPD" not in made(records)
    assert '<tr><th scope="row">CTPD</th><td>1</td><td>7.5 s</td>' in made(records)


def test_a_report_of_untrained_models_alone_has_no_training_and_no_weights() -> None:
    records = demo()[:2]
    for record in records:
        record["training"] = None
    spec = TableSpec("main", "Main", (("Teacher", "Teacher"), ("Student", "Student"), ("DPO", "DPO")), base="DPO")
    read = Page(made(records, spec))
    assert read.text["h2"] == ["Results", "Cost", "Provenance"]
    assert read.count("svg") == 0
    assert any("Some runs are missing" in text for text in read.text["p"])


def test_curves_are_means_over_the_steps_that_all_seeds_have() -> None:
    records = demo()
    second = copy.deepcopy(records[2])
    second["seed"] = 1
    records[2]["training"]["history"] = [{"step": s, "loss": 1.0} for s in range(1, 93)]
    second["training"]["history"] = [{"step": s, "loss": 3.0} for s in range(1, 51)]
    described = re.search(r"Loss over step\. DPO: from (\S+) to (\S+);", made([*records, second]))
    assert described
    assert described.groups() == ("2", "2")


def test_smoothing_keeps_the_number_of_points_and_a_constant() -> None:
    assert smoothed([(x, 2.0) for x in range(50)]) == [(x, 2.0) for x in range(50)]
    assert smoothed([(0, 1.0), (1, 5.0)]) == [(0, 1.0), (1, 5.0)]


def test_clamp_bounds_are_those_that_the_weights_of_a_real_run_reach() -> None:
    record = demo()[4]
    for side, sign in (("chosen", 1), ("rejected", -1)):
        edges = record["weights"][side]["histogram"]["edges"]
        assert clamp_bounds(record["params"], sign) == pytest.approx([edges[0], edges[-1]], abs=1e-5)
    assert clamp_bounds({"beta": 0.1}, 1) == []


def test_runs_with_the_very_same_weights_share_a_histogram() -> None:
    records = demo()
    twin = copy.deepcopy(records[4]) | {"run": "CTPD twice"}
    text = made([*records, twin])
    assert text.count("<title>Weights of ") == 2
    assert "Weights of CTPD, CTPD twice, seed 0" in text


@pytest.mark.parametrize(
    ("weight", "style"),
    [(1.0, ""), (1.04, ""), (1.05, "up1"), (0.9, "down1"), (1.9, "up2"), (0.4, "down3"), (4.48, "up4"), (0.0, "down4")],
)
def test_spans_are_graded_by_the_factor_from_one(weight: float, style: str) -> None:
    assert grade(weight) == style


def test_the_cost_table_shows_any_run_and_invents_nothing() -> None:
    records = demo()
    records[0]["training"] = None
    records[4]["signals"] = ["teacher SFT", "teacher negative", "teacher positive", "student SFT"]
    rows = {row[0]: row[1:] for row in cost_table({record["run"]: [record] for record in records}).rows}
    assert rows["Teacher"][1:7] == ("–",) * 6
    assert rows["DPO"][:7] == ("1", "7.1 s", "684 MiB", "1.5 MiB", "393,888", "393,888", "92")
    assert rows["DPO"][7:9] == ("–", "–")  # records of before do not say
    assert rows["CTPD"][7:9] == ("3", "1")


def test_times_memory_and_counts_are_written_in_the_unit_that_fits() -> None:
    assert [duration(s) for s in (0.26, 59.96, 341.4, 7380)] == ["0.3 s", "1 min 00 s", "5 min 41 s", "2 h 03 min"]
    assert [mebibytes(m) for m in (1.5, 684.1, 81920)] == ["1.5 MiB", "684 MiB", "80.0 GiB"]
    assert [count(n) for n in (393888, 139399488)] == ["393,888", "139.4 M"]


def test_provenance_names_every_version_and_where_records_differ() -> None:
    records = demo()
    records[1]["provenance"]["versions"]["torch"] = "2.99"
    text = made(records)
    assert "torch 2.13.0+cpu and 2.99" in text
    assert records[0]["shared_hash"] in text
    assert "<code>teacher.sft.learning_rate</code> 0.001" in text
