"""What a record holds to be reproduced, and how a new record is compared with it."""

import json
from pathlib import Path

import pytest

from ctpd.core.config import to_plain
from ctpd.core.errors import UserError
from ctpd.core.identity import identity
from ctpd.recipe import RunSpec, expand, load_recipe, shipped_recipes
from ctpd.recipe.model import Recipe
from harness.record import Record, training_summary
from harness.reproduction import agreements, made_otherwise, own_recipe, recipe_text
from tests.fixtures.records import FIT, PROVENANCE, changed, record, remeasured, result


def reloaded(recipe: dict, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(record("dpo", 0, own_recipe=recipe), source="record.json"), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize("name", ["testbed-smoke", "testbed-clamp", "qwen7b-llama1b"])
def test_each_row_has_a_recipe_that_loads_and_plans_the_same(name: str, tmp_path: Path) -> None:
    """The shared settings and the run are the same as in the whole recipe, rows of ablations included."""
    assert name in shipped_recipes()
    whole = load_recipe(name)
    rows: dict[str, RunSpec | str] = {**expand(whole), **whole.untrained}
    for run, spec in rows.items():
        seed = 0 if isinstance(spec, RunSpec) else None
        found = reloaded(own_recipe(whole, run=run, seed=seed, spec=spec), tmp_path)  # type: ignore[arg-type]
        assert {**expand(found), **found.untrained}.keys() == {run}
        shared = to_plain(whole.shared) | ({} if seed is None else {"seeds": [0]})
        assert to_plain(found.shared) == shared
        if isinstance(spec, RunSpec):
            mine = expand(found)[run]
            assert (mine.method, identity(mine.params), dict(mine.tuned)) == (
                spec.method,
                identity(spec.params),
                dict(spec.tuned),
            )


def test_no_path_of_a_machine_is_in_a_record(tmp_path: Path) -> None:
    """Of absolute paths the last name is left; relative ones, which are the user's own, are kept."""
    data = to_plain(load_recipe("testbed-smoke"))
    data["shared"]["data"] |= {"train": {"path": str(tmp_path / "pairs.jsonl")}, "eval": {"path": "data/eval.jsonl"}}
    data["shared"]["evaluation"] |= {"suite": "~/suite.yaml", "data_root": str(tmp_path)}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(data))
    recipe = load_recipe(path)
    found = own_recipe(recipe, run="DPO", seed=0, spec=recipe.runs["DPO"])
    assert str(tmp_path) not in json.dumps(found)
    assert [found["shared"]["data"][split]["path"] for split in ("train", "eval")] == ["pairs.jsonl", "data/eval.jsonl"]
    assert found["shared"]["evaluation"]["suite"] == "suite.yaml"


def test_a_record_of_an_older_version_is_refused() -> None:
    with pytest.raises(UserError, match="does not hold the recipe"):
        recipe_text(record("dpo", 0), source="record.json")


def trained(loss: float, *results: tuple) -> Record:
    history = [{"loss": 2.0, "step": 1}, {"loss": loss, "step": 2}]
    return record("dpo", 0, *results, training=training_summary({**FIT, "history": history}))


SCORES = result("GSM8K", [1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("other", "verdicts", "same"),
    [
        (trained(1.0, SCORES), ["the same, bit for bit", "the same, bit for bit"], True),
        (
            trained(1.00001, SCORES),
            ["the same within rounding: 1 of 2 logged numbers differ, by up to 1e-05", "the same, bit for bit"],
            True,
        ),
        (
            trained(1.5, result("GSM8K", [1.0, 1.0, 1.0, 0.0])),
            ["1 of 2 logged numbers differ, by up to 0.33", "1 of 4 documents differ, by up to 1"],
            False,
        ),
        (
            trained(float("nan"), SCORES),
            ["1 of 2 logged numbers differ, by up to inf", "the same, bit for bit"],
            False,
        ),
        (
            remeasured(trained(1.0, SCORES), "GSM8K", shots=3),
            ["the same, bit for bit", "cannot be compared: `shots` (5 and 3)"],
            False,
        ),
    ],
)
def test_each_measurement_is_the_same_or_differs_by_so_much(other: Record, verdicts: list[str], same: bool) -> None:
    found = agreements(trained(1.0, SCORES), other)
    assert [one.name for one in found] == ["training", "GSM8K"]
    assert [one.verdict for one in found] == verdicts
    assert all(one.is_same for one in found) == same


def test_a_column_of_one_record_alone_is_no_agreement() -> None:
    (only,) = agreements(record("dpo", 0, SCORES), record("dpo", 0))
    assert not only.is_same
    assert "only one of the two" in only.verdict


def test_what_was_made_otherwise_is_named() -> None:
    one, other = (
        record("dpo", 0),
        record("dpo", 0, provenance=changed(PROVENANCE, versions={"torch": "3"}, processes=2)),
    )
    assert made_otherwise(one, other) == {"torch": ("2", "3"), "processes": ("1", "2")}
    assert made_otherwise(one, one) == {}
