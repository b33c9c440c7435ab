"""Prompt sharing: a step that computes the prompt of a pair once, compared with computing it for each response."""

from benchmarks.figures import Bar, bars
from benchmarks.inputs import Shape, as_json
from benchmarks.measuring import Side, alternate, arguments, ratios
from benchmarks.report import Claim, Result, Table, spread, write

SHARES = (0.0, 0.25, 0.5, 0.75)
GPU_SHARES = (0.0, 0.75)
BODY = Shape(batch=4, vocab=2048, heads=8)  # a small head, so that the decoder body dominates the step time
HEAVY = Shape(batch=2, hidden=512, layers=8, heads=8, vocab=8192)
GPU_BODY = Shape(hidden=1024, layers=8, heads=16, vocab=8192, seq_len=1024)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
QUICK = Shape(batch=2, hidden=32, layers=2, heads=2, vocab=64, words=50, seq_len=32)


def bound(share: float) -> float:
    """Target of the body's time if ``share`` of a sequence is prompt: 10 % above the share of tokens that remain."""
    return 1.1 * (1 - share / 2)


def with_prompt(shape: Shape, share: float) -> Shape:
    """The shape with this share of prompt; at least one token, which predicts the first response token."""
    return Shape(**{**as_json(shape), "prompt_len": max(1, round(share * shape.seq_len))})


def main() -> None:
    """Measure on and off for each share of prompt, and write the result."""
    args = arguments(__doc__, rounds=2, steps=4).parse_args()
    is_gpu = args.device == "cuda"
    body, heavy = (QUICK, QUICK) if args.quick else (GPU_BODY, GPU_BODY) if is_gpu else (BODY, HEAVY)
    cases = [
        (f"body, prompt {share:.0%}", with_prompt(body, share), None if is_gpu else bound(share))
        for share in (GPU_SHARES if is_gpu else SHARES)
    ]
    if not is_gpu:
        cases.append(("body-heavy model, prompt 75%: whole step", with_prompt(heavy, 0.75), 0.75))
    claims, rows, measured = [], [], {}
    for name, shape, target in cases:
        base = {"folder": None, "shape": as_json(shape), "steps": args.steps, "method": "dpo", "checkpointing": False}
        sides = [
            Side(f"{name}, {word}", "benchmarks.ours", {**base, "share": on})
            for word, on in (("on", True), ("off", False))
        ]
        found = alternate(sides, args)
        on, off = (side.name for side in sides)
        compared = slice(
            1 if args.dtype == "bfloat16" else None
        )  # each step amplifies the rounding of the ones before it
        check_equal(*(found[side][0]["losses"][compared] for side in (on, off)), bound=TOLERANCE[args.dtype])
        claims.append(
            Claim(f"{name}: time shared / not shared", "at most", target, ratios(found, "step_s", of=on, to=off))
        )
        rows += [
            [
                side,
                spread([r["step_s"] for r in found[side]]),
                round(found[side][0]["extra_mib"]),
                max(r["other_cpu"] for r in found[side]),
            ]
            for side in (on, off)
        ]
        measured |= found
    figure = bars(
        [Bar(c.text.removesuffix(": time shared / not shared"), c.values, c.target) for c in claims],
        title="Time with shared prompts / without (mark: target)",
        unit="ratio, less is better",
    )
    text = (
        f"DPO, stored reference; sequences of {body.seq_len} tokens of which the prompt is a share f. Both ways must show the "
        f"same losses. Body: hidden {body.hidden}, {body.layers} layers, vocabulary {body.vocab}, so that the head hardly counts"
        + ("." if is_gpu else f"; body-heavy: hidden {heavy.hidden}, {heavy.layers} layers, vocabulary {heavy.vocab}.")
    )
    table = Table("Steps", ("Case", "s/step", "MiB beyond state", "load of others"), rows)
    write(
        Result(
            name="sharing",
            title="Prompts computed once",
            text=[text],
            claims=claims,
            tables=[table],
            measurements=measured,
            figures={"sharing.svg": figure},
        ),
        args,
    )


def check_equal(shared: list[float], separate: list[float], *, bound: float) -> None:
    """Raise an error if the losses of both ways differ.

    Raises:
        RuntimeError: the losses differ by more than ``bound``.
    """
    if max(abs(a - b) for a, b in zip(shared, separate, strict=True)) > bound:
        raise RuntimeError(f"losses with shared prompts {shared}, without {separate}")


if __name__ == "__main__":
    main()
