"""The data of a real training: 61,000 pairs, as many as UltraFeedback has, through the stages `pairs`, `signals` and `weights`.

The pairs recombine the sentences of real preference pairs if `../shared/data` exists or `--data` names a file, else of
generated ones. The same is measured at a quarter of the pairs, so that it shows how time and memory grow. Each stage runs
in a process of its own. `pairs` is compared with tokenizing every prompt and response once by each tokenizer, single-threaded.
The models of `signals` are tiny: its time is that of reading, batching and writing.
"""

import argparse
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.alignment import DATA, preference_pairs, tokenize, trained_tokenizer
from benchmarks.figures import Bar, bars
from benchmarks.measuring import Found, Meter, Side, alternate, arguments, either, ratios
from benchmarks.report import Claim, Result, Table, spread, write

STAGES = ("pairs", "signals", "weights")
TOKENIZE = "tokenize"
NUM_PAIRS, QUICK = 61_000, 400
SIZES = {"quarter": 4, "full": 1}  # name: what the number of pairs is divided by
VOCABULARIES = {"teacher": 4096, "student": 2048}
TEXTS = 2048  # tokenized in one call, so that the memory of the comparison is bounded too
MEASURED = ("seconds", "cpu_s", "extra_mib", "other_cpu")
RECIPE = """
name: pairs
about: The data of a real training.
shared:
  teacher: {{model: teacher, template: {template}, sft: skip, positive: positive, negative: teacher}}
  student: {{model: student, template: {template}, sft: skip}}
  data: {{train: {{path: {data}.jsonl}}, max_tokens: 1024, max_prompt_tokens: 512, max_dropped: 0.2}}
  train: {{epochs: 1, pairs_per_step: 16}}
  evaluation: {{suite: card}}
runs:
  CTPD: {{method: ctpd, tuned: {{learning_rate: 1e-4}}}}
tables: {{main: {{caption: Main, rows: [CTPD], base: CTPD}}}}
"""
TEMPLATE = '{user: "### Question:\\n{content}\\n\\n", assistant: "### Answer:\\n{content}\\n\\n"}'


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Build the stages of one kind, or tokenize. ``config``: `folder`, `size` (a name of `SIZES`), `stage`."""
    os.chdir(config["folder"])
    if config["stage"] == TOKENIZE:
        return _tokenization(config["size"])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as for a user, who has not turned it off
    import torch

    from ctpd.app import Experiment
    from ctpd.core.store import Store
    from ctpd.pipeline.build import build_missing
    from ctpd.pipeline.graph import Graph
    from ctpd.pipeline.progress import Progress
    from ctpd.pipeline.runtime import Runtime

    torch.set_num_threads(config["threads"])
    store = Store(Path(f"store-{config['size']}"))
    stages = Graph(tuple(Experiment(f"{config['size']}.yaml").training)).stages
    targets = tuple(stage for stage in stages if stage.kind == config["stage"])
    runtime = Runtime(device=config["device"])
    with Meter(config["device"]) as meter:
        built = build_missing(Graph(targets), store, runtime=runtime, progress=Progress(quiet=True))
    if built != len(targets):
        raise RuntimeError(f"{built} stages were built for {len(targets)} of the kind {config['stage']}")
    kept = sum(file.stat().st_size for stage in targets for file in store.path(stage.kind, stage.key).iterdir())
    return {**_metered(meter), "stages": built, "stored_mib": kept / 2**20}


def _tokenization(size: str) -> dict[str, Any]:
    """Tokens with offsets of all texts by both tokenizers, on one thread."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from ctpd.models import find_tokenizer

    tokenizers = [find_tokenizer(role) for role in VOCABULARIES]
    with Meter() as meter, Path(f"{size}.jsonl").open(encoding="utf-8") as lines:
        texts = (text for line in lines for text in json.loads(line).values())
        count = 0
        while block := list(islice(texts, TEXTS)):
            for tokenizer in tokenizers:
                tokenize(tokenizer, block)
            count += len(block)
    return {**_metered(meter), "texts": count}


def _metered(meter: Meter) -> dict[str, Any]:
    return {
        "seconds": meter.seconds,
        "cpu_s": meter.cpu_seconds,
        "other_cpu": meter.other_cpu,
        "extra_mib": meter.peak_mib - meter.start_mib,
    }


def recombined(pairs: list[Any], number: int) -> Iterator[dict[str, str]]:
    """Pairs as long as the given ones, in which every sentence is drawn from all of theirs; always the same."""
    rng = random.Random(0)
    texts = {name: [] for name in ("prompt", "chosen", "rejected")}
    for pair in pairs:
        for name, text in (("prompt", pair.prompt[-1].content), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            texts[name].append(re.findall(r"\S.*?(?:[.!?]\s|\s*\n|$)\s*", text, re.DOTALL) or [text])
    sentences = {name: [one for parts in of_name for one in parts] for name, of_name in texts.items()}
    for row in range(number):
        yield {
            name: "".join(rng.choice(sentences[name]) for _ in of_name[row % len(of_name)])
            for name, of_name in texts.items()
        }


def make_inputs(folder: Path, pairs: list[Any], number: int) -> None:
    """Write the data, the recipes and the models."""
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    for role, entries in VOCABULARIES.items():
        tokenizer = trained_tokenizer(role, texts, entries)
        for name, seed in ((role, 0), *((("positive", 1),) if role == "teacher" else ())):
            _model(len(tokenizer), seed).save_pretrained(folder / name)
            tokenizer.save_pretrained(str(folder / name))
    for size, divisor in SIZES.items():
        with (folder / f"{size}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in recombined(pairs, number // divisor))
        (folder / f"{size}.yaml").write_text(RECIPE.format(template=TEMPLATE, data=size), encoding="utf-8")


def _model(vocabulary: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
        )
    )


def main() -> None:
    """Measure, and write the result."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--data", type=Path, default=DATA if DATA.exists() else None, help="preference pairs, a file")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="pairs of the full size (%(default)s)")
    args = parser.parse_args()
    number = QUICK if args.quick else args.pairs
    found: Found = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(Path(folder), preference_pairs(args.data, limit=1000), number)
            sides = [
                Side(_name(stage, size), "benchmarks.pairs", {"folder": folder, "size": size, "stage": stage})
                for size in SIZES
                for stage in (TOKENIZE, *STAGES)
            ]
            for name, rounds in alternate(sides, args, rounds=1).items():  # in order: a stage reads what others wrote
                found.setdefault(name, []).extend(rounds)
    _write(found, args, number)


def _name(stage: str, size: str) -> str:
    return f"{stage}, {size}"


def _claims(found: Found) -> list[Claim]:
    def grown(key: str, stage: str) -> list[float]:
        return ratios(found, key, of=_name(stage, "full"), to=_name(stage, "quarter"))

    whole = ratios(found, "seconds", of=_name("pairs", "full"), to=_name(TOKENIZE, "full"))
    cores = [one["cpu_s"] / one["seconds"] for one in found[_name("pairs", "full")]]
    exponents = [
        Claim(
            f"{stage}: exponent of {what} in the number of pairs",
            "at most",
            1.1,
            [math.log(ratio, 4) for ratio in grown(key, stage)],
        )
        for what, key in (("time", "seconds"), ("memory", "extra_mib"))
        for stage in STAGES
    ]
    return [
        Claim("pairs: seconds / single-threaded tokenization of all texts by both tokenizers", "at most", 2.5, whole),
        Claim("pairs: peak memory at all pairs / at a quarter", "at most", 1.5, grown("extra_mib", "pairs")),
        Claim("pairs: cores in use", "at least", None, cores),
        *exponents,
    ]


def _write(found: Found, args: argparse.Namespace, number: int) -> None:
    rows = [
        [
            stage,
            number // divisor,
            *(spread([one[key] for one in found[_name(stage, size)]]) for key in MEASURED),
            spread([one["stored_mib"] for one in found[_name(stage, size)]]) if stage in STAGES else "",
        ]
        for stage in (TOKENIZE, *STAGES)
        for size, divisor in SIZES.items()
    ]
    peaks = {
        name: [one["extra_mib"] for one in found[name]]
        for stage in STAGES
        for name in (_name(stage, size) for size in SIZES)
    }
    source = args.data.name if args.data else "generated pairs"
    text = (
        f"{number:,} pairs of {found[_name(TOKENIZE, 'full')][0]['texts']:,} texts, recombined from {source}; byte-level BPE of "
        f"{VOCABULARIES['teacher']:,} entries (teacher) and BPE of {VOCABULARIES['student']:,} (student), trained on it. `signals` are the "
        "two passes of the contrastive pair, of models with hidden size 16."
    )
    memory = (
        "Memory is the peak in the stage less that at its start, when libraries are loaded. Stages after `pairs` hold the tokens of "
        "all pairs, so their memory grows with them."
    )
    title = "Peak memory of a stage beside that of its process at the start"
    write(
        Result(
            name="pairs",
            title=f"{number:,} pairs through `pairs`, `signals` and `weights`",
            text=[text, memory],
            claims=_claims(found),
            tables=[
                Table("Stages", ("Stage", "pairs", "s", "CPU s", "peak MiB", "other cores busy", "stored MiB"), rows)
            ],
            measurements=found,
            figures={"pairs.svg": bars([Bar(name, values) for name, values in peaks.items()], title=title, unit="MiB")},
        ),
        args,
    )


if __name__ == "__main__":
    either(main, measure)
