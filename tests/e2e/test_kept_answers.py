"""`--samples`, the viewer in a browser, and evaluations of earlier versions that kept no answers."""

import json
import re
import shutil
from pathlib import Path

from ctpd.app import Experiment
from ctpd.pipeline.stages.evaluate import RESULT, SAMPLES
from ctpd.pipeline.stages.record import RECORD
from tests.conftest import Cli, SmokeRun
from tests.fixtures.browser import browse, needs_browser, with_script

ONE = ("--only", "DPO", "--device", "cpu")


def forgotten(store: Path) -> None:
    """Take the answers out of a store, as an earlier version would have left it."""
    for folder in (*store.glob("evaluate/[!.]*"), *store.glob("record/[!.]*")):
        shutil.rmtree(folder / SAMPLES, ignore_errors=True)
        path = folder / (RESULT if folder.parent.name == "evaluate" else RECORD)
        data = json.loads(path.read_text(encoding="utf-8"))
        for one in data.get("evaluation", {"": data}).values():
            one.pop("answers", None)
        path.write_text(json.dumps(data), encoding="utf-8")
        rewritten(folder)


def rewritten(folder: Path) -> None:
    from ctpd.core import manifests
    from ctpd.core.hashes import HashMemory

    path = folder / manifests.MANIFEST
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    kept = {name: facts[name] for name in ("stage", "key", "identity", "provenance")}
    manifests.write(folder, kept, HashMemory(folder.parent / f".{folder.name}.hashes"))


def test_answers_are_kept_copied_and_shown_and_older_evaluations_say_how_to_get_them(
    cli: Cli, smoke: SmokeRun, tmp_path: Path
) -> None:
    store, samples = tmp_path / "store", tmp_path / "samples"
    shutil.copytree(smoke.pristine, store)
    run = ("run", "testbed-smoke", "--store", store, *ONE, "--samples", samples)
    outcome = cli(*run)
    assert outcome.code == 0, outcome.err
    assert f"Sample files of 4 evaluations: {samples}" in outcome.err
    assert len(list(samples.rglob("samples_ctpd_testbed_*.jsonl"))) == 4
    report = store / "tables" / "testbed-smoke" / "report.html"
    assert report.read_text(encoding="utf-8").count('<details class="viewer"') == 4

    forgotten(store)
    before = {stage.key for stage in Experiment("testbed-smoke", only=["DPO"]).evaluations[0].values()}
    outcome = cli(*run)
    assert "0 stages built" in outcome.err  # what lacks answers is right for all that
    assert (
        "Note: 4 evaluations were made before answers were kept: add --rebuild to evaluate these again." in outcome.err
    )
    outcome = cli(*run, "--rebuild")
    assert "5 stages built" in outcome.err  # four evaluations and the record
    assert before == {stage.key for stage in Experiment("testbed-smoke", only=["DPO"]).evaluations[0].values()}
    text = report.read_text(encoding="utf-8")
    assert text.count('<details class="viewer"') == 4
    assert "No answers were kept for Teacher, Student, TIS-DPO" in text


def test_a_plan_writes_no_samples(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("run", "testbed-smoke", "--store", tmp_path, "--plan", "--samples", tmp_path / "x")
    assert outcome.code == 2
    assert "--samples does nothing here" in outcome.err


@needs_browser
def test_the_viewer_filters_and_sorts_without_a_script(cli: Cli, smoke: SmokeRun, tmp_path: Path) -> None:
    """The probe only clicks and looks; the page itself has no script."""
    probe = """<script>{
      const box = document.querySelector(".viewer"), all = [...box.querySelectorAll(".document")];
      const seen = () => all.filter(one => one.checkVisibility());
      const click = name => box.querySelector("." + name).click();
      const heightOf = one => one.getBoundingClientRect().top, wrong = one => Number(getComputedStyle(one).getPropertyValue("--wrong"));
      const sorted = () => seen().sort((a, b) => heightOf(a) - heightOf(b)).map(wrong);
      const found = [seen().length == all.length];
      for (const group of ["differ", "wrong", "right"]) {
        click("show-" + group);
        found.push(seen().every(one => one.classList.contains(group))
          && seen().length == all.filter(one => one.classList.contains(group)).length);
      }
      click("show-all"); click("row-0");
      found.push(seen().length == all.filter(one => one.classList.contains("w0")).length);
      click("row-any"); click("sort-hard");
      found.push(sorted().every((value, i, list) => i == 0 || list[i - 1] >= value));
      click("sort-easy");
      found.push(sorted().every((value, i, list) => i == 0 || list[i - 1] <= value));
      document.title = "found " + all.length + " " + found.join(" ");
    }</script>"""
    assert cli("compare", "testbed-smoke", "--store", smoke.store, "--to", tmp_path).code == 0
    page = (tmp_path / "testbed-smoke" / "report.html").read_text(encoding="utf-8")
    copy = tmp_path / "probed.html"
    copy.write_text(with_script(page, probe), encoding="utf-8")
    shown = browse(copy, tmp_path / "profile", "--dump-dom", "--window-size=1280,900")
    found = re.search(r"<title>found (\d+) ([\w ]+)</title>", shown.stdout)
    assert found, shown.stdout[:300]
    assert int(found[1]) == 12
    assert found[2].split() == ["true"] * 7
