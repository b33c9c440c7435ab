"""Shared by all benchmarks: alternating child processes, and measurements inside a child. `benchmarks.report` writes results.

A benchmark is a script `benchmarks/<name>.py`, run as ``python -m benchmarks.<name>``. Each measured implementation is
a `Side`: a module and its arguments. Every side of every round runs in its own process. The sides of a round run one
after the other, so that a slow minute of the machine affects all of them; ratios are taken inside a round.

In the module of a side::

    def measure(config: dict[str, Any]) -> dict[str, Any]:
        ...                                  # imports, inputs: not measured
        base = resident_mib()
        with Meter(config["device"]) as meter:
            work()
        return {"seconds": meter.seconds, "peak_mib": meter.peak_mib, "other_cpu": meter.other_cpu}

    if __name__ == "__main__":
        child(measure)

In the benchmark's script::

    parser = arguments(__doc__, rounds=3)    # --rounds --device --dtype --threads --to --quick
    args = parser.parse_args()               # and from benchmarks.report: Claim, Result, Table, write
    found = alternate([Side("ours", "benchmarks.ours", {...}), Side("peer", "benchmarks.peer", {...})], args)
    values = ratios(found, "seconds", of="ours", to="peer")           # one a round
    write(Result(name="evaluation", title=..., text=[...], claims=[Claim("...", "at most", 0.5, values)],
                 tables=[Table(...)], measurements=found, figures={"evaluation.svg": svg}), args)

`write` writes ``<to>/<name>/<name>.json``, ``<name>.md`` and the figures, and rewrites the summary ``<to>/README.md``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
_MARK = "RESULT "
Found = dict[str, list[dict[str, Any]]]
"""The reports of the sides: name of the side -> one mapping per round."""


@dataclass(frozen=True)
class Side:
    """One thing to measure: ``python -m module`` gets ``config`` and reports one mapping; see `child`."""

    name: str
    module: str
    config: Mapping[str, Any]


class Meter:
    """Wall and CPU time, other load, and peak memory of a block: resident on a CPU, allocated on a GPU.

    Attributes after the block:
        seconds: wall time, after synchronizing the device.
        cpu_seconds: CPU time of this process, all threads.
        other_cpu: average number of cores that other processes used; wall times are unreliable unless it is near 0.
        start_mib: memory when the block began.
        peak_mib: the peak inside it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")

    def __enter__(self) -> "Meter":
        if self._cuda:
            torch = _torch()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()
        self.start_mib = resident_mib() if not self._cuda else _torch().cuda.memory_allocated() / MIB
        self._load, self._cpu, self._wall = machine_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            _torch().cuda.synchronize()
        self.seconds = time.perf_counter() - self._wall
        self.cpu_seconds = time.process_time() - self._cpu
        self.other_cpu = max(0.0, machine_seconds() - self._load - self.cpu_seconds) / max(self.seconds, 1e-9)
        self.peak_mib = peak_mib() if not self._cuda else _torch().cuda.max_memory_allocated() / MIB


class StepClock:
    """Records the end of each step; the first interval begins at the end of the first step."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._ends: list[float] = []
        self._marks: list[tuple[float, float]] = []

    def __call__(self, *_: Any) -> None:
        """A step has ended."""
        if self._cuda:
            _torch().cuda.synchronize()
        self._ends.append(time.perf_counter())
        self._marks.append((time.process_time(), machine_seconds()))

    @property
    def _steps(self) -> list[float]:
        return [end - start for start, end in pairwise(self._ends)]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self._steps)

    def report(self) -> dict[str, Any]:
        """Wall and CPU seconds of a step, and the cores that other processes used."""
        wall = self._ends[-1] - self._ends[0]
        own, machine = (last - first for first, last in zip(self._marks[0], self._marks[-1], strict=True))
        return {
            "step_s": self.median,
            "steps_s": self._steps,
            "cpu_s": own / (len(self._ends) - 1),
            "other_cpu": max(0.0, machine - own) / wall,
        }


def _torch() -> Any:
    import torch

    return torch


def resident_mib() -> float:
    """Resident memory of this process now."""
    return _status("VmRSS")


def peak_mib() -> float:
    """The greatest resident memory since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Reset the peak of the resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}: memory is measured on Linux only")


def machine_seconds() -> float:
    """CPU seconds of the whole machine since boot, without idle and waiting time."""
    values = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(values[:3]) + sum(values[5:8])) / os.sysconf("SC_CLK_TCK")


def child(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The main function of a side's module: read the one JSON argument that `alternate` gives, measure, report."""
    config = json.loads(sys.argv[1])
    print(_MARK + json.dumps(measure(config)), flush=True)


def either(main: Callable[[], None], measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """For a benchmark script that is also a side: measure if started by `alternate`, else run ``main``."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        child(measure)
    else:
        main()


def alternate(sides: Sequence[Side], args: argparse.Namespace, *, rounds: int | None = None) -> Found:
    """Measure every side in every round, each in its own process; every second round in reverse order.

    ``device``, ``dtype`` and ``threads`` of ``args`` are added to each side's arguments.

    Raises:
        RuntimeError: a side failed; the message ends with its output.
    """
    found: Found = {side.name: [] for side in sides}
    for number in range(args.rounds if rounds is None else rounds):
        for side in sides if number % 2 == 0 else list(reversed(sides)):
            start = time.monotonic()
            found[side.name].append(run_child(side, args))
            took = time.monotonic() - start
            print(f"  round {number + 1}: {side.name}: {took:.0f} s", file=sys.stderr, flush=True)
    return found


def run_child(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement of one side, in a process of its own."""
    config = {"device": args.device, "dtype": args.dtype, "threads": args.threads, **side.config}
    done = subprocess.run(
        [sys.executable, "-m", side.module, json.dumps(config)],
        env=child_environment(args.threads),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{side.name} failed ({done.returncode})\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    reported: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    return reported


def child_environment(threads: int) -> dict[str, str]:
    """Environment without network and telemetry, with a fixed number of threads that do not spin at barriers, and a shared
    bytecode cache."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONPYCACHEPREFIX": str(ROOT / "build" / "bytecode"),
    }
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**given, **counts, **quiet}


def ratios(found: Found, key: str, *, of: str, to: str) -> list[float]:
    """``of / to`` for one reported number, for each round."""
    return [ours[key] / theirs[key] for ours, theirs in zip(found[of], found[to], strict=True)]


def median_of(found: Found, side: str, key: str) -> float:
    """The median of one reported number over the rounds."""
    return statistics.median(reported[key] for reported in found[side])


def arguments(description: str | None, *, rounds: int = 3, steps: int | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of every side (%(default)s)")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="steps of a measurement (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a side (all cores)")
    parser.add_argument(
        "--to", type=Path, default=Path("results/benchmarks"), help="folder of the results (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, to test that it runs")
    return parser
