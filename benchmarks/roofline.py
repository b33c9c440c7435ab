"""Compare a training step with its matrix products alone: the share of the time that is unavoidable.

The products of one DPO step (forward, backward, and those that the head recomputes) are timed with their shapes in the
same process, before and after the steps. The rest of the step is softmax, norms, the optimizer and the loop.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Bar, bars
from benchmarks.inputs import LARGE, Shape, as_json, token_pairs
from benchmarks.measuring import Side, alternate, arguments, either, median_of, run_child
from benchmarks.report import Claim, Result, Table, spread, write

SHAPES = {
    "hidden 256, 4 layers, vocabulary 128256": (Shape(batch=2), 1.5),
    "hidden 512, 8 layers, vocabulary 32000": (Shape(batch=2, hidden=512, layers=8, heads=8, vocab=32000), 1.3),
}
GPU_SHAPES = {"hidden 2048, 16 layers, vocabulary 128256": (LARGE, None)}
QUICK = Shape(batch=2, hidden=32, layers=2, heads=2, vocab=512, words=50, seq_len=32, prompt_len=8)


@dataclass(frozen=True)
class Product:
    """``count`` products [m, k] x [k, n], each over a batch of ``batch``; ``share`` of one is needed (half with a causal mask).

    ``layout`` names the transposed operand, as the step has it: "nt" ``a @ b.T``, "nn" ``a @ b``, "tn" ``a.T @ b``.
    """

    name: str
    m: int
    k: int
    n: int
    count: float
    layout: str = "nn"
    batch: int = 1
    share: float = 1.0

    @property
    def flops(self) -> float:
        """Floating-point operations of all ``count`` products."""
        return 2.0 * self.m * self.k * self.n * self.batch * self.count * self.share


def products(shape: Shape, *, sequences: int, length: int, scored: int, tile: tuple[int, int]) -> list[Product]:
    """The matrix products of one step without activation checkpointing and without prompt sharing.

    Args:
        sequences: rows of the batch, each padded to ``length``.
        scored: rows of the head.
        tile: rows and columns of a tile of the head.
    """
    tokens, hidden = sequences * length, shape.hidden
    found = []
    for name, rows_in, rows_out, number in (
        ("attention projections", hidden, hidden, 4), ("gate and up", hidden, 4 * hidden, 2), ("down", 4 * hidden, hidden, 1),
    ):  # fmt: skip
        count = number * shape.layers
        found += [
            Product(f"{name}: forward", tokens, rows_in, rows_out, count, "nt"),
            Product(f"{name}: input gradient", tokens, rows_out, rows_in, count, "nn"),
            Product(f"{name}: weight gradient", rows_out, tokens, rows_in, count, "tn"),
        ]
    size = hidden // shape.heads
    attention = {"batch": sequences * shape.heads, "share": 0.5}
    # Forward: scores and values; backward: the scores again, and two products for each of the two.
    found += [
        Product("attention scores", length, size, length, 4 * shape.layers, "nt", **attention),
        Product("attention values", length, length, size, 3 * shape.layers, "nn", **attention),
    ]
    rows, columns = tile
    tiles = scored * shape.vocab / (rows * columns)
    found += [
        Product("head: forward, and again backward", rows, hidden, columns, 2 * tiles, "nt"),
        Product("head: hidden gradient", rows, columns, hidden, tiles, "nn"),
        Product("head: weight gradient", columns, rows, hidden, tiles, "tn"),
    ]
    return found


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Time steps of the real trainer and their products alone; with `profile`, profile the steps instead."""
    import torch

    from benchmarks import ours

    torch.set_num_threads(config["threads"])
    shape = Shape(**config["shape"])
    if config.get("profile"):
        return _profile(config)
    pairs = token_pairs(shape, shape.batch)
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    tile = _tile(scored, shape.vocab, dtype=getattr(torch, config["dtype"]), device=config["device"])
    wanted = products(shape, sequences=2 * shape.batch, length=shape.seq_len, scored=scored, tile=tile)
    before = [_seconds(product, config) for product in wanted]
    step = ours.measure({**config, "method": "dpo", "share": False})
    after = [_seconds(product, config) for product in wanted]
    alone = {p.name: (b + a) / 2 for p, b, a in zip(wanted, before, after, strict=True)}
    total = sum(alone.values())
    return {
        "step_s": step["step_s"],
        "other_cpu": step["other_cpu"],
        "products_s": total,
        "ratio": step["step_s"] / total,
        "products": alone,
        "gflops": {p.name: p.flops / alone[p.name] / 1e9 for p in wanted},
    }


def _tile(rows: int, columns: int, *, dtype: Any, device: str) -> tuple[int, int]:
    """Rows and columns of the head's tiles, the last ones excepted."""
    import torch

    from ctpd.ops.tiles import NO_TRANSFORM, TiledHead

    nothing = torch.empty(0, dtype=dtype, device=device)
    first = next(TiledHead.of(nothing, nothing, NO_TRANSFORM, None).tiles(rows, columns))
    return first.rows.stop, first.columns.stop


def _seconds(product: Product, config: dict[str, Any]) -> float:
    """Seconds of all ``count`` products: the median of five timings of one, times ``count``."""
    import torch

    options = {"dtype": getattr(torch, config["dtype"]), "device": config["device"]}
    batch = (product.batch,) if product.batch > 1 else ()
    left_shape = (product.k, product.m) if product.layout == "tn" else (product.m, product.k)
    right_shape = (product.n, product.k) if product.layout == "nt" else (product.k, product.n)
    left, right = torch.randn(*batch, *left_shape, **options), torch.randn(*batch, *right_shape, **options)
    out = torch.empty(*batch, product.m, product.n, **options)
    left = left.mT if product.layout == "tn" else left
    right = right.mT if product.layout == "nt" else right
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.matmul(left, right, out=out)
        if config["device"] == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * product.count * product.share


def _profile(config: dict[str, Any]) -> dict[str, Any]:
    """Time by operation over a short training: of the GPU where there is one, else of the CPU."""
    import torch

    from benchmarks import ours

    shape = Shape(**config["shape"])
    model = ours.loaded_model(shape, config)
    rows = ours.rows_for(model, token_pairs(shape, 2 * shape.batch), {**config, "method": "dpo"})
    clock = ours.StepClock(config["device"])
    with tempfile.TemporaryDirectory() as folder, torch.profiler.profile() as profiler:
        ours.train(model, rows, shape, {**config, "method": "dpo"}, clock=clock, folder=Path(folder) / "state")
    on_cpu = config["device"] == "cpu"
    key = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    events = profiler.key_averages()
    if not on_cpu:  # an operation's time is that of its kernels, which have rows of their own
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    times = sorted(((event.key[:80], event.count, getattr(event, key)) for event in events), key=lambda row: -row[2])
    total = sum(microseconds for _, _, microseconds in times)
    return {"top": [[name, count, spent / 1e6, spent / total] for name, count, spent in times[:10]]}


def main() -> None:
    """Measure the shapes, and write the result."""
    args = arguments(__doc__, rounds=2, steps=4).parse_args()
    usual = SHAPES if args.device == "cpu" else GPU_SHAPES
    shapes = {"quick": (QUICK, 1.5)} if args.quick else usual
    claims, tables, figure, measured = [], [], [], {}
    for name, (shape, bound) in shapes.items():
        config = {"shape": as_json(shape), "steps": args.steps}
        found = alternate([Side(name, "benchmarks.roofline", config)], args)
        profile = run_child(Side(name, "benchmarks.roofline", {**config, "profile": True}), args)["top"]
        measured[name] = {"rounds": found[name], "profile": profile}
        claims.append(
            Claim(f"{name}: step / its matrix products alone", "at most", bound, [r["ratio"] for r in found[name]])
        )
        tables += [_products_table(name, found[name]), _profile_table(name, profile, args.device)]
        figure += [
            Bar(f"{name.split(', voc')[0]}: step", [r["step_s"] for r in found[name]]),
            Bar("its products alone", [r["products_s"] for r in found[name]], style=1),
        ]
        print(f"{name}: step {median_of(found, name, 'step_s'):.2f} s", flush=True)
    svg = bars(figure, title="A step, and its matrix products alone", unit="seconds")
    write(
        Result(
            name="roofline",
            title="A step against its matrix products",
            text=TEXT,
            claims=claims,
            tables=tables,
            measurements=measured,
            figures={"roofline.svg": svg},
        ),
        args,
    )


TEXT = (
    "The products are those of one DPO step without activation checkpointing: each linear layer forward and twice backward, "
    "attention (half of each product: causal), and the trained head four times (its tiles are computed again in the backward "
    "pass). They are timed at their shapes, operands in the layout that the step has, into a buffer that is there.",
    "The profile is of a separate training of two steps, so the profiler's own cost is in no time above.",
)


def _products_table(name: str, rounds: Sequence[dict[str, Any]]) -> Table:
    rows: list[list[Any]] = [
        [
            product,
            spread([r["products"][product] for r in rounds]),
            statistics.median(r["gflops"][product] for r in rounds),
        ]
        for product in rounds[0]["products"]
    ]
    rows.append(["**all products**", spread([r["products_s"] for r in rounds]), ""])
    rows.append(["**the step**", spread([r["step_s"] for r in rounds]), ""])
    return Table(f"{name}: products of a step", ("Product", "s", "GFLOP/s"), rows)


def _profile_table(name: str, profile: Sequence[Sequence[Any]], device: str) -> Table:
    rows = [[f"`{key}`", count, seconds, f"{100 * share:.1f} %"] for key, count, seconds, share in profile]
    kind = "CPU" if device == "cpu" else "GPU"
    return Table(
        f"{name}: self {kind} time of two steps by operation, top 10", ("Operation", "calls", "s", "share"), rows
    )


if __name__ == "__main__":
    either(main, measure)
