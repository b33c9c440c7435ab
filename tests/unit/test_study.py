"""The studies of mechanisms: every condition is a recipe that loads and can be planned."""

from pathlib import Path

import pytest
import yaml

from ctpd.app import plan
from ctpd.recipe import load_recipe
from scripts.study import STUDIES, recipe_of

TUNED = {
    run: {"learning_rate": 1e-3, **({"beta": 0.3} if "DPO" in run or "CTPD" in run else {})}
    for study in STUDIES.values()
    for run in (*study.runs, "DPO", "CTPD")
}
TUNED["CTPD"]["mu"] = 0.5


@pytest.mark.parametrize(
    ("name", "condition"), [(name, one) for name, study in STUDIES.items() for one in study.conditions]
)
def test_each_condition_is_a_recipe_with_its_changes_and_rows(name: str, condition: str, tmp_path: Path) -> None:
    study = STUDIES[name]
    made = {**recipe_of(study, condition, study.conditions[condition], TUNED), "name": "one"}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    recipe = load_recipe(path)
    assert set(recipe.runs) == {*study.runs, *study.conditions[condition].rows}
    assert plan(path).stages
    for row, (_, params) in study.conditions[condition].rows.items():
        given = {**recipe.runs[row].params, **recipe.runs[row].tuned}
        assert {key: given[key] for key in params} == dict(params)
