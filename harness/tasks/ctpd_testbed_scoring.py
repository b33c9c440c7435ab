"""What the testbed's tasks compute from their documents; lm-eval imports it beside the YAML files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Document = Mapping[str, Any]


def true_mass(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The probability of the true choices, over that of all choices (mc2)."""
    logps = np.array([logp for logp, _ in results])
    masses = np.exp(logps - logps.max())
    return {"acc": float(masses[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / masses.sum())}


def right_option(doc: Document) -> int:
    """The index of the noun that belongs in the blank."""
    return int(doc["answer"]) - 1


def filled_beginnings(doc: Document) -> list[str]:
    """The prompt and the sentence up to the blank, with either noun in it."""
    before = f"{doc['question']}\n{doc['sentence'].partition('_')[0]}"
    return [before + doc[option] for option in ("option1", "option2")]


def rest_of_sentence(doc: Document) -> str:
    """What follows the blank."""
    return str(doc["sentence"].partition("_")[2]).strip()
