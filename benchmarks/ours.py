"""Our side of the step benchmark: the real trainer (`ctpd.train.fit.fit`) on the inputs of `benchmarks.inputs`."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.inputs import (
    BETA,
    LEARNING_RATE,
    LORA,
    LORA_TARGETS,
    MODEL,
    SEED,
    Shape,
    TokenPair,
    make_model,
    token_pairs,
    units,
)
from benchmarks.measuring import MIB, StepClock, child, resident_mib
from ctpd.models import add_lora, install_scorer, load_model, parameter_counts
from ctpd.objectives.base import Objective
from ctpd.pipeline.methods import Method
from ctpd.pipeline.rows import starts_of
from ctpd.probes import configure_scorer
from ctpd.text.blocks import TokenRows
from ctpd.train.collator import ScoredRows
from ctpd.train.config import Schedule
from ctpd.train.fit import Fit, FitSettings, Optimization, fit
from ctpd.train.scoring import TOKEN_LOGPS, ScoringSettings, scoring_pass, token_logps
from ctpd.train.sharing import enable_prompt_sharing, share_prompts_where_quicker
from ctpd.train.trainer import Training, UnitPass

LONGEST_SPAN = 3
METHODS: dict[str, dict[str, Any]] = {"ctpd": {"beta": BETA}, "dpo": {"beta": BETA}, "sft": {}}


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps; the reported memory leaves out the imports.

    ``config``: `folder` with the model (None: made here), `shape`, `steps`, `method`, `checkpointing`, `lora`,
    `share` (prompts, None: what the trainer does), `micro_batch` (pairs of a forward pass, None: the step's).
    """
    torch.set_num_threads(config["threads"])
    shape = Shape(**config["shape"])
    assert LlamaForCausalLM  # imported before the base is read
    base = resident_mib()
    model = loaded_model(shape, config)
    pairs = token_pairs(shape, shape.batch * config["steps"])
    start = time.perf_counter()
    rows = rows_for(model, pairs, config)
    reference_seconds = time.perf_counter() - start
    clock = StepClock(config["device"])
    with tempfile.TemporaryDirectory() as folder:
        done = train(model, rows, shape, config, clock=clock, folder=Path(folder) / "state")
    trainable, parameters = parameter_counts(model)
    state = 4 * (parameters + 3 * trainable) / MIB
    peak = done.peak_memory_mib
    assert peak is not None
    tokens = sum(int(length) for length in np.diff(rows.row_starts)[rows.items].ravel()) / config["steps"]
    return clock.report() | {
        "tokens_per_s": tokens / clock.median,
        "losses": [entry["loss"] for entry in done.history if "loss" in entry],
        "peak_mib": peak,
        "base_mib": base if config["device"] == "cpu" else 0.0,
        "state_mib": state,
        "extra_mib": peak - state - (base if config["device"] == "cpu" else 0.0),
        "reference_s": reference_seconds,
        "micro_batch": done.micro_batch,
        "shares_prompts": rows.shares_prompts,
        "parameters": parameters,
        "trainable": trainable,
    }


def loaded_model(shape: Shape, config: dict[str, Any]) -> Any:
    """The model with the scorer, and with adapters where asked for."""
    if config.get("folder"):
        model: Any = load_model(Path(config["folder"]) / MODEL, precision="float32", device=config["device"])
    else:
        model = install_scorer(make_model(shape).to(config["device"]))
    if config.get("lora"):
        model = add_lora(model, **LORA, targets=LORA_TARGETS, seed=SEED)
    configure_scorer(model)
    return model


def rows_for(model: Any, pairs: Sequence[TokenPair], config: dict[str, Any]) -> ScoredRows:
    """The pairs as the trainer scores them, with the stored reference of the model as it is now.

    CTPD's units are random spans. The teacher's reference (the student's own with noise) and the weights are random too:
    values do not affect time or memory.
    """
    objective = _objective(config)
    layout = objective.layout
    spans = LONGEST_SPAN if layout.granularity == "spans" else 1
    unit, counts = units(list(pairs), longest=spans, seed=SEED)
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    input_ids = np.concatenate([np.array([*prompt, *text], dtype=np.int32) for prompt, text in texts])
    unit_T = np.concatenate(
        [np.concatenate([np.full(len(p), -1), u]) for (p, _), u in zip(texts, unit, strict=True)]
    ).astype(np.int32)
    row_starts = starts_of(np.array([len(prompt) + len(text) for prompt, text in texts]))
    unit_starts = starts_of(np.array(counts))
    reference = weights = None
    if layout.reference is not None:
        with torch.autocast(config["device"], torch.bfloat16, enabled=config["dtype"] == "bfloat16"):
            reference = _reference(model, input_ids, row_starts, unit_T, unit_starts)
    if layout.weighting is not None:
        assert reference is not None
        rng = np.random.default_rng(SEED)
        reference = reference + rng.normal(0, 0.1, size=len(reference)).astype(np.float32)
        weights = rng.uniform(0.5, 1.5, size=len(reference)).astype(np.float32)
    items = np.arange(2 * len(pairs), dtype=np.int64).reshape(-1, 2)[:, : len(objective.sides)]
    rows = ScoredRows(
        input_ids=input_ids,
        row_starts=row_starts,
        unit=unit_T,
        unit_starts=unit_starts,
        counted=np.ones(int(unit_starts[-1]), dtype=bool),
        items=_in_training_order(items),
        reference=reference,
        weights=weights,
    )
    return with_sharing(model, rows, config.get("share"))


def with_sharing(model: Any, rows: ScoredRows, share: bool | None) -> ScoredRows:
    """Switch prompt sharing on or off; None does what `ctpd` does.

    Raises:
        ValueError: sharing was requested, and the model does not support it.
    """
    enable = share_prompts_where_quicker if share is None else enable_prompt_sharing
    shares = share is not False and rows.items.shape[1] > 1 and enable(model)
    if share and not shares:
        raise ValueError("rows of one side, or a model that did not pass the probe, share no prompts")
    return dataclasses.replace(rows, shares_prompts=shares)


def train(model: Any, rows: ScoredRows, shape: Shape, config: dict[str, Any], *, clock: StepClock, folder: Path) -> Fit:
    """Train one epoch with the settings of the other side: constant learning rate, AdamW, gradients clipped at 1."""
    pairs = config.get("micro_batch") or shape.batch
    sequences = rows.items.shape[1]
    objective = _objective(config)
    schedule = Schedule(
        pairs_per_step=shape.batch,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        activation_checkpointing=config.get("checkpointing", False),
    )
    settings = FitSettings(
        device=config["device"],
        micro_batch_tokens=pairs * sequences * shape.seq_len,
        checkpoint_seconds=1e9,
        report_to=(),
        progress=clock,
    )
    return fit(
        Training(model=model, objective=objective, rows=rows, forward_pass=UnitPass(objective)),
        Optimization(schedule=schedule, learning_rate=LEARNING_RATE, seed=SEED, precision=config["dtype"]),
        folder=folder,
        settings=settings,
    )


def _objective(config: dict[str, Any]) -> Objective:
    return Method.make(config["method"], METHODS[config["method"]], source="benchmark").objective()


def _reference(
    model: Any, input_ids: np.ndarray, row_starts: np.ndarray, unit_T: np.ndarray, unit_starts: np.ndarray
) -> np.ndarray:
    """The model's own log-probability of every unit, from a scoring pass."""
    rows = TokenRows(input_ids, row_starts, unit_T)
    settings = ScoringSettings(max_tokens=4096, progress=lambda done, total: None)
    logps = scoring_pass(model, rows, measure=token_logps, settings=settings)[TOKEN_LOGPS]
    scored = unit_T >= 0
    index = (unit_T + np.repeat(unit_starts[:-1], np.diff(row_starts)))[scored]
    return np.bincount(index, weights=logps, minlength=int(unit_starts[-1])).astype(np.float32)


def _in_training_order(items: np.ndarray) -> np.ndarray:
    """Permute items so that the sampler, which shuffles by (seed, epoch), yields them in the given order."""
    order = np.random.default_rng([SEED, 0]).permutation(len(items))
    placed = np.empty_like(items)
    placed[order] = items
    return placed


if __name__ == "__main__":
    child(measure)
