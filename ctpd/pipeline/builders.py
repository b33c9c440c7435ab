"""What each stage does when it is built: read the inputs' files, call one function, write the files.

Imported only when something is built: planning needs none of it.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ctpd.core.config import to_plain
from ctpd.core.recipe import DataSpec, ModelSpec, PlainSpec, Schedule
from ctpd.core.recipe import Source as PairSource
from ctpd.core.store import RESUME_FOLDER
from ctpd.core.world import PretrainConfig, WorldConfig
from ctpd.models import add_lora, install_scorer, load_model, load_tokenizer, save_model, whole_state
from ctpd.objectives.base import Generation, Layout, Objective, TeacherView
from ctpd.objectives.distillation import DistillationObjective
from ctpd.ops.weights import Signal, find_strategy, span_weights
from ctpd.pipeline import distillation
from ctpd.pipeline.distillation import GENERATED
from ctpd.pipeline.graph import Work
from ctpd.pipeline.methods import make_objective
from ctpd.pipeline.references import CHAIN, META, MODEL_FOLDER, SUMMARY, TRAINING, ModelRef
from ctpd.pipeline.rows import end_units, scored_rows, text_rows, token_rows, unit_signal, units_of
from ctpd.pipeline.sources import read_hub, read_rows
from ctpd.pipeline.summaries import weight_examples, weight_summary
from ctpd.probes import configure_scorer
from ctpd.testbed.corpus import write_world
from ctpd.testbed.models import new_model, train_tokenizer
from ctpd.text.pairs import Pair, parse_pairs
from ctpd.text.prepare import PreparedPairs, arrays, from_arrays, prepare_pairs, texts
from ctpd.text.render import ChatTemplate, PlainTemplate, TemplatedTokenizer
from ctpd.train.collator import ScoredRows
from ctpd.train.fit import Fit, FitSettings, Optimization, fit
from ctpd.train.scoring import TOKEN_LOGPS, ScoringSettings, scoring_pass, token_logps
from ctpd.train.sharing import enable_prompt_sharing
from ctpd.train.trainer import Training, UnitPass, save_objective

PAIRS, SIGNAL, WEIGHTS = "pairs.safetensors", "signal.safetensors", "weights.safetensors"


def world(work: Work, *, config: WorldConfig) -> None:
    """The testbed's corpora, pairs and evaluation documents."""
    write_world(work.folder, **dataclasses.asdict(config))


def tokenizer(work: Work, *, corpus: str, kind: str, vocab_size: int) -> None:
    """A tokenizer trained on one corpus."""
    train_tokenizer(_corpus(work, corpus), kind=kind, vocab_size=vocab_size).save_pretrained(
        str(work.folder / MODEL_FOLDER)
    )


def pretrain(work: Work, *, config: PretrainConfig) -> None:
    """A model trained from scratch on whole texts, by the one Trainer."""
    tok: Any = load_tokenizer(work.inputs["tokenizer"] / MODEL_FOLDER)
    untrained: Any = new_model(
        tok, hidden=config.hidden, layers=config.layers, heads=config.heads, intermediate=config.intermediate,
        max_position=config.max_position, seed=config.seed,
    )  # fmt: skip
    model = install_scorer(untrained.to(work.runtime.torch_device()))
    encoded = tok(_corpus(work, config.corpus), truncation=True, max_length=config.max_position - 1)["input_ids"]
    rows = text_rows([[*ids, tok.eos_token_id] for ids in encoded])
    schedule = Schedule(pairs_per_step=config.texts_per_step, schedule="cosine", warmup_ratio=config.warmup_ratio)
    objective = make_objective("sft", {}, source="pretrain")
    training = Training(model=model, objective=objective, rows=rows, forward_pass=UnitPass(objective))
    optimization = Optimization(
        schedule=schedule, learning_rate=config.learning_rate, seed=config.seed, precision="float32",
        max_steps=config.steps,
    )  # fmt: skip
    done = fit(training, optimization, folder=work.folder / RESUME_FOLDER, settings=fit_settings(work))
    _save_trained(work, model)
    if work.writes:
        tok.save_pretrained(str(work.folder / MODEL_FOLDER))
        _finish_training(work, done)


def pairs(work: Work, *, data: DataSpec, models: Mapping[str, ModelSpec], tokenizers: Mapping[str, str]) -> None:
    """Read, validate, render, tokenize and align the pairs, once for all methods.

    Args:
        tokenizers: role -> directory or hub id, for the roles whose tokenizer is no stage.
    """
    given = {split: read_pairs(work, split, source) for split, source in splits_of(data).items()}
    sides = {role: _side(work, role, spec, tokenizers.get(role)) for role, spec in models.items()}
    prepared = prepare_pairs(
        given,
        teacher=sides["teacher"],
        student=sides["student"],
        max_tokens=data.max_tokens,
        max_prompt_tokens=data.max_prompt_tokens,
        long_prompt=data.long_prompt,
        max_dropped=data.max_dropped,
        select=data.select,
        limit=data.limit,
    )
    save_file(arrays(prepared), work.folder / PAIRS)
    _write_json(work.folder / META, texts(prepared))


def signals(work: Work, *, model: ModelRef, precision: str) -> None:
    """Per-token log-probabilities of one frozen model on all pairs, in one scoring pass."""
    prepared = load_pairs(work.inputs["pairs"])
    loaded = distillation.frozen_model(work, model.located("model", work.inputs), precision)
    rows = token_rows(prepared, model.role)
    logps = np.zeros(len(rows.input_ids), dtype=np.float32)
    settings = ScoringSettings(
        max_tokens=work.runtime.signal_batch_tokens,
        progress=work.progress,
        shares_prompts=enable_prompt_sharing(loaded),
    )
    logps[rows.unit >= 0] = scoring_pass(loaded, rows, measure=token_logps, settings=settings)[TOKEN_LOGPS]
    if work.writes:
        save_file({"logps": logps}, work.folder / SIGNAL)


def distributions(work: Work, *, model: ModelRef, view: TeacherView, precision: str) -> None:
    """A frozen model's distributions, or what an objective keeps of them."""
    distillation.distributions(
        work, prepared=load_pairs(work.inputs["pairs"]), model=model, view=view, precision=precision
    )


def generate(work: Work, *, model: ModelRef, generation: Generation, data: DataSpec, precision: str) -> None:
    """The pairs with one side rewritten by a model."""
    distillation.generate(
        work, prepared=load_pairs(work.inputs["pairs"]),
        originals={split: read_pairs(work, split, source) for split, source in splits_of(data).items()},
        model=model, generation=generation, data=data, precision=precision,
    )  # fmt: skip


def weights(work: Work, *, layout: Layout, seed: int) -> None:
    """Importance weights of every unit, with a summary and examples for the record."""
    weighting = layout.weighting
    assert weighting is not None
    prepared = load_pairs(work.inputs["pairs"])
    _, unit_starts = units_of(prepared, "student", layout.granularity)
    needs = find_strategy(weighting.strategy).needs
    found = {
        need.value: torch.from_numpy(
            unit_signal(
                prepared, need.value.partition("_")[0], load_signal(work.inputs[need.value]),
                granularity=layout.granularity, aggregate=layout.aggregate,
            )
        )
        for need in needs - {Signal.MARKS}
    }  # fmt: skip
    marks = _unit_marks(prepared, unit_starts, layout)
    is_end = end_units(prepared, unit_starts)
    result = span_weights(
        weighting.strategy, found, unit_starts=torch.from_numpy(unit_starts), is_end=torch.from_numpy(is_end),
        k=weighting.k, mu=weighting.mu, lower=weighting.lower, upper=weighting.upper,
        round_decimals=weighting.round_decimals, seed=seed,
        marks=None if marks is None else torch.from_numpy(marks),
    )  # fmt: skip
    values = np.asarray(result.weights.numpy(), dtype=np.float32)
    save_file({"weights": values}, work.folder / WEIGHTS)
    summary = weight_summary(result, unit_starts=unit_starts, is_end=is_end, marks=marks)
    examples = weight_examples(prepared, values, unit_starts) if layout.granularity == "spans" else []
    _write_json(work.folder / SUMMARY, {**summary, "examples": examples})


def train(
    work: Work, *, start: ModelRef, teachers: Sequence[ModelRef], objective: Objective, schedule: Schedule,
    learning_rate: float, seed: int, precision: str, swap: bool,
) -> None:  # fmt: skip
    """One training: SFT, a contrastive model, or a run."""
    prepared = load_pairs(work.inputs["pairs"])
    located = start.located("start", work.inputs)
    model: Any = load_model(
        located.folder, adapters=located.adapters, precision=schedule.lora.base if schedule.lora else "float32",
        device=work.runtime.torch_device(), revision=located.revision,
    )  # fmt: skip
    if schedule.lora is not None:
        model = add_lora(model, r=schedule.lora.r, alpha=schedule.lora.alpha, targets=schedule.lora.targets, seed=seed)
    configure_scorer(model)
    shares = (
        len(objective.sides) > 1 and not isinstance(objective, DistillationObjective) and enable_prompt_sharing(model)
    )
    split_rows = {
        split: _training_rows(work, prepared, start.role, objective, split=split, swap=swap, shares=shares)
        for split in sorted(set(prepared.split))
    }
    training: Training[Any]
    if isinstance(objective, DistillationObjective):
        both_rows, forward_pass, constants = distillation.distilled(
            work, prepared, objective, split_rows, student=located, teachers=teachers, precision=precision, seed=seed
        )
        training = Training(
            model=model, objective=objective, rows=both_rows["train"], eval_rows=both_rows.get("eval"),
            forward_pass=forward_pass, constants=constants,
        )  # fmt: skip
    else:
        training = Training(
            model=model, objective=objective, rows=split_rows["train"], eval_rows=split_rows.get("eval"),
            forward_pass=UnitPass(objective), constants=_clamped(work),
        )  # fmt: skip
    optimization = Optimization(schedule=schedule, learning_rate=learning_rate, seed=seed, precision=precision)
    done = fit(training, optimization, folder=work.folder / RESUME_FOLDER, settings=fit_settings(work))
    _save_trained(work, model)
    if not work.writes:
        return
    save_objective(objective, work.folder)
    if schedule.lora is not None:
        _write_json(work.folder / CHAIN, start.chain())
    else:
        tok = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
        tok.save_pretrained(str(work.folder / MODEL_FOLDER))
    _finish_training(work, done)


def load_pairs(folder: Path) -> PreparedPairs:
    """The prepared pairs of an artifact."""
    return from_arrays(load_file(folder / PAIRS), json.loads((folder / META).read_text(encoding="utf-8")))


def load_signal(folder: Path) -> NDArray[np.float32]:
    """The stored signal of an artifact, one value a token."""
    return np.asarray(load_file(folder / SIGNAL)["logps"], dtype=np.float32)


def fit_settings(work: Work) -> FitSettings:
    """How this machine trains."""
    runtime = work.runtime
    return FitSettings(
        device=runtime.torch_device(), micro_batch_tokens=runtime.micro_batch_tokens,
        checkpoint_seconds=runtime.checkpoint_seconds, report_to=runtime.report_to, progress=work.progress,
        fsdp=runtime.fsdp,
    )  # fmt: skip


def _training_rows(
    work: Work, prepared: PreparedPairs, role: str, objective: Objective, *, split: str, swap: bool, shares: bool
) -> ScoredRows:
    layout = objective.layout
    reference = None
    if layout.reference is not None:
        anchor = "teacher" if layout.reference == "teacher" else role
        reference = (anchor, load_signal(work.inputs["reference"]))
    weights = load_file(work.inputs["weights"] / WEIGHTS)["weights"] if "weights" in work.inputs else None
    rows = scored_rows(
        prepared,
        role=role,
        layout=layout,
        sides=objective.sides,
        split=split,
        swap=swap,
        reference=reference,
        weights=weights,
    )
    return dataclasses.replace(rows, shares_prompts=shares)


def _clamped(work: Work) -> dict[str, float]:
    if "weights" not in work.inputs:
        return {}
    summary = json.loads((work.inputs["weights"] / SUMMARY).read_text())
    return {f"weights/{name}": summary[name] for name in ("mean", "clamped_low", "clamped_high")}


def _unit_marks(prepared: PreparedPairs, unit_starts: NDArray[np.int64], layout: Layout) -> NDArray[np.int8] | None:
    """The data's marks per unit, neutral on end spans; only spans have characters."""
    if prepared.marks is None or layout.granularity != "spans":
        return None
    marks = np.zeros(int(unit_starts[-1]), dtype=np.int8)
    marks[~end_units(prepared, unit_starts)] = prepared.marks
    return marks


def splits_of(data: DataSpec) -> dict[str, PairSource]:
    """The sources of a recipe's pairs by split."""
    return {"train": data.train} | ({"eval": data.eval} if data.eval is not None else {})


def read_pairs(work: Work, split: str, source: PairSource) -> list[Pair]:
    """The pairs of one split: as given, or with a model's own responses where a stage has written them."""
    if "generated" in work.inputs:
        path = work.inputs["generated"] / GENERATED.format(split=split)
        return parse_pairs(read_rows(path), source=str(path))
    if source.hub is not None:
        assert source.split is not None
        assert source.revision is not None
        rows = read_hub(source.hub, config=source.name, split=source.split, revision=source.revision)
        return parse_pairs(rows, source=source.hub)
    path = Path(source.path).expanduser() if source.path else work.inputs["world"] / f"pairs_{source.testbed}.jsonl"
    return parse_pairs(read_rows(path), source=str(path))


def _side(work: Work, role: str, spec: ModelSpec, location: str | None) -> TemplatedTokenizer:
    folder = location if location is not None else str(work.inputs[f"{role}.tokenizer"] / MODEL_FOLDER)
    tok = load_tokenizer(folder, revision=spec.revision)
    if isinstance(spec.template, PlainSpec):
        plain = spec.template
        return TemplatedTokenizer(
            tok, PlainTemplate(user=plain.user, assistant=plain.assistant, system=plain.system), name=role
        )
    return TemplatedTokenizer(tok, ChatTemplate(tok, variables=dict(spec.template_variables)), name=role)


def _corpus(work: Work, corpus: str) -> list[str]:
    lines = (work.inputs["world"] / f"corpus_{corpus}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _save_trained(work: Work, model: Any) -> None:
    """The weights, from the one process that writes; all of them hand in their shares."""
    state = whole_state(model)
    if work.writes:
        save_model(model, work.folder / MODEL_FOLDER, state=state)


def _finish_training(work: Work, done: Fit) -> None:
    """Write the history; the resume states have served."""
    _write_json(work.folder / TRAINING, to_plain(done))
    shutil.rmtree(work.folder / RESUME_FOLDER, ignore_errors=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
