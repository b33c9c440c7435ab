"""The report: self-contained, well formed, with the numbers of the tables, also for runs without some data."""

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest

from harness.charts import Forest
from harness.contents import contents, smoothed
from harness.costs import cost_table, count, duration, mebibytes
from harness.drawing import spread_apart
from harness.examples import grade
from harness.formats import to_html
from harness.record import LogEntry, Record
from harness.report import report
from harness.sheet import TableSpec
from harness.tables import build_tables
from harness.weights_summary import WeightedPair, WeightedSpan
from tests.fixtures.pages import Page
from tests.fixtures.records import changed, demo

NAMES = ("Teacher", "Student", "DPO", "TIS-DPO", "CTPD")
SPEC = TableSpec(
    "main",
    "Main results",
    tuple((name, name) for name in NAMES),
    base="DPO",
    unranked=("Teacher",),
    published="table1_qwen14b_llama8b",
)
PAPER = "https://arxiv.org/abs/2601.11865"


def made(records: list[Record], spec: TableSpec = SPEC) -> str:
    return report(contents(build_tables(records, [spec]), records), records, title="testbed-demo", about="About <it>.")


@pytest.fixture(scope="module")
def page() -> str:
    return made(demo(NAMES))


def test_the_report_needs_no_script_no_network_and_no_other_file(page: str) -> None:
    tags = {tag for tag, _ in Page(page).seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"url\(|@import|javascript:| on\w+=", page)
    links = set()
    for tag, attributes in Page(page).seen:
        assert "src" not in attributes
        assert tag == "a" or not any(re.search("https?:", str(value)) for value in attributes.values())
        if tag == "a" and not str(attributes["href"]).startswith("#"):
            links.add(attributes["href"])
    assert links == {PAPER}
    assert page.count("https:") == page.count(PAPER) == 1


def test_the_report_has_all_its_sections_and_every_link_leads_somewhere(page: str) -> None:
    read = Page(page)
    assert read.text["h2"] == [
        "Results",
        "The rows",
        "Training",
        "Importance weights",
        "Health of the answers",
        "Cost",
        "Provenance",
    ]
    identifiers = [attributes["id"] for _, attributes in read.seen if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = {str(attributes["href"]) for tag, attributes in read.seen if tag == "a"} - {PAPER}
    assert {link[1:] for link in links} <= set(identifiers)


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
    for cell in ('<td class="best">84.50</td>', "<td>+20.01 [+16.90, +23.08]</td>"):
        assert cell in page
        assert cell in to_html(build_tables(demo(NAMES), [SPEC])[0])
    ours, _, theirs = page.partition('<div class="published">')
    assert "67.42" in theirs
    assert "67.42" not in ours
    assert "Reported by others; not our measurements." in theirs


def test_the_summary_names_the_best_row_and_its_difference(page: str) -> None:
    summary = re.search(r'<p class="result">(.*?)</p>', page, re.DOTALL)
    assert summary
    assert (
        summary[1]
        .replace("\N{NO-BREAK SPACE}", " ")
        .startswith(
            "Best Average: CTPD, 69.40 %. Difference to DPO: +20.01 [+16.90, +23.08] points (95 %), of one seed: another training could move it further."
        )
    )
    assert "<li>Below the model that they started from: DPO, TIS-DPO.</li>" in page


def test_text_of_the_user_is_escaped() -> None:
    *records, ctpd = demo(NAMES)
    assert ctpd.weights is not None
    example = WeightedPair(
        prompt="<script>", chosen=(WeightedSpan("a<b", 2.5),), rejected=(WeightedSpan("&amp;", 0.2),)
    )
    text = made([*records, changed(ctpd, weights=changed(ctpd.weights, examples=(example,)))])
    assert "About &lt;it&gt;." in text
    assert '<span class="span up3" title="2.50">a&lt;b</span>' in text
    assert '<span class="span down4" title="0.20">&amp;amp;</span>' in text
    assert "<script>" not in text


def test_a_run_without_margins_or_weights_is_left_out_of_those_figures_alone() -> None:
    *records, ctpd = demo(NAMES)
    assert ctpd.training is not None
    history = [
        changed(entry, metrics={name: value for name, value in entry.metrics.items() if "rewards/" not in name})
        for entry in ctpd.training.history
    ]
    records.append(changed(ctpd, training=changed(ctpd.training, history=history), weights=None))
    lines = dict(
        zip(
            ("Loss", "Reward margin", "Reward accuracy"),
            re.findall(r"<desc>(\w.* over step\..*?)</desc>", made(records)),
            strict=True,
        )
    )
    assert "CTPD: from" in lines["Loss"]
    assert all("CTPD: from" not in lines[title] and "TIS-DPO: from" in lines[title] for title in list(lines)[1:])
    assert "Weights of CTPD" not in made(records)
    assert '<tr><th scope="row">CTPD</th><td>1</td><td>7.5 s</td>' in made(records)


def test_a_report_of_untrained_models_alone_has_no_training_and_no_weights() -> None:
    records = [changed(record, training=None) for record in demo(NAMES)[:2]]
    spec = TableSpec("main", "Main", (("Teacher", "Teacher"), ("Student", "Student"), ("DPO", "DPO")), base="DPO")
    read = Page(made(records, spec))
    assert read.text["h2"] == ["Results", "The rows", "Health of the answers", "Cost", "Provenance"]
    assert read.count("svg") == 0  # nor the explanation of a method that no row is
    assert any("Some runs are missing" in text for text in read.text["li"])


def test_curves_are_means_over_the_steps_that_all_seeds_have() -> None:
    records = demo(NAMES)
    records[2], second = logged(records[2], 0, [1.0] * 92), logged(records[2], 1, [3.0] * 50)
    described = re.search(r"Loss over step\. DPO: from (\S+) to (\S+);", made([*records, second]))
    assert described
    assert described.groups() == ("2", "2")


def test_a_loss_that_is_not_finite_interrupts_its_curve() -> None:
    records = demo(NAMES)
    records[2] = logged(records[2], 0, [1.0, 2.0, None, 4.0])
    assert re.search(r"Loss over step\. DPO: from 1 to 4;", made(records))


def logged(record: Record, seed: int, losses: Sequence[float | None]) -> Record:
    """The record with another seed and other losses."""
    assert record.training is not None
    history = tuple(LogEntry(step=step, metrics={"loss": loss}) for step, loss in enumerate(losses, start=1))
    return changed(record, seed=seed, training=changed(record.training, history=history))


def test_smoothing_keeps_the_number_of_points_and_a_constant() -> None:
    assert smoothed([(x, 2.0) for x in range(50)]) == [(x, 2.0) for x in range(50)]
    assert smoothed([(0, 1.0), (1, 5.0)]) == [(0, 1.0), (1, 5.0)]


def test_clamp_bounds_are_those_that_the_weights_of_a_real_run_reach() -> None:
    weights = demo(NAMES)[4].weights
    assert weights is not None
    for side in (weights.chosen, weights.rejected):
        edges = side.histogram.edges
        assert sorted(side.clamps) == pytest.approx([edges[0], edges[-1]], abs=1e-5)
    text = made(demo(NAMES))
    bounds = [f"{end:.3g}" for end in (*weights.chosen.clamps, *weights.rejected.clamps)]
    assert all(f">{bound}</text>" in text for bound in bounds)


def test_runs_with_the_very_same_weights_share_a_histogram() -> None:
    records = demo(NAMES)
    twin = changed(records[4], run="CTPD twice")
    text = made([*records, twin])
    assert text.count("<title>Weights of ") == 2
    assert "<title>Weights of CTPD, seed 0</title>" in text
    assert '<figcaption>CTPD, seed 0<span class="remark">the same weights: CTPD twice</span></figcaption>' in text


@pytest.mark.parametrize(
    ("weight", "style"),
    [(1.0, ""), (1.04, ""), (1.05, "up1"), (0.9, "down1"), (1.9, "up2"), (0.4, "down3"), (4.48, "up4"), (0.0, "down4")],
)
def test_spans_are_graded_by_the_factor_from_one(weight: float, style: str) -> None:
    assert grade(weight) == style


def test_the_cost_table_shows_any_run_and_invents_nothing() -> None:
    records = demo(NAMES)
    records[0] = changed(records[0], training=None)
    rows = {row[0]: row[1:] for row in cost_table({record.run: [record] for record in records}).rows}
    assert rows["Teacher"][1:7] == ("–",) * 6
    assert rows["DPO"][:7] == ("1", "7.1 s", "684 MiB", "6.0 MiB", "393,888", "393,888", "92")
    assert [rows[name][7:9] for name in NAMES] == [("0", "0"), ("0", "0"), ("0", "1"), ("0", "3"), ("3", "0")]


def test_times_memory_and_counts_are_written_in_the_unit_that_fits() -> None:
    assert [duration(s) for s in (0.26, 59.96, 341.4, 7380)] == ["0.3 s", "1 min 00 s", "5 min 41 s", "2 h 03 min"]
    assert [mebibytes(m) for m in (1.5, 684.1, 81920)] == ["1.5 MiB", "684 MiB", "80.0 GiB"]
    assert [count(n) for n in (393888, 139399488)] == ["393,888", "139.4 M"]


def test_provenance_names_every_version_and_where_records_differ() -> None:
    records = demo(NAMES)
    made_with = records[1].provenance
    versions = {**made_with.versions, "torch": "2.99"}
    records[1] = changed(records[1], provenance=changed(made_with, versions=versions))
    text = made(records)
    assert "torch 2.13.0+cpu and 2.99" in text
    assert records[0].shared.digest in text
    assert "<code>teacher.sft.learning_rate</code> 0.001" in text


def test_the_details_hold_differences_to_the_start_and_intervals_given_the_seeds(page: str) -> None:
    _, _, after = page.partition(
        "<summary>Ranks by column, differences to the start, and intervals given the seeds</summary>"
    )
    further, _, _ = after.partition("</details>")
    assert "Average vs. its start [95 %]" in further
    assert "Average vs. DPO, given the seeds [95 %]" in further
    assert '<th scope="row">DPO ↓</th>' in further


def test_a_figure_fills_no_interval_of_a_single_training() -> None:
    """Its interval leaves out the chance of another training, and zero says nothing there."""
    records = demo(NAMES)
    (table,) = build_tables(records, [SPEC])
    (section,) = contents([table], records).tables
    forest = section.forests[0].chart
    assert isinstance(forest, Forest)
    filled = {item.label.split()[0]: item.is_clear for item in forest.estimates}
    assert not any(filled.values())
    seeds = [changed(one, seed=None if one.seed is None else seed) for one in records for seed in (0, 1, 2)]
    distinct = list({(one.run, one.seed): one for one in seeds}.values())
    (section,) = contents(build_tables(distinct, [SPEC]), distinct).tables
    forest = section.forests[0].chart
    assert isinstance(forest, Forest)
    assert next(item for item in forest.estimates if item.label == "CTPD").is_clear


def test_the_explanation_is_three_sentences_and_a_picture(page: str) -> None:
    explained = re.search(r'<div class="ctpd">.*?<p>(.*?)</p>.*?<svg class="picture"', page, re.DOTALL)
    assert explained
    assert len(re.findall(r"\.(?: |$)", explained[1])) == 3


def test_reward_plots_say_from_whose_margin_a_row_is_measured(page: str) -> None:
    remark = re.search(r'Reward margin<span class="remark">(.*?)</span>', page, re.DOTALL)
    assert remark
    said = remark[1].replace("&#39;", "'")
    assert "CTPD: measured from the teacher's margin" in said
    assert "all other rows: from the student's" in said
    assert "DPO" not in said


def test_notes_that_tables_share_stand_once() -> None:
    second = TableSpec("second", "Two rows", (("DPO", "DPO"), ("CTPD", "CTPD")), base="DPO", note="Its own.")
    records = demo(NAMES)
    text = report(contents(build_tables(records, [SPEC, second]), records), records, title="t", about="a")
    notes = [note for table in build_tables(records, [SPEC, second]) for note in table.footnotes]
    shown = [re.sub("<.*?>", "", note) for note in re.findall(r"<li>(.*?)</li>", text)]
    for note in set(notes):
        assert shown.count(note.replace("'", "&#39;")) == 1, note
    assert text.count("Bold: best of the column") == 1
    assert text.count('<a href="#notes">notes to all tables</a>') == 1


def test_thirteen_lines_have_numbers_that_the_legend_explains_and_none_hides_another() -> None:
    records = demo(NAMES)
    names = [f"row {i}" for i in range(13)]
    trained = [changed(records[4], run=name) for name in names]
    text = made([*records[:2], *trained], TableSpec("main", "Main", tuple((name, name) for name in names)))
    legend = re.findall(r'<span class="number">(\d+)</span>.*?</svg>([^<]*)</li>', text)
    assert legend == [(str(i + 1), name) for i, name in enumerate(names)]
    loss = re.search(r"<title>Loss</title>.*?</svg>", text, re.DOTALL)
    assert loss
    numbers = re.findall(r'<text x="(?:33|34|35)\d[\d.]*" y="([\d.]+)"[^>]*>(\d+)</text>', loss[0])
    assert sorted(number for _, number in numbers) == sorted(dict(legend))
    heights = sorted(float(y) for y, _ in numbers)
    assert min(b - a for a, b in pairwise(heights)) > 10  # points; the digits are 8 high


def test_heights_are_spread_apart_inside_their_range() -> None:
    assert spread_apart([1.0, 5.0], gap=1.0, low=0.0, high=10.0) == [1.0, 5.0]
    assert spread_apart([9.9, 9.9, 10.0], gap=1.0, low=0.0, high=10.0) == [8.0, 9.0, 10.0]
    assert spread_apart([0.0] * 3, gap=100.0, low=0.0, high=10.0) == [0.0, 5.0, 10.0]
    assert spread_apart([], gap=1.0, low=0.0, high=1.0) == []
