"""Compare keys and defaults with the recorded ones, so that changes are seen in review; a changed default needs a new version."""

import json
from importlib import metadata
from typing import Any

import pytest

from tests.regression import identities

HOW = "if it is meant, say so under Numerics in CHANGELOG and run `python -m tests.regression.identities`"


def recorded(path: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_keys_of_the_smallest_recipe_are_the_recorded_ones() -> None:
    found = recorded(identities.KEYS)
    if found["lm_eval"] != metadata.version("lm_eval"):
        pytest.skip(reason="keys of evaluations hold the version of lm-eval, and this one is not the recorded one")
    assert identities.keys() == found["keys"], HOW


def test_a_default_that_changes_raises_the_version_of_the_stages_that_read_it() -> None:
    """Keys leave defaults out, so with a changed default an old artifact would be reused wrongly."""
    before, now = recorded(identities.DEFAULTS), identities.defaults()
    for kind in before.keys() & now.keys():
        if before[kind]["version"] == now[kind]["version"]:
            shared = before[kind]["defaults"].keys() & now[kind]["defaults"].keys()
            changed = {name for name in shared if before[kind]["defaults"][name] != now[kind]["defaults"][name]}
            assert not changed, f"raise the version of the stage '{kind}': a default of it has changed"
    assert now == before, HOW


def test_every_stage_is_in_the_list() -> None:
    kinds = {
        "world",
        "tokenizer",
        "pretrain",
        "pairs",
        "generate",
        "signals",
        "distributions",
        "weights",
        "train",
        "evaluate",
        "choice",
        "record",
    }
    assert identities.defaults().keys() == kinds
    assert any(name.endswith(".mu") for name in identities.defaults()["weights"]["defaults"])
