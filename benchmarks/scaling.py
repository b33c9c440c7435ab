"""How time and memory of scoring grow with vocabulary, response length and batch, forward and backward.

The scorer (`ctpd.models.score`) is compared with full logits of the same model, if those fit in memory.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.figures import Line, log_lines
from benchmarks.inputs import Shape, make_model
from benchmarks.measuring import MIB, Found, Meter, Side, alternate, arguments, either
from benchmarks.report import Claim, Result, Table, write

OURS, FULL = "ctpd", "full logits"
PROMPT = 128
FULL_LIMIT_MIB = 6144  # largest size of four copies of the full logits that is measured
POINTS: dict[str, list[dict[str, int]]] = {
    "vocabulary": [{"vocab": 2**k, "response": 256, "pairs": 1} for k in range(13, 19)],
    "response": [{"vocab": 32000, "response": 2**k, "pairs": 1} for k in range(7, 13)],
    "batch": [{"vocab": 32000, "response": 256, "pairs": 2**k} for k in range(4)],
}
QUICK: dict[str, list[dict[str, int]]] = {
    "vocabulary": [{"vocab": 2**k, "response": 16, "pairs": 1} for k in (6, 8)],
    "response": [{"vocab": 256, "response": 2**k, "pairs": 1} for k in (3, 5, 7)],
    "batch": [{"vocab": 256, "response": 16, "pairs": 2**k} for k in (0, 2)],
}
KEYS = {"vocabulary": "vocab", "response": "response", "batch": "pairs"}
LABELS = {"vocabulary": "vocabulary", "response": "response tokens of a row", "batch": "pairs of a batch"}


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """All points of one series with one implementation. ``config``: `way`, `points`, `hidden`, `layers`."""
    import torch

    from ctpd.models import Score, install_scorer, score

    torch.set_num_threads(config["threads"])
    device, way = config["device"], config["way"]

    def one(point: dict[str, int], meter: Meter | None) -> None:
        rows, length = 2 * point["pairs"], PROMPT + point["response"]
        shape = Shape(vocab=point["vocab"], hidden=config["hidden"], layers=config["layers"], seq_len=length)
        model = install_scorer(make_model(shape).to(device))
        ids_RT = torch.randint(4, point["vocab"], (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
        place_RT = torch.arange(rows * length, device=device).reshape(rows, length)
        predictors_N = place_RT[:, PROMPT - 1 : -1].flatten()
        targets_N = ids_RT[:, PROMPT:].flatten()

        def work() -> None:
            if way == OURS:
                logps_N = score(model, ids_RT, Score(predictors_N, targets_N))
            else:
                logits = model(input_ids=ids_RT).logits[:, PROMPT - 1 : -1]
                logps_N = logits.float().log_softmax(-1).flatten(0, 1).gather(1, targets_N[:, None])
            logps_N.sum().backward()

        if meter is None:
            return work()
        with meter:
            work()
        return None

    one({**config["points"][0], "response": 8}, None)
    found = []
    for point in config["points"]:
        if way == FULL and _full_mib(point) > FULL_LIMIT_MIB:
            continue
        meter = Meter(device)
        one(point, meter)
        found.append(
            {
                **point,
                "seconds": meter.seconds,
                "growth_mib": meter.peak_mib - meter.start_mib,
                "other_cpu": meter.other_cpu,
            }
        )
    return {"points": found}


def _full_mib(point: dict[str, int]) -> float:
    return 4 * 4 * 2 * point["pairs"] * (PROMPT + point["response"]) * point["vocab"] / MIB


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of log y over log x, by least squares: 1 is linear growth."""
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def main() -> None:
    """Measure all series, and write the result."""
    args = arguments(__doc__, rounds=2).parse_args()
    model = {"hidden": 32, "layers": 1} if args.quick else {"hidden": 256, "layers": 2}
    points = QUICK if args.quick else POINTS
    sides = [
        Side(f"{series}, {way}", "benchmarks.scaling", {**model, "way": way, "points": points[series]})
        for series in points
        for way in (OURS, FULL)
    ]
    found = alternate(sides, args)
    claims = [
        Claim("exponent of time in response tokens", "at most", 1.1, _exponents(found, "response", "seconds")),
        Claim("exponent of memory in the vocabulary", "at most", None, _exponents(found, "vocabulary", "growth_mib")),
    ]
    figures = {}
    for series in points:
        for file, key, unit in (("time", "seconds", "seconds"), ("memory", "growth_mib", "MiB")):
            lines = [
                Line(way, _curve(found, series, way, key), number, number > 0)
                for number, way in enumerate((OURS, FULL))
            ]
            title = f"{file.capitalize()} of scoring over the {LABELS[series]}"
            figures[f"{series}-{file}.svg"] = log_lines(lines, title=title, x_label=LABELS[series], y_label=unit)
    text = (
        f"A Llama of hidden {model['hidden']} and {model['layers']} layers; prompt {PROMPT} tokens; forward and backward, all "
        "weights trained. Memory is the growth during the pass, gradients of the weights included: these grow with the "
        "vocabulary whatever the scorer does. Full logits are left out where four copies would pass 6 GiB."
    )
    tables = [_table(found, series) for series in points]
    write(
        Result(
            name="scaling",
            title="How scoring scales",
            text=[text],
            claims=claims,
            tables=tables,
            measurements=found,
            figures=figures,
        ),
        args,
    )


def _curve(found: Found, series: str, way: str, key: str) -> list[tuple[float, float]]:
    rounds = [reported["points"] for reported in found[f"{series}, {way}"]]
    return [
        (float(points[0][KEYS[series]]), max(statistics.median(point[key] for point in points), 1e-3))
        for points in zip(*rounds, strict=True)
    ]


def _exponents(found: Found, series: str, key: str) -> list[float]:
    rounds = [reported["points"] for reported in found[f"{series}, {OURS}"]]
    return [exponent([(point[KEYS[series]], max(point[key], 1e-3)) for point in points]) for points in rounds]


def _table(found: Found, series: str) -> Table:
    full = {key: dict(_curve(found, series, FULL, key)) for key in ("seconds", "growth_mib")}
    rows = [
        [
            int(x),
            seconds,
            full["seconds"].get(x),
            round(mib),
            round(full["growth_mib"][x]) if x in full["growth_mib"] else None,
        ]
        for (x, seconds), (_, mib) in zip(
            _curve(found, series, OURS, "seconds"), _curve(found, series, OURS, "growth_mib"), strict=True
        )
    ]
    header = (LABELS[series], f"{OURS}, s", f"{FULL}, s", f"{OURS}, MiB", f"{FULL}, MiB")
    return Table(f"Over the {LABELS[series]}", header, rows)


if __name__ == "__main__":
    either(main, measure)
