"""Answers of a model that are kept: some for the report, more as sample files in lm-eval's own format.

Which documents is decided by their hashes alone, so that it is the same ones for every model. Texts of any length are cut, with
a mark that says how much is missing: a kept file stays small whatever a task or a model writes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

from ctpd.core.printing import printable_lines
from harness.answers import Answer
from harness.files import file_stem
from harness.record import DocumentScore

SHOWN, KEPT = 24, 100
"""Documents of a column whose answers are in its result, and in its sample files."""
PROMPT, ANSWER, ANY = 700, 400, 4000
"""Characters of a prompt and of an answer in a result, and of any text in a sample file."""
MOST_ITEMS = 64
"""Items of a list in a sample file: options of a question, or answers to a prompt."""

Sample = Mapping[str, Any]


def answers_of(samples: Mapping[str, Sequence[Sample]], scored: Sequence[DocumentScore], metric: str) -> list[Answer]:
    """The answers to the first ``SHOWN`` documents in the order of their hashes.

    Args:
        samples: lm-eval's, by task, of one filter.
        scored: the scores of the same documents, in the same order.
        metric: without its filter; where it is normalised by length, so is the choice of the likeliest option.
    """
    flat = [sample for _, of_task in sorted(samples.items()) for sample in of_task]
    chosen = sorted(zip(flat, scored, strict=True), key=lambda pair: str(pair[0]["doc_hash"]))[:SHOWN]
    return [_answer(sample, one, normalised="norm" in metric) for sample, one in chosen]


def write_samples(samples: Mapping[str, Sequence[Sample]], folder: Path) -> list[Path]:
    """Write ``samples_TASK.jsonl`` for each task, as `lm_eval --log_samples` does, of ``KEPT`` documents of a column at most.

    Args:
        samples: lm-eval's, by task, of one filter.
        folder: is made.
    """
    hashes = sorted(str(sample["doc_hash"]) for of_task in samples.values() for sample in of_task)
    kept, paths = set(hashes[:KEPT]), []
    folder.mkdir(parents=True, exist_ok=True)
    for task, of_task in sorted(samples.items()):
        lines = [_line(sample) for sample in of_task if str(sample["doc_hash"]) in kept]
        paths.append(folder / f"samples_{file_stem(task)}.jsonl")
        paths[-1].write_text("".join(line + "\n" for line in lines[:KEPT]), encoding="utf-8", newline="\n")
    return paths


def task_hash(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Hash of documents, prompts and targets: for one task the value that lm-eval's tracker reports."""
    hashes = [
        hash_string("".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in of_task))
        for _, of_task in sorted(samples.items())
    ]
    return str(hashes[0] if len(hashes) == 1 else hash_string("".join(hashes)))


def cut(text: str, most: int, *, end: bool = False) -> str:
    """The beginning of a text, or with ``end`` its end, and a mark that says how many characters are missing."""
    missing = len(text) - most
    if missing <= 0:
        return text
    mark = f"[{missing:,} characters cut]"
    return f"{mark} {text[missing:]}" if end else f"{text[:most]} {mark}"


def _line(sample: Sample) -> str:
    """A sample as lm-eval's tracker writes it."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(of_request)}
        for i, of_request in enumerate(sample["arguments"][:MOST_ITEMS])
    }
    written = {
        **sample,
        "arguments": arguments,
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "target": str(sample["target"]),
    }
    plain = json.loads(json.dumps(written, default=handle_non_serializable))
    return json.dumps(_shortened(plain), ensure_ascii=False)


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return cut(value, ANY).encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written
    if isinstance(value, list):
        return [_shortened(item) for item in value[:MOST_ITEMS]]
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return value


def _answer(sample: Sample, scored: DocumentScore, *, normalised: bool) -> Answer:
    texts = [tuple(map(str, arguments[:2])) for arguments in sample["arguments"]]
    likelihoods = [_likelihood(response) for response in sample["filtered_resps"]]
    options: list[str] = []
    if len(texts) > 1 and None not in likelihoods:
        prompt, options = _options([context + continuation for context, continuation in texts])
        lengths = [max(1, len(continuation)) if normalised else 1 for _, continuation in texts]
        values = [value / length for value, length in zip(likelihoods, lengths, strict=True) if value is not None]
        answer = options[max(range(len(values)), key=values.__getitem__)]
    else:
        prompt = texts[0][0]
        answer = texts[0][1] if likelihoods[0] is not None else _first_text(sample["resps"])
    return Answer(
        str(sample["doc_hash"]),
        scored.score,
        printable_lines(cut(prompt, PROMPT, end=True)),
        printable_lines(cut(_target(sample["target"], options), ANSWER)),
        printable_lines(cut(answer, ANSWER)),
    )


def _options(texts: Sequence[str]) -> tuple[str, list[str]]:
    """What several texts begin with in common, up to a word's end, and how each goes on.

    The options of a question are the same prompt with other continuations, or, where a gap is filled in, other prompts.
    """
    low, high = min(texts), max(texts)  # what these two share, all do
    common = low[: next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))]
    whole = common.rstrip()
    if whole == common:
        whole = common[: common.rfind(" ") + 1].rstrip() or common
    return whole, [text[len(whole) :].strip() for text in texts]


def _likelihood(response: Any) -> float | None:
    """The log-likelihood in lm-eval's answer to a request; None where the answer is a generated text."""
    if isinstance(response, list | tuple) and len(response) == 2 and isinstance(response[0], int | float):
        return float(response[0])
    return float(response) if isinstance(response, int | float) and not isinstance(response, bool) else None


def _first_text(responses: Any) -> str:
    """The first generated text, before any filter."""
    while isinstance(responses, list | tuple) and responses:
        responses = responses[0]
    return str(responses)


def _target(target: Any, options: Sequence[str]) -> str:
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(options):
        return options[target]
    return str(target)
