"""One training step: DPO and CTPD of this project compared with TRL's DPOTrainer, on the same model, rows and order.

Our side stores the reference first (`ctpd` does so once for all runs); TRL computes it in every step (its default), or
first as well (`precompute_ref_log_probs`). Both sides must have the same losses, or nothing is written.
"""

import argparse
import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Bar, bars
from benchmarks.inputs import LARGE, Shape, as_json, make_inputs
from benchmarks.measuring import Found, Side, alternate, arguments, median_of, ratios
from benchmarks.report import Claim, Result, Table, environment, spread, write

EXPECTED = (0.693147, 0.704426, 0.723767, 0.715635, 0.826981)
"""Losses of the default shape with TRL 1.16."""
EXACT = {1: 0.7044421}
"""The same loss by step (from 0) in float64 throughout."""
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2}
"""Largest difference between the sides; in bfloat16 of the first step alone, for each step amplifies the rounding of the
ones before it. TRL subtracts sums of 384 log-probabilities, of magnitude 4535, where float32 has
a spacing of 5e-4; ours subtracts token by token. Therefore the second loss of TRL is 1.6e-5 from `EXACT`, ours 5e-7."""
TOLERANCE_OF_SAME, TOLERANCE_OF_EXACT = 1e-5, 5e-6
DPO, CTPD, SFT, SMALL = "ctpd: DPO", "ctpd: CTPD", "ctpd: SFT", "ctpd: DPO, one pair at a time"
TRL, PRECOMPUTED = "TRL: DPO", "TRL: DPO, precomputed"
TIME, MEMORY = "step_s", "extra_mib"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A shape and a setting, with its targets.

    Attributes:
        rounds, steps: None for the numbers of the command line; scenarios of less interest run fewer.
        bounds: targets of time relative to TRL with precomputed reference, of time relative to TRL's default, and of memory
            relative to both (None: not reported); None without targets.
    """

    title: str
    shape: Shape
    checkpointing: bool = True
    lora: bool = False
    rounds: int | None = 1
    steps: int | None = 2
    extra: tuple[str, ...] = ()
    bounds: tuple[float, float, float | None] | None = (0.45, 0.35, 0.3)


SCENARIOS = {
    "default": Scenario(title="default shape", shape=Shape(), rounds=None, steps=None, extra=(SFT,)),
    "no-checkpointing": Scenario(title="no checkpointing", shape=Shape(), checkpointing=False, extra=(SMALL,)),
    "ragged": Scenario(title="ragged completions", shape=Shape(ragged=True)),
    "frozen-head": Scenario(title="LoRA, frozen head", shape=Shape(), lora=True, bounds=(0.25, 0.25, 0.3)),
    "wide": Scenario(
        title="wider student",
        shape=Shape(hidden=1024, layers=8, heads=16, vocab=32000, batch=2, seq_len=256, prompt_len=64),
        rounds=2,
        bounds=(0.9, 0.7, None),
    ),
}
GPU_SCENARIOS = {
    "large": Scenario(title="1.6 billion parameters", shape=LARGE, steps=None, bounds=None),
    "large-lora": Scenario(title="1.6 billion parameters, LoRA", shape=LARGE, lora=True, bounds=None),
    "default": Scenario(title="default shape", shape=Shape(), bounds=None),
}
"""Measured with ``--device cuda``, where a step of the small shapes is bound by the launches of kernels."""
QUICK = Shape(hidden=32, layers=2, heads=2, vocab=64, words=50, seq_len=32, prompt_len=8)


def sides_of(scenario: Scenario, *, folder: Path, steps: int, share: bool | None) -> list[Side]:
    """The sides of a scenario. Our DPO takes all steps of `EXPECTED` where the scenario has its shape."""
    base = {
        "folder": str(folder),
        "shape": as_json(scenario.shape),
        "checkpointing": scenario.checkpointing,
        "lora": scenario.lora,
        "steps": steps,
    }
    ours = base | {"share": share}
    all_steps = {"steps": max(steps, len(EXPECTED))} if scenario.steps is None else {}
    known = {
        DPO: Side(DPO, "benchmarks.ours", ours | all_steps | {"method": "dpo"}),
        CTPD: Side(CTPD, "benchmarks.ours", ours | {"method": "ctpd"}),
        SFT: Side(SFT, "benchmarks.ours", ours | {"method": "sft"}),
        SMALL: Side(SMALL, "benchmarks.ours", ours | {"method": "dpo", "micro_batch": 1}),
        TRL: Side(TRL, "benchmarks.peer_trl", base | {"precompute": False}),
        PRECOMPUTED: Side(PRECOMPUTED, "benchmarks.peer_trl", base | {"precompute": True}),
    }
    return [known[name] for name in (DPO, TRL, CTPD, PRECOMPUTED, *scenario.extra)]


def check_losses(found: Found, *, dtype: str, expected: tuple[float, ...] | None) -> None:
    """Raise an error if the compared trainings differ.

    Raises:
        RuntimeError: a DPO loss differs from the other side's, or from what is expected.
    """
    curves = {name: reported[0]["losses"] for name, reported in found.items() if name in (DPO, SMALL, TRL, PRECOMPUTED)}
    target = list(expected) if expected is not None else curves[TRL]
    if dtype == "bfloat16":
        target = target[:1]
    for name, losses in curves.items():
        bound = TOLERANCE_OF_SAME if expected is not None and name in (TRL, PRECOMPUTED) else TOLERANCE[dtype]
        _check_curve(name, losses, dict(enumerate(target)), bound=bound)
    if expected is not None:
        _check_curve(DPO, curves[DPO], EXACT, bound=TOLERANCE_OF_EXACT)


def _check_curve(name: str, losses: list[float], wanted: dict[int, float], *, bound: float) -> None:
    for step, loss in enumerate(losses):
        if step in wanted and not math.isclose(loss, wanted[step], rel_tol=0.0, abs_tol=bound):
            raise RuntimeError(f"{name}: loss {loss:.6f} at step {step + 1}, where {wanted[step]:.6f} is expected")


def claims_of(scenario: Scenario, found: Found) -> list[Claim]:
    """The ratios of a scenario with their targets."""
    precomputed, shipped, memory = scenario.bounds or (None, None, None)
    claims = []
    for ours in (DPO, CTPD):
        method = ours.removeprefix("ctpd: ")
        for peer, bound, kind, key in (
            (PRECOMPUTED, precomputed, "time", TIME), (TRL, shipped, "time", TIME),
            (PRECOMPUTED, memory, "memory", MEMORY), (TRL, memory, "memory", MEMORY),
        ):  # fmt: skip
            if bound is not None or scenario.bounds is None:
                of_peer = f"TRL's{' precomputed' if peer == PRECOMPUTED else ''} DPO"
                text = f"{scenario.title}: {method} {kind} / {of_peer} {kind}"
                claims.append(Claim(text, "at most", bound, ratios(found, key, of=ours, to=peer)))
    return claims


def table_of(scenario: Scenario, found: Found) -> Table:
    """Time and memory of each side of a scenario."""
    header = (
        "Side",
        "s/step",
        "CPU s/step",
        "tokens/s",
        "MiB beyond state",
        "peak MiB",
        "reference s",
        "load of others",
    )
    rows = [
        [
            name,
            spread([r[TIME] for r in reported]),
            spread([r["cpu_s"] for r in reported]),
            f"{median_of(found, name, 'tokens_per_s'):.0f}",
            f"{median_of(found, name, MEMORY):.0f}",
            f"{median_of(found, name, 'peak_mib'):.0f}",
            f"{median_of(found, name, 'reference_s'):.3g}",
            f"{max(r['other_cpu'] for r in reported):.2f}",
        ]
        for name, reported in found.items()
    ]
    shape = scenario.shape
    about = f"hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocab}; {shape.batch} pairs of up to {shape.seq_len} tokens, prompt {shape.prompt_len}"
    checkpointing = "with" if scenario.checkpointing else "without"
    return Table(f"{scenario.title} ({about}; {checkpointing} activation checkpointing on both sides)", header, rows)


def main() -> None:
    """Measure the scenarios asked for, and write the result."""
    parser = arguments(__doc__, rounds=3, steps=3)
    parser.add_argument(
        "--only", help=f"comma list out of: {','.join(SCENARIOS)}; on a GPU {','.join(GPU_SCENARIOS)} (all)"
    )
    parser.add_argument("--ragged", action="store_true", help="the same as --only ragged")
    parser.add_argument("--share", choices=("auto", "on", "off"), default="auto", help="prompts, on our side")
    parser.add_argument("--keep", action="store_true", help="leave other scenarios as an earlier run measured them")
    args = parser.parse_args()
    scenarios = scenarios_of(args.device)
    names = _requested(args)
    kept = _earlier(args) if args.keep else {}
    claims, tables, measurements = [], [], {}
    with tempfile.TemporaryDirectory() as inputs:
        for name in (name for name in scenarios if name in {*names, *kept}):
            scenario, found = run_scenario(name, args, Path(inputs)) if name in names else (scenarios[name], kept[name])
            measurements[name] = found
            claims += claims_of(scenario, found)
            tables.append(table_of(scenario, found))
    times = [
        Bar(claim.text.replace(" time", ""), claim.values, claim.target, 0) for claim in claims if "time" in claim.text
    ]
    memory = [Bar(c.text.replace(" memory", ""), c.values, c.target, 2) for c in claims if "memory" in c.text]
    figures = {
        "time.svg": bars(times, title="Time of a step, ours / TRL's (mark: target)", unit="ratio, less is better")
    }
    if memory:
        figures["memory.svg"] = bars(memory, title="Memory beyond the state, ours / TRL's (mark: target)", unit="ratio")
    earlier = f"Kept from an earlier run of the same command without `--only`: {', '.join(kept)}." if kept else ""
    write(
        Result(
            name="step",
            title="A training step beside TRL's DPOTrainer",
            text=[*TEXTS[args.device], *([earlier] if earlier else [])],
            claims=claims,
            tables=tables,
            measurements=measurements,
            figures=figures,
        ),
        args,
    )


def scenarios_of(device: str) -> dict[str, Scenario]:
    """The scenarios that are measured on this device."""
    return SCENARIOS if device == "cpu" else GPU_SCENARIOS


def _requested(args: argparse.Namespace) -> list[str]:
    if args.ragged:
        return ["ragged"]
    return args.only.split(",") if args.only else list(scenarios_of(args.device))


def _earlier(args: argparse.Namespace) -> dict[str, Found]:
    """The measurements of an earlier run for the scenarios that are not requested now.

    Raises:
        RuntimeError: there is none, or it ran on another machine or with other packages.
    """
    folder = "step" if args.device == "cpu" else f"step-{args.device}"
    path = args.to / folder / f"{folder}.json"
    if not path.exists():
        raise RuntimeError(f"{path} does not exist: there is nothing to keep")
    record = json.loads(path.read_text(encoding="utf-8"))
    here, there = environment(args), record["environment"]
    changed = [key for key in here if key != "date" and here[key] != there.get(key)]
    if changed:
        raise RuntimeError(f"the earlier run differs in {', '.join(changed)}: measure everything again")
    names = _requested(args)
    return {name: found for name, found in record["measurements"].items() if name not in names}


_ONE_STEP = (
    "A step's time runs from the end of a step to the end of the next: "
    "batch, forward, backward, clipping, optimizer and logging. *Beyond state* is the peak {memory} of the training "
    "loop without the weights, and for trained weights the gradients and AdamW's two moments; a reference model "
    "is beyond the state, for our side needs none. The reference's own time is in the table, not in the step."
)
_INVENTED = (
    "CTPD's spans (1 to 3 tokens), weights and teacher reference are invented with a seed: what they are does not change what "
    "they cost. One step is one micro-batch on both sides, where the table does not say otherwise."
)
_ONE_ROUND = (
    "A scenario of one round has no spread. The column *load of others* says how many cores other programs kept busy."
)
TEXTS = {
    "cpu": (
        "Both sides train the same seeded model on the same rows in the same order (AdamW, constant learning rate), and show the "
        "same DPO losses to 3e-5, which is the rounding of float32 sums, and ours the float64 loss to 5e-6; the benchmark fails "
        f"otherwise. {_ONE_STEP.format(memory='resident memory, without the imports,')}",
        _INVENTED,
        "TRL's fast path on GPUs (Triton) does not run on a CPU: on CPUs its head projects prompt and padding too and falls back "
        "to plain torch.",
        _ONE_ROUND,
    ),
    "cuda": (
        "Both sides train the same seeded model on the same rows in the same order (AdamW, constant learning rate), with weights "
        "in float32; in bfloat16 that is autocast on both sides, and the first DPO loss must be the same to 2e-2: later ones differ, for "
        f"each step amplifies the rounding of those before it. {_ONE_STEP.format(memory='memory that torch has allocated,')}",
        _INVENTED,
        _ONE_ROUND,
    ),
}


def run_scenario(name: str, args: argparse.Namespace, inputs: Path) -> tuple[Scenario, Found]:
    """Run all rounds of one scenario and check the losses; ``inputs`` keeps the model of the last shape."""
    scenario = scenarios_of(args.device)[name]
    is_default = scenario.shape == Shape() and not scenario.lora and args.dtype == "float32" and not args.quick
    if args.quick:
        quick = Shape(**{**as_json(QUICK), "ragged": scenario.shape.ragged})
        scenario = Scenario(**{**vars(scenario), "shape": quick, "rounds": None, "extra": ()})
    print(f"step: {scenario.title}", flush=True)
    share = {"auto": None, "on": True, "off": False}[args.share]
    made = inputs / hashlib.sha256(json.dumps(as_json(scenario.shape)).encode()).hexdigest()[:8]
    if not made.exists():
        shutil.rmtree(inputs)
        made.mkdir(parents=True)
        make_inputs(scenario.shape, scenario.shape.batch * max(args.steps, len(EXPECTED)), made)
    sides = sides_of(scenario, folder=made, steps=min(scenario.steps or args.steps, args.steps), share=share)
    rounds = args.rounds if scenario.rounds is None else min(scenario.rounds, args.rounds)
    found = alternate(sides, args, rounds=rounds)
    check_losses(found, dtype=args.dtype, expected=EXPECTED if is_default else None)
    return scenario, found


if __name__ == "__main__":
    main()
