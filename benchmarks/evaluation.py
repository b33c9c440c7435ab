"""Evaluation compared with lm-eval's own `HFLM` and evaluator: same tasks, documents, models, batch size and softmax.

Models have random weights: scores need only be equal. Generation then never ends early, which is the least favourable
case for this project. Without a mirror of the hub at ``--data-root`` only the testbed is measured.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Found, Side, alternate, arguments, median_of, ratios
from benchmarks.report import Claim, Result, Table, spread, write
from ctpd.testbed.config import WorldConfig
from harness.suites import Column, load_suite

TARGET = 0.5
OFFICIAL = "official tasks, one model"
SUBJECTS = ("anatomy", "global_facts", "high_school_physics", "philosophy")
DOCUMENTS = {"ARC": 20, "MMLU": 25, "TruthfulQA": 40, "Winogrande": 100, "GSM8K": 16}


def main() -> None:
    """Measure both cases and write the result."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument(
        "--data-root", type=Path, default=Path("../shared/data/hub"), help="mirror of the hub (%(default)s)"
    )
    args = parser.parse_args()
    claims, tables, measured = [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        cases = {"testbed, three models in one process": _testbed(Path(temporary), quick=args.quick)}
        if args.data_root.is_dir():
            root = args.data_root.resolve()
            cases[OFFICIAL] = _official(Path(temporary), root, quick=args.quick)
        for name, config in cases.items():
            module = "benchmarks.evaluation_side"
            found = alternate([Side(side, module, {**config, "side": side}) for side in ("ours", "lm-eval")], args)
            check_equal(found)
            promised = (("seconds", "all of it"), ("requests", "the requests alone")) if name == OFFICIAL else ()
            for key, what in promised:
                values = ratios(found, key, of="ours", to="lm-eval")
                claims.append(Claim(f"{name}: time / lm-eval's, {what}", "at most", TARGET, values))
            tables.append(Table(name[0].upper() + name[1:], HEADER, rows(found, config["tasks"])))
            measured[name] = {side: [without_documents(one) for one in rounds] for side, rounds in found.items()}
    write(
        Result(
            name="evaluation",
            title="Evaluation beside lm-eval",
            text=TEXT,
            claims=claims,
            tables=tables,
            measurements=measured,
        ),
        args,
    )


TEXT = [
    "Ours: `harness.backends.SharedContextLM` through `harness.evaluate.score`. lm-eval: its `HFLM` through its `evaluate`, on "
    "the same tasks, loaded for each model. Values are equal, and scores of documents within 1e-4, or the benchmark fails. "
    "*All*: loading tasks and building prompts included; *requests*: tokenization and the model alone.",
    "Testbed: Llama, hidden 96, 3 layers, 640 unigram pieces, batches of 32. Official: Llama, hidden 256, 4 layers, 8,192 "
    "byte-BPE pieces, batches of 8; the first documents of each task. A greater vocabulary favours ours (lm-eval computes "
    "logits everywhere), so does a model that ends its generations. The testbed's models are so small, and its prompts so "
    "short, that calls cost more than tokens: no bound is promised there.",
]
HEADER = ("Task", "Documents", "Requests", "lm-eval, s", "Ours, s", "Ratio, all", "Ratio, requests", "Value")


def rows(found: Found, tasks: list[dict[str, Any]]) -> list[list[Any]]:
    """One row per task, and the total."""
    made = []
    for name in [task["name"] for task in tasks]:
        of_task: Found = {side: [one["tasks"][name] for one in rounds] for side, rounds in found.items()}
        results = of_task["ours"][0]["results"]
        counts = [sum(len(one["documents"]) for one in results), sum(one["num_requests"] for one in results)]
        made.append([name, *counts, *_times(of_task), f"{results[0]['value']:.4f}"])
    return [*made, ["Total", None, None, *_times(found), None]]


def _times(found: Found) -> list[Any]:
    seconds = [round(median_of(found, side, "seconds"), 2) for side in ("lm-eval", "ours")]
    return [*seconds, *(spread(ratios(found, key, of="ours", to="lm-eval")) for key in ("seconds", "requests"))]


def check_equal(found: Found) -> None:
    """Raise an error if the two sides' scores differ.

    Raises:
        RuntimeError: different documents, a different value, or a document's score that differs by more than 1e-4.
    """
    for ours, theirs in zip(found["ours"], found["lm-eval"], strict=True):
        for name, task in ours["tasks"].items():
            for one, other in zip(task["results"], theirs["tasks"][name]["results"], strict=True):
                same = [key for key, _ in one["documents"]] == [key for key, _ in other["documents"]]
                pairs = zip(one["documents"], other["documents"], strict=True)
                worst = max(abs(a - b) for (_, a), (_, b) in pairs)
                if not same or worst > 1e-4 or abs(one["value"] - other["value"]) > 1e-5:
                    raise RuntimeError(f"{name}: {one['value']} and {other['value']}, a document by {worst}")


def without_documents(reported: dict[str, Any]) -> dict[str, Any]:
    """A side's report without the scores of single documents."""
    tasks = {
        name: {**task, "results": [{k: v for k, v in one.items() if k != "documents"} for one in task["results"]]}
        for name, task in reported["tasks"].items()
    }
    return {**reported, "tasks": tasks}


def _testbed(folder: Path, *, quick: bool) -> dict[str, Any]:
    from ctpd.testbed.corpus import write_world

    world = folder / "world"
    world.mkdir()
    size = {"num_documents": 40 if quick else 200, "num_pairs": 10, "num_eval_pairs": 5, "teacher_texts": 10}
    write_world(world, WorldConfig(**size))
    columns = {column.name: column for column in load_suite("testbed").columns}
    shape = {"hidden": 96, "layers": 3, "heads": 4, "intermediate": 256, "max_position": 256}
    texts = _lines(world / "corpus_student.jsonl")
    models = [_model(folder / f"small-{seed}", texts, "unigram", 640, {**shape, "seed": seed}) for seed in range(3)]
    tasks = [_task(column, None) for column in columns.values()]
    return {"models": models, "tasks": tasks, "data_root": str(world / "hub"), "batch_size": 32}


def _official(folder: Path, root: Path, *, quick: bool) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    columns = {column.name: column for column in load_suite("paper").columns}
    tasks = []
    for name, number in DOCUMENTS.items():
        limit = 2 if quick else number
        if name == "MMLU":
            parts = [
                columns[name].model_copy(update={"name": f"MMLU {part}", "task": f"mmlu_{part}", "version": 1.0})
                for part in SUBJECTS
            ]
            tasks += [_task(part, limit) for part in parts]
        else:
            tasks.append(_task(columns[name], limit))
    texts = parquet.read_table(root / "openai/gsm8k/main/train.parquet")["question"].to_pylist()
    shape = {"hidden": 256, "layers": 4, "heads": 4, "intermediate": 688, "max_position": 4096, "seed": 0}
    model = _model(folder / "medium", texts, "byte_bpe", 8192, shape)
    return {"models": [model], "tasks": tasks, "data_root": str(root), "batch_size": 8}


def _model(folder: Path, texts: list[str], kind: str, vocabulary: int, shape: dict[str, int]) -> str:
    from ctpd.testbed.config import PretrainConfig
    from ctpd.testbed.models import new_model, train_tokenizer

    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=vocabulary)
    config = PretrainConfig(
        corpus="teacher",
        tokenizer="byte_bpe",
        vocab_size=vocabulary,
        steps=1,
        texts_per_step=1,
        learning_rate=1.0,
        **shape,
    )
    new_model(tokenizer, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _task(column: Column, limit: int | None) -> dict[str, Any]:
    return {"name": column.name, "limit": limit, "column": column.model_dump()}


def _lines(path: Path) -> list[str]:
    import json

    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
