"""What distillation needs beside pairs: stored distributions, generated responses, partners of tokens, teachers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from ctpd.core.errors import UserError
from ctpd.core.recipe import DataSpec
from ctpd.decoding import greedy_responses
from ctpd.models import load_model, load_tokenizer, model_sizes
from ctpd.objectives.base import Generation, TeacherView
from ctpd.objectives.distillation import DistillationObjective, ModelFacts
from ctpd.ops.boundaries import boundary_ids
from ctpd.pipeline.graph import Work
from ctpd.pipeline.references import WRITTEN, LocatedModel, ModelRef
from ctpd.pipeline.rows import scored_rows, token_rows
from ctpd.probes import configure_scorer
from ctpd.text.blocks import TokenRows
from ctpd.text.edit_distance import edit_distance_pairing
from ctpd.text.pairs import Pair
from ctpd.text.prepare import PreparedPairs
from ctpd.train.batches import DistillInputs
from ctpd.train.collator import ScoredRows
from ctpd.train.distillation import DistillPass, DistillRows
from ctpd.train.scoring import TOP_LOGPS, ScoringSettings, logps_with_boundary, scoring_pass, top_k
from ctpd.train.sharing import enable_prompt_sharing
from ctpd.train.trainer import ForwardPass

DISTRIBUTIONS, GENERATED = "distributions.safetensors", "pairs_{split}.jsonl"


def distributions(work: Work, *, prepared: PreparedPairs, model: ModelRef, view: TeacherView, precision: str) -> None:
    """What an objective keeps of a frozen model's distributions at every scored token, in one scoring pass."""
    located = model.located("model", work.inputs)
    loaded = frozen_model(work, located, precision)
    rows = token_rows(prepared, model.role)
    if view.boundary:
        facts = facts_of(located)
        measure = logps_with_boundary(boundary_ids(facts.tokens, facts.special_ids))
    else:
        assert view.top_k is not None
        measure = top_k(view.top_k, view.temperature)
    settings = ScoringSettings(
        max_tokens=work.runtime.signal_batch_tokens,
        progress=work.progress,
        shares_prompts=enable_prompt_sharing(loaded),
    )
    kept = scoring_pass(loaded, rows, measure=measure, settings=settings)
    if work.writes:
        save_file(kept, work.folder / DISTRIBUTIONS)


def distilled(
    work: Work, prepared: PreparedPairs, objective: DistillationObjective[Any], rows: Mapping[str, ScoredRows], *,
    student: LocatedModel, teachers: Sequence[ModelRef], precision: str, seed: int,
) -> tuple[dict[str, DistillRows], ForwardPass[DistillInputs], dict[str, float]]:  # fmt: skip
    """The rows of both models, the forward pass and constant metrics; binds the objective to both models.

    Raises:
        UserError: the objective asks for one tokenizer, and the models have two.
    """
    view = objective.teacher
    assert view is not None
    located = [teacher.located(f"teacher{number}", work.inputs) for number, teacher in enumerate(teachers)]
    ours, theirs = facts_of(student), facts_of(located[0])
    if view.same_tokenizer:
        refuse_other_tokenizer(ours, theirs)
    torch.manual_seed(seed)  # the initial values of an objective's parameters
    objective.bind(ours, theirs)
    stored = [load_file(work.inputs[name] / DISTRIBUTIONS) for name in sorted(work.inputs) if name.startswith("stored")]
    used = np.unique(np.concatenate([mine.items.reshape(-1) for mine in rows.values()]))
    partner = partners(prepared, view, facts=(ours, theirs), rows=used)
    made = {
        split: DistillRows(
            student=mine,
            teacher=scored_rows(prepared, role="teacher", layout=objective.layout, sides=objective.sides, split=split),
            aligned=partner,
            stored=tuple(stored),
        )
        for split, mine in rows.items()
    }
    in_memory: list[nn.Module] = [] if stored else [frozen_model(work, where, precision) for where in located]
    for model in in_memory:
        model.requires_grad_(False)
    constants = {}
    if view.top_k is not None:
        constants["teacher/dropped_mass"] = dropped_mass(prepared.teacher, stored[0][TOP_LOGPS], rows["train"].items)
    return made, DistillPass(objective, in_memory), constants


def refuse_other_tokenizer(student: ModelFacts, teacher: ModelFacts) -> None:
    """Refuse two vocabularies where an objective compares them token by token."""
    if tuple(student.tokens) != tuple(teacher.tokens):
        raise UserError(
            "the method compares distributions token by token, and teacher and student have different tokenizers",
            fix="Use a method that works across tokenizers (CTPD, sequence KD, ULD, ALM, GOLD, X-Token, DSKD with cross-model "
            "attention, Multi-Level OT, MinED), or a student that shares the teacher's tokenizer",
        )


def partners(
    prepared: PreparedPairs, view: TeacherView, *, facts: tuple[ModelFacts, ModelFacts], rows: NDArray[np.int64]
) -> NDArray[np.int32]:
    """For each token of the student the place of its partner among the scored ones of the teacher's row, or -1.

    Args:
        rows: the rows that are trained or evaluated on; the others get no partners.
    """
    student, teacher = prepared.student, prepared.teacher
    result = np.full(len(student.input_ids), -1, dtype=np.int32)
    if view.pairing == "none":
        return result
    for row in rows.tolist():
        mine, theirs = _scored(student, row), _scored(teacher, row)
        if view.pairing == "position":
            place = np.arange(len(mine))
            found = np.where(place < len(theirs), place, -1)
        else:
            # The strings compared are those at the predicting positions (BASELINES 5.1).
            found = np.array(
                edit_distance_pairing(
                    [facts[0].tokens[i] for i in student.input_ids[mine - 1]],
                    [facts[1].tokens[i] for i in teacher.input_ids[theirs - 1]],
                )
            )
        if view.skip_last and len(found):
            found[-1] = -1
        result[mine] = found
    return result


def dropped_mass(teacher: TokenRows, logps_MK: NDArray[np.float32], items: NDArray[np.int64]) -> float:
    """The mean probability of what was not kept, over the scored tokens of the rows that are trained on."""
    row = np.repeat(np.arange(len(teacher.row_starts) - 1), np.diff(teacher.row_starts))[teacher.unit >= 0]
    kept = np.exp(logps_MK[np.isin(row, items)].astype(np.float64)).sum(axis=1)
    return float(np.clip(1.0 - kept, 0.0, None).mean())


def _scored(rows: TokenRows, row: int) -> NDArray[np.int64]:
    start, end = rows.row_starts[row], rows.row_starts[row + 1]
    return np.asarray(np.flatnonzero(rows.unit[start:end] >= 0) + start, dtype=np.int64)


def facts_of(located: LocatedModel) -> ModelFacts:
    """Vocabulary and sizes of a model, from its configuration and tokenizer alone."""
    tokenizer: Any = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
    vocab_size, hidden_size = model_sizes(located.folder, revision=located.revision)
    # A tokenizer may have more ids than the model has logits: what cannot be predicted is no part of its vocabulary.
    spelled = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), vocab_size)))
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ModelFacts(
        tokens=tuple("" if token is None else token for token in spelled),
        special_ids=frozenset(i for i in {*tokenizer.all_special_ids, *added} if i < vocab_size),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


def generate(
    work: Work, *, prepared: PreparedPairs, originals: Mapping[str, Sequence[Pair]], model: ModelRef,
    generation: Generation, data: DataSpec, precision: str,
) -> None:  # fmt: skip
    """The pairs with one side rewritten by a model: greedy, until its end of turn.

    Left out and counted: responses that do not end within `max_tokens`, empty ones, and those equal to the other side.

    Raises:
        UserError: more than `max_dropped` of the responses are left out, or no response of the data has an end of turn.
    """
    located = model.located("model", work.inputs)
    loaded = frozen_model(work, located, precision)
    tokenizer: Any = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
    rows = token_rows(prepared, model.role)
    prompts = [rows.input_ids[rows.row_starts[2 * i] : _scored(rows, 2 * i)[0]] for i in range(len(prepared.pair_ids))]
    if not prepared.has_end.any():
        raise UserError(
            "every response of the data is cut at `max_tokens`: nothing shows by which token a turn ends",
            fix="Raise `max_tokens`",
        )
    end_token = int(rows.input_ids[rows.row_starts[1:][prepared.has_end] - 1][0])
    written = greedy_responses(loaded, prompts, end_token=end_token, max_tokens=data.max_tokens, progress=work.progress)
    known = {(split, pair.id): pair for split, pairs in originals.items() for pair in pairs}
    counts: Counter[str] = Counter()
    lines: dict[str, list[str]] = {split: [] for split in originals}
    for split, pair_id, ids in zip(prepared.split, prepared.pair_ids, written, strict=True):
        pair = known[split, pair_id]
        text = "" if ids is None else tokenizer.decode(ids, skip_special_tokens=True).strip()
        sides = {"chosen": pair.chosen, "rejected": pair.rejected} | {generation.side: text}
        problems = {"unfinished": ids is None, "empty": not text, "equal": len(set(sides.values())) < len(sides)}
        reason = next((name for name, found in problems.items() if found), "kept")
        counts[reason] += 1
        if reason == "kept":
            messages = {"prompt": [m._asdict() for m in pair.prompt]}
            messages |= {side: [{"role": "assistant", "content": content}] for side, content in sides.items()}
            lines[split].append(json.dumps(messages, ensure_ascii=False))
    _refuse_losses(counts, generation, data)
    for split, of_split in lines.items():
        (work.folder / GENERATED.format(split=split)).write_text("\n".join([*of_split, ""]), encoding="utf-8")
    (work.folder / WRITTEN).write_text(json.dumps(dict(counts)))


def _refuse_losses(counts: Counter[str], generation: Generation, data: DataSpec) -> None:
    lost = counts.total() - counts["kept"]
    if lost > data.max_dropped * counts.total():
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()) if reason != "kept")
        raise UserError(
            f"of {counts.total()} responses that the {generation.writer} wrote, {lost} cannot be used ({reasons}), more than "
            f"`max_dropped: {data.max_dropped}` allows",
            fix="A model whose answers do not end needs more fine-tuning, or a larger `max_tokens`; raise `max_dropped` if the "
            "loss is meant",
        )


def frozen_model(work: Work, located: LocatedModel, precision: str) -> nn.Module:
    """A model that is only read, on the device of the work, its scorer probed."""
    model = load_model(
        located.folder, adapters=located.adapters, precision=precision, device=work.runtime.torch_device(),
        revision=located.revision,
    )  # fmt: skip
    configure_scorer(model)
    return model
