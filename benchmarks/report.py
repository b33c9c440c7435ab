"""Claims, tables and figures of a benchmark as files, and the summary of all benchmarks."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "lm_eval")


@dataclass(frozen=True)
class Claim:
    """A measured number with a target. Without a target it is only recorded."""

    text: str
    kind: Literal["at most", "at least"]
    target: float | None
    values: Sequence[float]
    unit: str = ""

    @property
    def median(self) -> float:
        """The measured value: the median over the rounds."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        return self.median <= self.target if self.kind == "at most" else self.median >= self.target


@dataclass(frozen=True)
class Table:
    """A table of the Markdown file; numbers are formatted by the caller or as ``%.3g``."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that a benchmark writes.

    Attributes:
        name: folder and file name.
        title: heading of the Markdown file.
        text: paragraphs: what is compared and how, and limitations.
        claims: numbers with targets.
        tables: of the Markdown file.
        measurements: all that was measured, for the JSON file.
        figures: file name -> SVG text.
    """

    name: str
    title: str
    text: Sequence[str]
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    measurements: Any = None
    figures: Mapping[str, str] = field(default_factory=dict)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware and package versions; no path and no host name."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = next(
        (line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown"
    )
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": args.threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "device": args.device,
        "dtype": args.dtype,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if args.device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(result: Result, args: argparse.Namespace) -> Path:
    """Write a result's files and the summary of all results beside it; returns the folder of the result.

    On a GPU the name ends in ``-cuda``; with ``--quick`` no claim is judged.
    """
    name = result.name if args.device == "cpu" else f"{result.name}-{args.device}"
    folder = args.to / name
    folder.mkdir(parents=True, exist_ok=True)
    claims = [
        {
            **asdict(claim),
            "values": list(claim.values),
            "median": claim.median,
            "met": None if args.quick else claim.met,
        }
        for claim in result.claims
    ]
    record = {
        "benchmark": name,
        "title": result.title,
        "command": command(args),
        "environment": environment(args),
        "claims": claims,
        "measurements": result.measurements,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for file, svg in result.figures.items():
        (folder / file).write_text(svg, encoding="utf-8")
    (folder / f"{name}.md").write_text(_markdown(result, record), encoding="utf-8")
    write_summary(args.to)
    print((folder / f"{name}.md").read_text(encoding="utf-8"))
    return folder


def command(args: argparse.Namespace) -> str:
    """The command that reproduces this result; paths are shortened to their last part."""
    words = [Path(sys.argv[0]).stem if sys.argv[0] else "benchmark"]
    given = iter(sys.argv[1:])
    for word in given:
        if word == "--to":
            next(given, None)
        elif not word.startswith("--to="):
            words.append(Path(word).name)
    return "python -m benchmarks." + " ".join(words)


def _markdown(result: Result, record: Mapping[str, Any]) -> str:
    env = record["environment"]
    kind = f"GPU figures ({env['gpu']})" if "gpu" in env else "CPU figures"
    versions = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    lines = [f"# {result.title}", ""]
    lines += [
        f"{kind}: {env['cpu']}, {env['cores']} cores, {env['threads']} threads, {env['memory_gib']} GiB, {env['dtype']}; "
        f"{env['date']}; Python {env['python']}, {versions}.",
        "",
        f"`{record['command']}`",
        "",
    ]
    for paragraph in result.text:
        lines += [paragraph, ""]
    if record["claims"]:
        lines += [*markdown_table(CLAIM_HEADER, [claim_row(claim) for claim in record["claims"]]), ""]
    for file in result.figures:
        lines += [f"![{result.title}]({file})", ""]
    for table in result.tables:
        lines += [f"## {table.title}", "", *markdown_table(table.header, table.rows), ""]
    return "\n".join(lines).rstrip() + "\n"


CLAIM_HEADER = ("Claim", "Target", "Measured: median (least to greatest)", "Rounds", "Met")


def claim_row(claim: Mapping[str, Any]) -> list[str]:
    """A claim of a JSON file as a row of the table of claims."""
    met = {True: "yes", False: "**no**", None: "not judged"}[claim["met"]]
    unit = f" {claim['unit']}" if claim["unit"] else ""
    target = "" if claim["target"] is None else f"{claim['kind']} {claim['target']:g}{unit}"
    measured = spread(claim["values"])
    return [
        claim["text"],
        target,
        measured + unit,
        str(len(claim["values"])),
        met,
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def write_summary(folder: Path) -> None:
    """The table of all claims in ``<folder>/README.md``, from the JSON files beside it."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]
    rows = [
        [f"[{record['benchmark']}]({record['benchmark']}/{record['benchmark']}.md)", *claim_row(claim)]
        for record in records
        for claim in record["claims"]
    ]
    machines = sorted(
        {f"{r['environment'].get('gpu') or r['environment']['cpu']}, {r['environment']['date']}" for r in records}
    )
    lines = [
        "# Speed and memory",
        "",
        "Written by `make bench`. Each side of a comparison ran in its own process on the same machine, the sides taking",
        "turns; a ratio is ours to the other's inside a round, so below 1 ours needs less. Benchmarks whose name ends in",
        "`-cuda` were measured on a GPU, all others on a CPU: **a CPU figure says nothing about a GPU.**",
        "",
        *(f"- {machine}" for machine in machines),
        "",
        *markdown_table(("Benchmark", *CLAIM_HEADER), rows),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``median (least to greatest)``; a single value is written without a range."""
    middle = f"{statistics.median(values):.{digits}g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}g} to {max(values):.{digits}g})"
