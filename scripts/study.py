"""The mechanisms of CTPD on the testbed, one study each: recipes that change one thing of `testbed`, and one table of them all.

    python scripts/study.py spans --store runs --to results/study

Needs the main study first (`ctpd run testbed --store runs`): each run has the values that it chose there. A study writes
`NAME/*.yaml`, the recipes, runs them with `ctpd run` (what the store has is not computed again), and writes `NAME.md` and
`NAME.csv`: one line for each condition and method, with the intervals of `docs/statistics.md`.
"""

import argparse
import copy
import csv
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ctpd.core.store import Store
from ctpd.recipe import shipped_recipes
from harness.record import Record

MAIN = "testbed"
SEEDS = [0, 1, 2]
STUDENT = {"tokenizer": "unigram", "vocab_size": 260, "tokenizer_corpus": "student"}
PREFERENCE = ("DPO", "CTPD")

TOKENS, SAME = "teacher's tokens / student's", "spans 1:1"

Changes = Mapping[str, Any]
"""Dotted keys of a recipe, and their values."""


class Condition(NamedTuple):
    """One recipe of a study: what it changes, and rows beside those of the study, by name: a run of `testbed` and its `params`."""

    changes: Changes
    rows: Mapping[str, tuple[str, Changes]] = {}


class Study(NamedTuple):
    """Conditions by name, and the runs of `testbed` that each trains; whether its table says how the tokenizers differ."""

    caption: str
    runs: tuple[str, ...]
    conditions: Mapping[str, Condition]
    shows_mismatch: bool = False


def _teacher(**values: Any) -> Condition:
    return Condition({f"shared.teacher.pretrain.{name}": value for name, value in values.items()})


NOISE_ROWS: dict[str, tuple[str, Changes]] = {
    "CTPD, weights of mean 1": ("CTPD", {"mean_one": True}),
    "CTPD, uniform": ("CTPD", {"weights": "uniform"}),
    "CTPD, oracle": ("CTPD", {"weights": "oracle"}),
    "CTPD, mu 1": ("CTPD", {"mu": 1.0}),  # the chosen one is 2
    "CTPD, L 0": ("CTPD", {"lower": 0.0}),
    "CTPD, U 0.5": ("CTPD", {"upper": 0.5}),
}
BETAS: dict[str, tuple[str, Changes]] = {f"CTPD, beta {beta:g}": ("CTPD", {"beta": beta}) for beta in (0.01, 0.1, 1.0)}

STRATEGIES = ("teacher", "average", "uniform", "lite", "teacher_student", "student", "positive_only", "oracle")
RATES = (1e-4, 3e-4)  # below the one that was chosen for the weights as they are


def _row(name: str, ending: str = "", **changes: Any) -> tuple[str, tuple[str, Changes]]:
    return f"CTPD, {name.replace('_', '-')}{ending}", ("CTPD", {"weights": name, **changes})


WEIGHT_ROWS: dict[str, tuple[str, Changes]] = dict(
    [
        *(_row(name) for name in STRATEGIES if name != "teacher"),  # CTPD itself
        *(
            _row(name, ", mean 1", mean_one=True) for name in STRATEGIES if name not in ("uniform", "average")
        ),  # as uniform
        *(
            _row(name, f", mean 1, rate {rate:g}", mean_one=True, learning_rate=rate)
            for name in ("teacher", "uniform", "oracle", "positive_only")
            for rate in RATES
        ),
    ]
)

STUDIES = {
    "weights": Study(
        "Importance weights as they are, and divided by their mean over each response",
        PREFERENCE,
        {"as in the main study": Condition({}, WEIGHT_ROWS)},
    ),
    "spans": Study(
        "Tokenizers of the teacher that cut the text in other ways than the student's (Unigram, 260 pieces)",
        ("CTPD", "ALM", "ULD"),
        {
            "same tokenizer": _teacher(**STUDENT),
            "Unigram, 400": _teacher(tokenizer="unigram", vocab_size=400),
            "byte-level BPE, 300": _teacher(vocab_size=300),
            "byte-level BPE, 512": Condition({}),
            "byte-level BPE, 1000": _teacher(vocab_size=1000),
            "WordPiece, 300": _teacher(tokenizer="wordpiece", vocab_size=300),
            "characters": _teacher(tokenizer="characters", vocab_size=100),
        },
        shows_mismatch=True,
    ),
    "noise": Study(
        "Pairs with exchanged responses",
        PREFERENCE,
        {
            f"{share:.0%} swapped": Condition({"shared.testbed.swapped": share}, NOISE_ROWS)
            for share in (0.0, 0.1, 0.2, 0.3, 0.4)
        },
    ),
    "reference": Study(
        "Teachers of growing quality, and one that was trained on reversed preferences",
        ("CTPD", "CTPD, student reference"),
        {
            **{
                f"{steps} steps": Condition({"shared.teacher.pretrain.steps": steps}, BETAS)
                for steps in (100, 200, 400, 800)
            },
            "reversed": Condition({"shared.teacher.reversed": True}, BETAS),
        },
    ),
    "domain": Study(
        "Pairs of one skill, and what the other skills do",
        (*PREFERENCE, "Sequence KD", "ALM"),
        {
            skill: Condition({"shared.testbed.pair_skills": [skill]})
            for skill in ("arithmetic", "steps", "facts", "resolution")
        },
    ),
}


def recipe_of(study: Study, name: str, condition: Condition, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a condition: `testbed` with its changes, its rows, and no search."""
    recipe: dict[str, Any] = yaml.safe_load(shipped_recipes()[MAIN].read_text(encoding="utf-8"))
    main_runs = recipe["runs"]
    del recipe["tune"], recipe["ablations"]
    recipe["about"] = f"{study.caption}: {name}."
    recipe["shared"]["seeds"] = SEEDS
    recipe["runs"] = {run: {**main_runs[run], "tuned": dict(tuned[run])} for run in study.runs}
    for row, (run, params) in condition.rows.items():
        fixed = dict(params)
        values = {key: fixed.pop(key, value) for key, value in tuned[run].items()}
        spec = copy.deepcopy(main_runs[run])
        recipe["runs"][row] = {**spec, "params": {**spec.get("params", {}), **fixed}, "tuned": values}
    rows = ["Teacher", "Student", *recipe["runs"]]
    recipe["tables"] = {"main": {"caption": f"{study.caption}: {name}", "rows": rows, "base": "Student"}}
    for key, value in condition.changes.items():
        *blocks, last = key.split(".")
        block = recipe
        for part in blocks:
            block = block[part]
        block[last] = value
    return recipe


def chosen(store: Path) -> dict[str, dict[str, Any]]:
    """The values that the main study chose for each of its runs."""
    found: dict[str, dict[str, Any]] = {}
    opened = Store(store)
    for artifact in opened.artifacts("record"):
        record = Record.read(opened.open("record", artifact.key) / "record.json")
        if record.recipe == MAIN and record.method is not None and record.tuning is not None:
            found[record.run] = dict(record.method.tuned)
    if not found:
        raise SystemExit(f"{store} has no record of `{MAIN}`: run `ctpd run {MAIN} --store {store}` first")
    return found


def mismatch(store: Path, recipe: str) -> dict[str, str]:
    """How the tokenizers of a recipe cut the responses: tokens of the teacher for one of the student, and spans of one token each."""
    opened = Store(store)
    for artifact in opened.artifacts("record"):
        record = Record.read(opened.open("record", artifact.key) / "record.json")
        if record.recipe == recipe and record.data is not None:
            counts = record.data.counts
            tokens = counts["teacher_response_tokens"] / counts["student_response_tokens"]
            return {TOKENS: f"{tokens:.2f}", SAME: f"{counts['spans_1_1'] / counts['spans']:.0%}"}
    raise SystemExit(f"{store} has no record of a training of `{recipe}`")


def lines_of(folder: Path, condition: str) -> Iterator[dict[str, str]]:
    """The rows of a condition's table."""
    with (folder / "main.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {"condition": condition, **row}


def write(study: Study, rows: list[dict[str, str]], stem: Path) -> None:
    """The joined table as CSV and Markdown."""
    scores = [name for name in rows[0] if f"{name} std" in rows[0]]
    cut = [TOKENS, SAME] if study.shows_mismatch else []
    kept = ["condition", *cut, "row", "seeds", *(f"{name}{end}" for name in scores for end in ("", " std"))]
    kept += ["difference", "difference low", "difference high", "marks", "unhealthy"]
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    header = ["condition", *cut, "row", *scores, "Average vs. Student [95 %]"]
    lines = [f"{study.caption}. Seeds {SEEDS}; differences over seeds and documents.", ""]
    lines += [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * len(cut)} --- |{' ---: |' * (len(scores) + 1)}"]
    for row in rows:
        cells = [
            row["condition"],
            *(row[name] for name in cut),
            " ".join((row["row"], row["marks"])).strip(),
            *(_score(row, name) for name in scores),
            _difference(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    stem.with_suffix(".md").write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")


def _score(row: Mapping[str, str], name: str) -> str:
    if not row[name]:
        return "–"
    std = row[f"{name} std"]
    return f"{float(row[name]):.1f}" + (f" ± {float(std):.1f}" if std else "")


def _difference(row: Mapping[str, str]) -> str:
    if not row["difference"]:
        return "–"
    value, low, high = (float(row[f"difference{end}"]) for end in ("", " low", " high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    """Run one study and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--to", type=Path, default=Path("results/study"))
    parser.add_argument("--jobs", default="1")
    args = parser.parse_args()
    study, tuned = STUDIES[args.study], chosen(args.store)
    folder = args.to / args.study
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for number, (name, condition) in enumerate(study.conditions.items()):
        recipe = {**recipe_of(study, name, condition, tuned), "name": f"{args.study}-{number}"}
        path = folder / f"{recipe['name']}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8", newline="\n")
        command = [sys.executable, "-m", "ctpd", "run", str(path), "--store", str(args.store), "--jobs", args.jobs]
        subprocess.run(command, check=True)
        extra = mismatch(args.store, str(recipe["name"])) if study.shows_mismatch else {}
        rows += ({**row, **extra} for row in lines_of(args.store / "tables" / str(recipe["name"]), name))
        write(study, rows, args.to / args.study)


if __name__ == "__main__":
    main()
