"""Only the log-probabilities of given tokens, forward and backward: our tiles, full logits, and TRL's fused head.

All three get the same hidden states, output embedding and targets, and must give the same sum and gradient norm.
"""

import math
from typing import Any

from benchmarks.figures import Bar, bars
from benchmarks.measuring import Meter, Side, alternate, arguments, either, median_of, ratios
from benchmarks.report import Claim, Result, Table, spread, write

OURS, FULL, TRL = "ctpd", "full logits", "TRL"
SIZES = {
    "cpu": {"rows": 2048, "hidden": 256, "vocab": 128256, "passes": 1},
    "cuda": {"rows": 8192, "hidden": 2048, "vocab": 128256, "passes": 10},
}
QUICK = {"rows": 64, "hidden": 32, "vocab": 512, "passes": 1}
KINDS = {"trained": "trained head", "frozen": "frozen head"}


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """One forward and backward pass, the mean of `passes`. ``config``: also `way`, `frozen`, `rows`, `hidden`, `vocab`."""
    import torch

    torch.set_num_threads(config["threads"])
    dtype, device = getattr(torch, config["dtype"]), config["device"]
    torch.manual_seed(0)
    hidden_NH = torch.randn(config["rows"], config["hidden"], dtype=dtype, device=device).requires_grad_()
    weight_VH = torch.randn(config["vocab"], config["hidden"], dtype=dtype, device=device) * 0.02
    weight_VH.requires_grad_(not config["frozen"])
    targets_N = torch.randint(config["vocab"], (config["rows"],), device=device)
    grad_N = torch.randn(config["rows"], device=device)
    logps = _way(config["way"])
    rows = 8 if device == "cpu" else config["rows"]  # kernels of a GPU are chosen by size
    logps(
        hidden_NH[:rows], weight_VH, targets_N[:rows]
    ).sum().backward()  # warm-up: loads kernels, allocates memory pools
    hidden_NH.grad = weight_VH.grad = None
    with Meter(device) as meter:
        for _ in range(config["passes"]):
            hidden_NH.grad = weight_VH.grad = None
            found_N = logps(hidden_NH, weight_VH, targets_N)
            (found_N.float() * grad_N).sum().backward()
    assert hidden_NH.grad is not None
    return {
        "seconds": meter.seconds / config["passes"],
        "growth_mib": meter.peak_mib - meter.start_mib,
        "other_cpu": meter.other_cpu,
        "sum": found_N.sum().item(),
        "grad_hidden": hidden_NH.grad.float().norm().item(),
        "grad_weight": 0.0 if config["frozen"] else weight_VH.grad.float().norm().item(),
    }


def _way(name: str) -> Any:
    import torch

    from ctpd.ops.logps import token_logps

    def full(hidden_NH: Any, weight_VH: Any, targets_N: Any) -> Any:
        logits_NV = hidden_NH @ weight_VH.T
        return logits_NV.float().log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1)

    def fused(hidden_NH: Any, weight_VH: Any, targets_N: Any) -> Any:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        values = ChunkedLogProbFunction.apply(
            hidden_NH, weight_VH, None, targets_N, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
        )
        return next(value for value in values if isinstance(value, torch.Tensor))

    return {OURS: token_logps, FULL: full, TRL: fused}[name]


def main() -> None:
    """Measure all ways, and write the result."""
    parser = arguments(__doc__, rounds=2)
    args = parser.parse_args()
    size = QUICK if args.quick else SIZES[args.device]
    sides = [
        Side(f"{way}, {kind}", "benchmarks.head", {**size, "way": way, "frozen": frozen == "frozen"})
        for frozen, kind in KINDS.items()
        for way in (OURS, FULL, TRL)
    ]
    found = alternate(sides, args)
    claims = []
    for kind in KINDS.values():
        ours = f"{OURS}, {kind}"
        for other in (FULL, TRL):
            _check(found[ours][0], found[f"{other}, {kind}"][0], loose=args.dtype != "float32")
            for what, key in (("time", "seconds"), ("memory", "growth_mib")):
                values = ratios(found, key, of=ours, to=f"{other}, {kind}")
                claims.append(Claim(f"{kind}: {what} / that of {other}", "at most", None, values))
    rows = [
        [
            name,
            spread([r["seconds"] for r in reported]),
            f"{median_of(found, name, 'growth_mib'):.0f}",
            f"{reported[0]['sum']:.2f}",
            f"{reported[0]['grad_hidden']:.6g}",
            f"{max(r['other_cpu'] for r in reported):.2f}",
        ]
        for name, reported in found.items()
    ]
    table = Table("Each way", ("Way", "s", "growth of memory, MiB", "sum", "gradient norm", "load of others"), rows)
    times = [
        Bar(name, [r["seconds"] for r in reported], style=i % 3) for i, (name, reported) in enumerate(found.items())
    ]
    memory = [
        Bar(name, [r["growth_mib"] for r in reported], style=i % 3) for i, (name, reported) in enumerate(found.items())
    ]
    figures = {
        "time.svg": bars(times, title="Log-probabilities, forward and backward", unit="seconds"),
        "memory.svg": bars(memory, title="Memory that the log-probabilities need", unit="MiB"),
    }
    text = f"{size['rows']} rows, hidden {size['hidden']}, vocabulary {size['vocab']}. The frozen head has no gradient of its weight."
    write(
        Result(
            name="head",
            title="The output head alone",
            text=[text],
            claims=claims,
            tables=[table],
            measurements=found,
            figures=figures,
        ),
        args,
    )


def _check(ours: dict[str, Any], other: dict[str, Any], *, loose: bool) -> None:
    for name in ("sum", "grad_hidden", "grad_weight"):
        if not math.isclose(ours[name], other[name], rel_tol=2e-2 if loose else 1e-4, abs_tol=1e-6):
            raise RuntimeError(f"{name} is {ours[name]} and {other[name]}: the results differ")


if __name__ == "__main__":
    either(main, measure)
