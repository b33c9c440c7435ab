"""Records: what is written reads back, JSON stays valid, other files are refused, and no path of a machine is kept."""

import json
from pathlib import Path

import pytest

from ctpd.core.errors import UserError
from ctpd.recipe import load_recipe
from harness.comparison import write_records
from harness.files import file_stem
from harness.record import LogEntry, Record, log_entries, training_summary
from harness.shared import local_settings, shared_settings
from tests.fixtures.records import DEMO, FIT, changed, demo, record, remeasured, result


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    for one in demo(("Teacher", "DPO", "CTPD")):
        one.write(tmp_path / "record.json")
        assert Record.read(tmp_path / "record.json") == one


def test_what_is_not_finite_is_null_and_the_file_valid_json(tmp_path: Path) -> None:
    one = record("dpo", 0, result("GSM8K", [1.0, float("nan")]), training=training_summary(FIT))
    one.write(tmp_path / "record.json")
    plain = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert [entry["metrics"] for entry in plain["training"]["history"]] == [
        {"loss": 2.5},
        {"loss": None, "grad_norm": None},
    ]
    assert plain["evaluation"]["GSM8K"]["value"] is None
    assert plain["evaluation"]["GSM8K"]["documents"] == [["GSM8K-0", 1.0], ["GSM8K-1", None]]
    assert plain["schema"] == 2
    assert Record.read(tmp_path / "record.json") == one


def test_log_entries_keep_step_and_epoch_apart_from_metrics() -> None:
    first, second = log_entries(FIT["history"])
    assert first == LogEntry(step=1, epoch=0.5, metrics={"loss": 2.5})
    assert second.epoch is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"schema": 1, "run": "dpo"}', "the record has schema 1, and this version reads schema 2"),
        ('{"schema": 2, "run": "dpo"', "the record is damaged: its file is no JSON"),
        ('{"schema": 2, "run": 3}', "the record is damaged: `recipe`: Field required"),
        ("[]", "the file is no record"),
        ("{}", "the file is no record"),
    ],
)
def test_other_files_are_refused_in_one_paragraph(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match="record") as caught:
        Record.read(path)
    message = str(caught.value)
    assert problem in message
    assert str(path) in message
    assert "\n" not in message
    with pytest.raises(UserError, match="cannot be read"):
        Record.read(tmp_path / "nowhere.json")


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999", "9" * 4000])
def test_a_number_that_json_does_not_have_is_refused(number: str, tmp_path: Path) -> None:
    """It would be written as null: the record that is read again would be another one."""
    plain = json.loads(next(DEMO.glob("*.json")).read_text())
    plain["shared"]["settings"]["train"] = "X"
    (tmp_path / "record.json").write_text(json.dumps(plain).replace('"X"', number))
    with pytest.raises(UserError, match=r"the record is damaged: it holds .*, which is no number of JSON"):
        Record.read(tmp_path / "record.json")


def test_a_wrong_type_deep_inside_is_named(tmp_path: Path) -> None:
    plain = json.loads(next(DEMO.glob("*.json")).read_text())
    column = next(iter(plain["evaluation"]))
    plain["evaluation"][column]["protocol"]["num_docs"] = "200"
    (tmp_path / "record.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"evaluation\..*protocol\.num_docs`: Input should be a valid integer"):
        Record.read(tmp_path / "record.json")


def test_every_run_and_seed_keeps_a_file_of_its_own(tmp_path: Path) -> None:
    """Also on a file system that ignores case."""
    runs = ("mu: -1", "mu: 1", "mu 1", "mu-1", "β", "γ", "学生", "CTPD", "ctpd", "Ctpd", "a.seed1", "a")
    records = [record(run, seed) for run in runs for seed in (0, 1, None)]
    paths = write_records(records, tmp_path)
    assert len({path.name.lower() for path in paths}) == len(records) == len(list(tmp_path.iterdir()))
    assert [Record.read(path) for path in paths] == records


def test_a_plain_name_is_kept_and_others_stay_readable() -> None:
    assert file_stem("mu-1") == "mu-1"
    assert file_stem("mu: -1").startswith("mu-1-")
    assert file_stem("weights: Origin").startswith("weights-origin-")
    assert len(file_stem("β")) == 8


def test_shared_settings_hold_digests_in_the_place_of_paths(tmp_path: Path) -> None:
    shared = load_recipe("testbed-smoke").shared
    student = changed(shared.student, model="/home/me/student", pretrain=None, sft="./sft", positive="~/positive")
    data = changed(shared.data, train=changed(shared.data.train, testbed=None, path="/data/pairs.jsonl"))
    mine = changed(shared, student=student, data=data)
    names = list(local_settings(mine))
    assert names == ["student.model", "student.sft", "student.positive", "data.train.path"]
    first = shared_settings(mine, {name: f"sha256 of {name}" for name in names})
    text = first.model_dump_json()
    for path in ("/home/me", "./sft", "~/positive", "/data/"):
        assert path not in text
    elsewhere = changed(mine, student=changed(student, model="/srv/student"))
    assert shared_settings(elsewhere, {name: f"sha256 of {name}" for name in names}) == first
    other = shared_settings(
        mine, {name: "other contents" if name == "student.sft" else f"sha256 of {name}" for name in names}
    )
    assert other.digest != first.digest


def test_shared_settings_hold_neither_seeds_nor_the_evaluation() -> None:
    shared = load_recipe("testbed-smoke").shared
    assert list(local_settings(shared)) == []
    found = shared_settings(shared, {})
    assert not {"seeds", "evaluation"} & set(found.settings)
    assert shared_settings(changed(shared, seeds=(7, 8)), {}) == found


def test_a_copy_with_another_result_is_another_record() -> None:
    one = record("dpo", 0, result("GSM8K", [1.0]))
    assert remeasured(one, "GSM8K", value=0.5) != one
    assert changed(one, seed=1).title == "run 'dpo', seed 1"
