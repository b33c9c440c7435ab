"""Numbers as they are printed: no NaN in JSON, no signed zero, and a bound is no value."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ctpd.core.printing import json_text
from harness.formats import p_text, percent_interval
from harness.sheet import TableSpec
from harness.statistics import DRAWS, LEAST_P, Interval
from harness.tables import build_tables
from tests.fixtures.records import record, result

ROOT = Path(__file__).resolve().parents[2]


def test_json_has_no_nan() -> None:
    given = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": np.float64("nan"), "e": "NaN"}
    text = json_text(given)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": "NaN",
    }  # fmt: skip


def test_every_command_prints_json_with_the_one_function() -> None:
    for path in sorted((ROOT / "ctpd" / "cli").glob("*.py")):
        printed = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "print")
        ]
        assert not [node for node in printed if "json.dumps" in ast.unparse(node)], path.name


def test_zero_has_no_sign() -> None:
    assert percent_interval(Interval(-0.00001, -0.0, 0.00004)) == "0.00 [0.00, 0.00]"
    assert percent_interval(Interval(-0.0125, -0.02, 0.001)) == "−1.25 [−2.00, +0.10]"


def test_a_p_value_that_the_bootstrap_cannot_tell_is_a_bound() -> None:
    """With 10,000 draws the smallest is 0.0002; times five comparisons it would be printed as `0.001`."""
    assert LEAST_P == 2 / (DRAWS + 1)
    assert (p_text(0.002), p_text(0.002, is_bound=True), p_text(LEAST_P, is_bound=True)) == (
        "0.002",
        "≤ 0.002",
        "< 0.001",
    )
    right, wrong = np.ones(200), np.zeros(200)
    records = [record("base", None, result("A", wrong.tolist()))]
    records += [record(f"good {i}", None, result("A", right.tolist())) for i in range(4)]
    even = wrong.copy()
    even[0] = 1
    records.append(record("even", None, result("A", even.tolist())))
    names = ["base", *(f"good {i}" for i in range(4)), "even"]
    spec = TableSpec("main", "Main", tuple((name, name) for name in names), base="base")
    (table,) = build_tables(records, [spec], columns=["A"])
    bounds = {row.run: row.p_is_bound for row in table.rows}
    assert bounds == {"base": False, **{f"good {i}": True for i in range(4)}, "even": False}
