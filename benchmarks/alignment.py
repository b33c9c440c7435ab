"""Time of span alignment relative to tokenization, which every training needs.

Uses the responses of real preference pairs if `../shared/data` exists or `--data` names a file, else generated ones.
Tokenization is one call of each fast tokenizer with ids and offsets, one thread. `encode_batch` alone, which does not
convert ids and offsets to Python objects, is measured too. Alignment is the batched path of `ctpd.text` from offset
arrays to span ids: cleaned ends of both sides, then the spans.
"""

import argparse
import os
import random
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Bar, bars
from benchmarks.measuring import ROOT, Found, Side, alternate, arguments, either, ratios
from benchmarks.report import Claim, Result, Table, spread, write

DATA = ROOT.parent / "shared" / "data" / "preference" / "ultrafeedback_binarized_train1000.parquet"
BLOCK = 1024  # responses aligned at once, as `prepare_pairs` does
VOCABULARIES = {"teacher": 32000, "student": 16000}


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Tokenize, align, and prepare completely. ``config``: `data`, `teacher`, `student` (paths or None), `limit`."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from ctpd.text.config import PairsConfig
    from ctpd.text.prepare import prepare_pairs
    from ctpd.text.render import PlainTemplate, space_mark_ids
    from ctpd.text.render import TemplatedTokenizer as Reader

    pairs = preference_pairs(config["data"], limit=config["limit"])
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected) if text]
    tokenizers = {role: _tokenizer(role, config, texts) for role in VOCABULARIES}
    seconds = {"tokenize_s": 0.0, "encode_s": 0.0}
    found = {}
    for role, tok in tokenizers.items():
        tokenize(tok, texts[:8])
        start = time.perf_counter()
        tok.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds["encode_s"] += time.perf_counter() - start
        start = time.perf_counter()
        output = tokenize(tok, texts)
        seconds["tokenize_s"] += time.perf_counter() - start
        found[role] = [_arrays(output, slice(i, i + BLOCK), space_mark_ids(tok)) for i in range(0, len(texts), BLOCK)]
    blocks = list(zip(_blocks(texts), found["teacher"], found["student"], strict=True))
    _align(*blocks[0])
    start = time.perf_counter()
    spans = [_align(*block) for block in blocks]
    aligning = time.perf_counter() - start
    template = PlainTemplate(user="{content}\n", assistant="{content}\n", system="{content}\n")
    sides = {role: Reader(tok, template, role) for role, tok in tokenizers.items()}
    start = time.perf_counter()
    prepare_pairs(
        {"train": pairs},
        PairsConfig(max_tokens=2**20, max_prompt_tokens=2**19, max_dropped=1.0),
        teacher=sides["teacher"],
        student=sides["student"],
    )
    return {
        **seconds,
        "align_s": aligning,
        "prepare_s": time.perf_counter() - start,
        "responses": len(texts),
        "vocabularies": {role: len(tok) for role, tok in tokenizers.items()},
        "characters": sum(map(len, texts)),
        "teacher_tokens": sum(len(block[0]) for block in found["teacher"]),
        "student_tokens": sum(len(block[0]) for block in found["student"]),
        "spans": sum(spans),
    }


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Tokenize with the arguments that `ctpd.text.render` uses."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        return_offsets_mapping=True,
    )


def _arrays(output: Any, rows: slice, space_ids: np.ndarray) -> Arrays:
    """Starts, ends, where each row's tokens begin, and which tokens are only a space mark."""
    ids, pairs = output["input_ids"][rows], output["offset_mapping"][rows]
    offsets = np.fromiter(chain.from_iterable(chain.from_iterable(pairs)), dtype=np.int64).reshape(-1, 2)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return offsets[:, 0], offsets[:, 1], starts, np.isin(np.concatenate(ids), space_ids)


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[i : i + BLOCK] for i in range(0, len(texts), BLOCK))


def _align(texts: Sequence[str], teacher: Arrays, student: Arrays) -> int:
    """The number of spans of a block."""
    from ctpd.text.align import align_spans_batch, clean_ends

    ends = [
        clean_ends(first, last, token_starts=rows, texts=texts, space_only=marks)
        for first, last, rows, marks in (teacher, student)
    ]
    batch = align_spans_batch(
        ends[0],
        teacher_starts=teacher[2],
        student_ends=ends[1],
        student_starts=student[2],
        lengths=np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)),
    )
    return len(batch.boundaries)


def preference_pairs(data: str | Path | None, *, limit: int) -> list[Any]:
    """The first pairs of a file, or generated ones."""
    from ctpd.pipeline.sources import read_rows
    from ctpd.text.pairs import parse_pairs

    if data:
        path = Path(data)
        return list(parse_pairs(read_rows(path), source=path.name))[:limit]
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(1, 9))) for _ in range(5000)]

    def text(number: int) -> str:
        return " ".join(
            rng.choice(words) + rng.choice(("", "", "", ",", ".", "\n", " é", " 日本")) for _ in range(number)
        )

    rows = [{"prompt": text(40), "chosen": text(200), "rejected": text(150)} for _ in range(limit)]
    return list(parse_pairs(rows, source="generated"))


def _tokenizer(role: str, config: dict[str, Any], texts: Sequence[str]) -> Any:
    """The tokenizer of ``config``, or one trained on the responses."""
    from ctpd.models import find_tokenizer

    if not config[role]:
        return trained_tokenizer(role, texts, VOCABULARIES[role])
    tok = find_tokenizer(config[role])
    if tok.eos_token is None:  # a tokenizer.json alone names none; any token will do here
        tok.eos_token = tok.convert_ids_to_tokens(0)
    return tok


def trained_tokenizer(role: str, texts: Sequence[str], vocab_size: int) -> Any:
    """Byte-level BPE (teacher), or BPE with SentencePiece's mark for spaces (student)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "</s>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet: list[str] = []
    if role == "teacher":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", name_or_path=role)


def main() -> None:
    """Measure, and write the result."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, default=DATA if DATA.exists() else None, help="preference pairs, a file")
    parser.add_argument("--teacher", help="a folder with a tokenizer.json, or such a file; else one is trained")
    parser.add_argument("--student", help="the same for the student")
    parser.add_argument("--limit", type=int, default=1000, help="pairs (%(default)s)")
    args = parser.parse_args()
    config = {
        "data": str(args.data.resolve()) if args.data else None,
        "limit": 20 if args.quick else args.limit,
        "teacher": _absolute(args.teacher),
        "student": _absolute(args.student),
    }
    found = alternate([Side("alignment", "benchmarks.alignment", config)], args)
    _write(found, args)


def _absolute(location: str | None) -> str | None:
    return str(Path(location).resolve()) if location and Path(location).exists() else location


def _write(found: Found, args: argparse.Namespace) -> None:
    rounds = found["alignment"]
    one = rounds[0]
    shares = [r["align_s"] / r["tokenize_s"] for r in rounds]
    whole = ratios({"a": rounds, "b": [{"prepare_s": r["tokenize_s"]} for r in rounds]}, "prepare_s", of="a", to="b")
    claims = [
        Claim("alignment / single-threaded tokenization by both", "at most", 0.05, shares),
        Claim("alignment / `encode_batch` alone", "at most", None, [r["align_s"] / r["encode_s"] for r in rounds]),
        Claim("prepare_pairs as a whole, prompts included / tokenization of the responses", "at most", None, whole),
    ]
    names = {
        role: f"{'given' if getattr(args, role) else 'trained on the responses'}, {size:,} entries"
        for role, size in one["vocabularies"].items()
    }
    data = args.data.name if args.data else "generated pairs"
    text = (
        f"{one['responses']} responses of {data}, {one['characters']:,} characters; teacher's tokenizer: {names['teacher']}, "
        f"{one['teacher_tokens']:,} tokens; student's: {names['student']}, {one['student_tokens']:,} tokens; {one['spans']:,} spans."
    )
    rows = [
        [label, spread([r[key] for r in rounds])]
        for label, key in (
            ("tokenization by both, one thread", "tokenize_s"),
            ("`encode_batch` of both alone", "encode_s"),
            ("alignment, from offset arrays to span ids", "align_s"),
            ("prepare_pairs as a whole", "prepare_s"),
        )
    ]
    figure = bars(
        [
            Bar(str(label), [r[key] for r in rounds], style=i)
            for i, (label, key) in enumerate(
                (("tokenization", "tokenize_s"), ("alignment", "align_s"), ("prepare_pairs", "prepare_s"))
            )
        ],
        title="Alignment beside tokenization",
        unit="seconds",
    )
    write(
        Result(
            name="alignment",
            title="Alignment beside tokenization",
            text=[text],
            claims=claims,
            tables=[Table("Seconds", ("What", "s"), rows)],
            measurements=found,
            figures={"alignment.svg": figure},
        ),
        args,
    )


if __name__ == "__main__":
    either(main, measure)
