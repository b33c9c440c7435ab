"""The report in a real browser, and the messages of `compare` about missing records."""

import re
import shlex
import shutil
import struct
from pathlib import Path

import pytest

from ctpd.app import Experiment
from ctpd.recipe import load_recipe
from tests.conftest import Cli, Outcome, SmokeRun
from tests.fixtures.browser import browse, needs_browser, with_script


@pytest.fixture(scope="module")
def compared(cli: Cli, smoke: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder that `compare --to` fills, with the report beside the tables."""
    folder = tmp_path_factory.mktemp("compared")
    outcome = cli("compare", "testbed-smoke", "--store", smoke.store, "--to", folder)
    assert outcome.code == 0, outcome.err
    return folder / "testbed-smoke", outcome


def test_run_and_compare_name_the_report_last(smoke: SmokeRun, compared: tuple[Path, Outcome]) -> None:
    folder, outcome = compared
    assert outcome.out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    path = smoke.outcome.out.splitlines()[-1].removeprefix("Report: ")
    assert Path(path) == smoke.store / "tables" / "testbed-smoke" / "report.html"
    assert "missing" not in outcome.err.lower()


def test_the_report_shows_every_table_run_and_stored_signal(compared: tuple[Path, Outcome]) -> None:
    text = (compared[0] / "report.html").read_text(encoding="utf-8")
    recipe = load_recipe("testbed-smoke")
    for table in recipe.tables.values():
        assert f"<caption>{table.caption}</caption>" in text
    costs = dict(re.findall(r'<tr><th scope="row">([^<]*)</th>((?:<td>[^<]*</td>){10,})</tr>', text))
    passes = {run: re.findall(r"<td>([^<]*)</td>", cells)[7:9] for run, cells in costs.items()}
    assert passes["Teacher"] == ["0", "0"]
    assert passes["DPO"] == ["0", "1"]  # the student's reference
    assert passes["TIS-DPO"] == ["0", "3"]  # its reference and its contrastive pair
    assert passes["CTPD"] == ["3", "0"]
    assert passes["reference: Student"] == ["2", "1"]


@needs_browser
def test_a_browser_renders_the_report_without_an_error(compared: tuple[Path, Outcome], tmp_path: Path) -> None:
    shown = browse(compared[0] / "report.html", tmp_path, "--dump-dom")
    for heading in ("Results", "Ablations and further tables", "Training", "Importance weights", "Cost", "Provenance"):
        assert re.search(rf"<h2[^>]*>{heading}</h2>", shown.stdout)
    figures = re.findall(r'<svg [^>]*class="figure"[^>]*aria-label="[^"]+"', shown.stdout)
    assert len(figures) > 12
    assert "CONSOLE" not in shown.stderr


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_report_fills_a_screen_and_never_scrolls_sideways(
    compared: tuple[Path, Outcome], tmp_path: Path, width: int
) -> None:
    """A script in a copy of the page measures its width; wide tables scroll inside their own box."""
    probe = "<script>document.title = 'wide ' + document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    copy = tmp_path / "probed.html"
    copy.write_text(with_script((compared[0] / "report.html").read_text(encoding="utf-8"), probe))
    shown = browse(copy, tmp_path / "profile", "--dump-dom", f"--window-size={width},900")
    measured = re.search(r"<title>wide (\d+) of (\d+)</title>", shown.stdout)
    assert measured
    assert int(measured[1]) <= int(measured[2]) <= width

    picture = tmp_path / "report.png"
    browse(copy, tmp_path / "profile", f"--screenshot={picture}", f"--window-size={width},2000")
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (width, 2000)
    assert len(data) > 60_000  # an empty page has about 8 kB


def test_compare_names_the_command_that_brings_a_missing_record_and_it_does(
    cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    store = tmp_path / "a store"
    shutil.copytree(smoke.pristine, store)
    experiment = Experiment("testbed-smoke")
    number = next(i for i, run in enumerate(experiment.runs) if run.name == "weights: Random")
    record = experiment.records[number]
    shutil.rmtree(store / record.kind / record.key)

    outcome = cli("compare", "testbed-smoke", "--store", store)
    assert outcome.code == 0
    assert re.search(r"^Random +missing", outcome.out, re.MULTILINE)
    expected = ["ctpd", "run", "testbed-smoke", "--only", "weights: Random", "--seed", "0", "--store", str(store)]
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("Missing: ")]
    assert message == f"Missing: weights: Random, seed 0. To build it: {shlex.join(expected)}"
    assert "--only 'weights: Random'" in message

    assert cli(*shlex.split(message.partition("To build it: ctpd ")[2])).code == 0
    again = cli("compare", "testbed-smoke", "--store", store)
    assert again.err == ""
    assert not re.search(r"^Random +missing", again.out, re.MULTILINE)


def test_a_missing_untrained_row_is_brought_without_a_seed(cli: Cli, smoke: SmokeRun) -> None:
    experiment = Experiment("testbed-smoke")
    untrained = experiment.records[0]
    moved = smoke.store / "moved"
    (smoke.store / untrained.kind / untrained.key).rename(moved)
    try:
        outcome = cli("compare", "testbed-smoke", "--store", smoke.store)
    finally:
        moved.rename(smoke.store / untrained.kind / untrained.key)
    command = f"ctpd run testbed-smoke --only Teacher --store {shlex.quote(str(smoke.store))}"
    assert f"Missing: Teacher. To build it: {command}\n" in outcome.err


def test_a_table_may_not_take_the_reports_name(cli: Cli, tmp_path: Path) -> None:
    from ctpd.recipe import shipped_recipes

    text = (
        shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8").replace("  main: {caption", "  report: {caption")
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text, encoding="utf-8")
    outcome = cli("run", recipe, "--store", tmp_path, "--plan")
    assert outcome.code == 2
    assert "may not be named `report`" in outcome.err


@needs_browser
@pytest.mark.parametrize(("width", "is_cut"), [(1280, False), (400, True)])
def test_no_table_is_cut_on_a_screen_and_on_a_phone_the_first_column_stays(
    compared: tuple[Path, Outcome], tmp_path: Path, width: int, is_cut: bool
) -> None:
    """A script in a copy of the page scrolls each table to its end; a frame makes the phone, which Chromium cannot be."""
    copy, frame = tmp_path / "probed.html", tmp_path / "frame.html"
    probe = """<script>onload = () => setTimeout(() => {
      const boxes = [...document.querySelectorAll(".scroll")].filter(box => box.checkVisibility());
      const cut = boxes.filter(box => box.scrollWidth > box.clientWidth + 1);
      const hinted = boxes.filter(box => box.querySelector(".more").clientHeight > 10);
      cut.forEach(box => { box.scrollLeft = 1e6; });
      const stay = cut.filter(box => Math.abs(
        box.querySelector("tbody th").getBoundingClientRect().left - box.getBoundingClientRect().left) < 2);
      const same = cut.length == hinted.length && cut.every(box => hinted.includes(box));
      parent.postMessage([boxes.length, cut.length, stay.length, same].join(" "), "*");
    }, 500)</script>"""
    copy.write_text(with_script((compared[0] / "report.html").read_text(encoding="utf-8"), probe))
    frame.write_text(
        "<script>onmessage = event => { document.title = 'tables ' + event.data }</script>"
        f"<iframe src='{copy.as_uri()}' style='width:{width}px;height:900px;border:0'></iframe>"
    )
    shown = browse(frame, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000", "--window-size=1400,900")
    measured = re.search(r"<title>tables (\d+) (\d+) (\d+) (\w+)</title>", shown.stdout)
    assert measured, shown.stdout[:500]
    tables, cut, stay = map(int, measured.groups()[:3])
    assert tables >= 5
    assert (cut > 0) == is_cut
    assert stay == cut
    assert measured[4] == "true"  # the hint stands where something is to the right, and nowhere else
