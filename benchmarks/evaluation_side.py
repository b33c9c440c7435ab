"""One side of the evaluation benchmark: models on tasks, with this project's evaluator or with lm-eval's own."""

import contextlib
import copy
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import Meter, child


@dataclass(frozen=True)
class _Request:
    """What to evaluate a model on: a column, its data, and the protocol."""

    column: Any
    root: Path
    batch_size: int
    limit: int | None


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Per task over all models: seconds in total and of the requests alone, values, scores of documents."""
    import lm_eval.models.huggingface  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import harness.backends
    import harness.evaluate  # noqa: F401 - all imports before any time is taken

    torch.set_num_threads(config["threads"])
    root, run = Path(config["data_root"]), _ours if config["side"] == "ours" else _theirs
    tasks = {task["name"]: {"seconds": 0.0, "requests": 0.0, "results": []} for task in config["tasks"]}
    with Meter(config["device"]) as whole:
        for folder in config["models"]:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config["dtype"]))
            model = model.to(config["device"]).eval()
            for task in config["tasks"]:
                clock, request = _Clock(), _Request(_column(task), root, config["batch_size"], task["limit"])
                with Meter(config["device"]) as meter:
                    result = run(model, tokenizer, request, clock)
                found = tasks[task["name"]]
                found["seconds"] += meter.seconds
                found["requests"] += clock.seconds
                found["results"].append({**result, "num_requests": clock.num_requests})
    return {
        "tasks": tasks,
        "seconds": sum(one["seconds"] for one in tasks.values()),
        "requests": sum(one["requests"] for one in tasks.values()),
        "peak_mib": whole.peak_mib,
        "other_cpu": whole.other_cpu,
    }


def _ours(model: Any, tokenizer: Any, request: _Request, clock: "_Clock") -> Any:
    from harness.backends import SharedContextLM
    from harness.evaluate import Documents, score
    from harness.isolation import quiet

    with quiet("lm_eval"):
        lm = SharedContextLM(model, tokenizer, batch_size=request.batch_size, progress=None)
    clock.watch(lm)
    result = score(lm, request.column, Documents(request.root, request.limit))
    return {"value": result.value, "documents": [list(one) for one in result.scored]}


def _theirs(model: Any, tokenizer: Any, request: _Request, clock: "_Clock") -> Any:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from harness.isolation import dataset_cache, quiet
    from harness.loading import load_tasks

    # Our loader sets the tasks' shots. `datasets` caches by data set name, so each mirror needs its own cache.
    with tempfile.TemporaryDirectory() as folder, dataset_cache(folder), quiet("lm_eval"):
        lm = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=request.batch_size, softmax_dtype="float32"
        )
        clock.watch(lm)
        with contextlib.redirect_stdout(io.StringIO()):
            tasks = load_tasks(request.column, data_root=request.root)
            results = evaluate(lm, tasks, limit=request.limit, bootstrap_iters=1000, fewshot_as_multiturn=True)
    column = request.column
    metric, name = column.metric.split(",")
    documents = [
        [sample["doc_hash"], float(sample[metric])]
        for task in sorted(results["samples"])
        for sample in results["samples"][task]
        if sample["filter"] == name
    ]
    return {"value": float(results["results"][column.task][column.metric]), "documents": documents}


class _Clock:
    """Times the calls in which lm-eval passes all requests of a task to the model, tokenization included."""

    def __init__(self) -> None:
        self.seconds, self.num_requests = 0.0, 0

    def watch(self, lm: Any) -> None:
        for name in ("loglikelihood", "generate_until"):
            setattr(lm, name, self._timed(getattr(lm, name)))

    def _timed(self, call: Any) -> Any:
        def timed(requests: list[Any]) -> Any:
            start = time.perf_counter()
            answers = call(requests, disable_tqdm=True)
            self.seconds += time.perf_counter() - start
            self.num_requests += len(requests)
            return answers

        return timed


def _column(task: dict[str, Any]) -> Any:
    from harness.suites import Column

    column = task["column"]
    return Column(**{**column, "also": tuple(column["also"]), "datasets": tuple(column["datasets"])})


if __name__ == "__main__":
    child(measure)
