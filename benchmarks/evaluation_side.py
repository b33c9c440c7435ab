"""One side of the evaluation benchmark: a model on tasks, through this project's model or lm-eval's own."""

import copy
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Meter, child


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every task, all and those of the requests alone, with values and per-document scores."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.backends import SharedContextLM
    from harness.evaluate import score
    from harness.isolation import quiet

    torch.set_num_threads(config["threads"])
    folder = Path(config["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config["dtype"]))
    model = model.to(config["device"]).eval()
    found: dict[str, Any] = {}
    for task in config["tasks"]:
        column = _column(task)
        with quiet("lm_eval"):
            if config["side"] == "ours":
                lm: HFLM = SharedContextLM(model, tokenizer, batch_size=config["batch_size"], progress=None)
            else:
                lm = HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=config["batch_size"],
                    softmax_dtype="float32",
                )  # fmt: skip
        clock = _Clock(lm)
        with Meter(config["device"]) as meter:
            result = score(lm, column, data_root=Path(config["data_root"]), limit=task["limit"])
        found[task["name"]] = {
            "seconds": meter.seconds, "requests": clock.seconds, "other_cpu": meter.other_cpu,
            "peak_mib": meter.peak_mib, "value": result["value"], "documents": [one for _, one in result["documents"]],
            "num_docs": result["num_docs"], "num_requests": clock.requests, "task_hash": result["task_hash"],
        }  # fmt: skip
    return {
        "tasks": found,
        "seconds": sum(one["seconds"] for one in found.values()),
        "requests": sum(one["requests"] for one in found.values()),
        "other_cpu": max(one["other_cpu"] for one in found.values()),
    }


class _Clock:
    """Times the calls in which lm-eval hands over all requests of a task: tokenization and the model."""

    def __init__(self, lm: Any) -> None:
        self.seconds, self.requests = 0.0, 0
        for name in ("loglikelihood", "generate_until"):
            setattr(lm, name, self._timed(getattr(lm, name)))

    def _timed(self, call: Any) -> Any:
        def timed(requests: list[Any]) -> Any:
            start = time.perf_counter()
            answers = call(requests, disable_tqdm=True)
            self.seconds += time.perf_counter() - start
            self.requests += len(requests)
            return answers

        return timed


def _column(task: dict[str, Any]) -> Any:
    from harness.suites import Column

    return Column(**{**task["column"], "also": tuple(task["column"]["also"]), "datasets": ()})


if __name__ == "__main__":
    child(measure)
