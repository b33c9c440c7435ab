"""Time of `ctpd run testbed-demo` by stage, from the manifests of the stages.

Without `--store` the recipe is run in a new store first. Passes of a frozen model over the pairs are counted from the
plan: each model must have one scoring pass over the same pairs.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import Bar, bars
from benchmarks.measuring import ROOT, arguments, child_environment
from benchmarks.report import Claim, Result, Table, write

SCORING = ("signals", "distributions")  # stages that make a scoring pass of a frozen model over the pairs


def stage_seconds(manifests: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each stage's building, by kind of stage."""
    found: dict[str, list[float]] = defaultdict(list)
    for manifest in manifests:
        found[manifest["stage"]].append(float(manifest["provenance"]["seconds"]))
    return dict(found)


def passes(stages: Iterable[Any]) -> dict[str, int]:
    """Number of scoring passes of each frozen model over the same pairs; the key names the model's stage or external source."""
    counted: Counter[tuple[str, str]] = Counter()
    labels: dict[tuple[str, str], str] = {}
    for stage in stages:
        if stage.kind in SCORING:
            model = stage.inputs.get("model")
            key = (
                model.key if model is not None else json.dumps(stage.external, sort_keys=True, default=str),
                stage.inputs["pairs"].key,
            )
            counted[key] += 1
            labels.setdefault(key, stage.label)
    return {f"{labels[key]} ({key[0][:6]})": number for key, number in counted.items()}


def main() -> None:
    """Run the recipe where no store is given, read its manifests, and write the result."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--recipe", default="testbed-demo", help="(%(default)s)")
    parser.add_argument("--store", type=Path, help="a store with the finished run; nothing is run then")
    args = parser.parse_args()
    recipe = "testbed-smoke" if args.quick else args.recipe
    import ctpd

    plan = ctpd.plan(recipe)
    totals, rounds = [], []
    for _ in range(1 if args.store else args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            store = args.store if args.store else Path(folder)
            total = None if args.store else _run(recipe, store, threads=args.threads)
            rounds.append(stage_seconds(_manifests(store, plan.stages)))
        totals.append(total if total is not None else sum(map(sum, rounds[-1].values())))
    counted = passes(plan.stages)
    claims = [
        Claim(
            f"ctpd run {recipe}: seconds {'of its stages' if args.store else 'in all'}",
            "at most",
            None if args.store else 300.0,
            totals,
            unit="s",
        ),
        Claim("passes of a frozen model over the same pairs, the most", "at most", 1.0, [float(max(counted.values()))]),
    ]
    sums = {kind: [sum(found[kind]) for found in rounds] for kind in rounds[0]}
    order = sorted(sums, key=lambda kind: -max(sums[kind]))
    rows = [
        [kind, len(rounds[0][kind]), sums[kind][0], f"{100 * sums[kind][0] / totals[0]:.1f} %", max(rounds[0][kind])]
        for kind in order
    ]
    rows.append(["start, planning, between stages", "", totals[0] - sum(v[0] for v in sums.values()), "", ""])
    figure = bars(
        [Bar(f"{kind} ({len(rounds[0][kind])})", sums[kind]) for kind in order],
        title=f"ctpd run {recipe}: seconds by kind of stage",
        unit="seconds",
    )
    write(
        Result(
            name="pipeline",
            title=f"Where `ctpd run {recipe}` spends its time",
            text=[
                "Seconds of each stage from its manifest; with `--store` the total is their sum, else the command's wall time."
            ],
            claims=claims,
            measurements={"totals": totals, "stages": rounds, "passes": counted},
            tables=[
                Table("Stages by kind", ("Kind", "stages", "s", "of the total", "longest, s"), rows),
                Table(
                    "Passes of frozen models over the pairs", ("Model", "passes"), [[k, n] for k, n in counted.items()]
                ),
            ],
            figures={"pipeline.svg": figure},
        ),
        args,
    )


def _run(recipe: str, store: Path, *, threads: int) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "ctpd", "run", recipe, "--store", str(store), "--quiet"]
    done = subprocess.run(
        command, env=child_environment(threads), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"ctpd run {recipe} failed ({done.returncode})\n{done.stderr[-4000:]}")
    return time.perf_counter() - start


def _manifests(store: Path, stages: Iterable[Any]) -> list[dict[str, Any]]:
    """The manifests of the planned stages; other artifacts in the store are ignored."""
    paths = [store / stage.kind / stage.key / "manifest.json" for stage in stages]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(paths)} stages are not in the store: finish the run first")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


if __name__ == "__main__":
    main()
