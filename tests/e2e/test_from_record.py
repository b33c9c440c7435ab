"""`ctpd run --from-record`: a row is trained and evaluated again from its record alone, and compared with it."""

import json
import shutil
from pathlib import Path

import pytest

from harness.record import Record
from tests.conftest import Cli, SmokeRun


@pytest.fixture(scope="module")
def given(smoke: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of DPO, as a file apart from the store."""
    target = tmp_path_factory.mktemp("given") / "dpo.json"
    for path in smoke.store.glob("record/*/record.json"):
        if Record.read(path).run == "DPO":
            shutil.copy(path, target)
    return target


def test_a_record_is_reproduced_bit_for_bit(cli: Cli, smoke: SmokeRun, given: Path, tmp_path: Path) -> None:
    """Trained and evaluated again from the record's own recipe, with another command, in another folder."""
    store = tmp_path / "store"
    (trained,) = json.loads(
        cli("train", "testbed-smoke", "--only", "DPO", "--store", smoke.store, "--quiet", "--json").out
    )
    left_out = shutil.ignore_patterns("record", "evaluate", "tables", trained["key"])  # what comes before is kept
    shutil.copytree(smoke.pristine, store, ignore=left_out)
    outcome = cli("run", "--from-record", given, "--store", store, "--device", "cpu", "--quiet")
    assert outcome.code == 0, outcome.err
    verdicts = [line for line in outcome.out.splitlines() if "bit for bit" in line]
    for line, name in zip(verdicts, ["training", *Record.read(given).evaluation], strict=True):
        assert line.startswith(f"{name} ")

    changed = Record.read(given).model_dump(mode="json", by_alias=True)
    name, column = next(iter(changed["evaluation"].items()))
    column["documents"][0][1] = 1 - column["documents"][0][1]
    changed["provenance"]["commit"] = "0" * 40
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    outcome = cli("run", "--from-record", other, "--store", store, "--quiet", "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    assert not found["same"]
    assert [one["name"] for one in found["measurements"] if one["differing"]] == [name]
    assert "\n\nMade otherwise: commit (00000" in cli("run", "--from-record", other, "--store", store, "--quiet").out


def test_the_store_of_a_record_reproduces_nothing(cli: Cli, smoke: SmokeRun, given: Path) -> None:
    outcome = cli("run", "--from-record", given, "--store", smoke.store)
    assert outcome.code == 2
    assert "holds this very record" in outcome.err


def test_a_record_that_cannot_be_reproduced_is_refused_first(cli: Cli, given: Path, tmp_path: Path) -> None:
    """Without a recipe, or with other inputs: one paragraph before anything is run."""
    fields = json.loads(given.read_text())
    older, other = tmp_path / "older.json", tmp_path / "other.json"
    older.write_text(json.dumps(fields | {"own_recipe": None}))
    fields["shared"]["settings"]["train"]["epochs"] = 7
    fields["shared"]["digest"] = "0"
    other.write_text(json.dumps(fields))
    for file, message in ((older, "does not hold the recipe"), (other, "`shared.train.epochs` (7 there, 1 here)")):
        outcome = cli("run", "--from-record", file, "--store", tmp_path / "store")
        assert outcome.code == 2
        assert message in outcome.err.replace("\n", " ")
    assert not [path for path in (tmp_path / "store").iterdir() if path.name != "from-records"]


@pytest.mark.parametrize(
    ("extra", "message"), [(("testbed-smoke",), "one of them"), (("--only", "DPO"), "does nothing")]
)
def test_what_the_record_says_cannot_be_given(extra: tuple[str, ...], message: str, cli: Cli, given: Path) -> None:
    outcome = cli("run", *extra, "--from-record", given)
    assert outcome.code == 2
    assert message in outcome.err
