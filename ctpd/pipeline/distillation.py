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
from ctpd.models import load_model, load_tokenizer, model_sizes, probe_scorer
from ctpd.objectives.base import Generation, TeacherView
from ctpd.objectives.distillation import DistillationObjective, ModelFacts
from ctpd.ops.boundaries import boundary_ids
from ctpd.pipeline.graph import Work
from ctpd.pipeline.references import LocatedModel, ModelRef
from ctpd.pipeline.rows import scored_rows, token_rows
from ctpd.text.blocks import TokenRows
from ctpd.text.edit_distance import edit_distance_pairing
from ctpd.text.pairs import Pair
from ctpd.text.prepare import PreparedPairs
from ctpd.train.collator import ScoredRows
from ctpd.train.distill import TOP_LOGPS, DistillPass, DistillRows
from ctpd.train.sweep import sweep, top, with_boundary
from ctpd.train.trainer import ForwardPass, Rows

DISTRIBUTIONS, DROPPED, GENERATED = "distributions.safetensors", "dropped.json", "pairs_{split}.jsonl"


def distributions(work: Work, *, prepared: PreparedPairs, model: ModelRef, view: TeacherView, precision: str) -> None:
    """What an objective keeps of a frozen model's distributions at every scored token, in one sweep."""
    located = model.located("model", work.inputs)
    loaded = _loaded(work, located, precision)
    rows = token_rows(prepared, model.role)
    if view.boundary:
        facts = facts_of(located)
        measure = with_boundary(boundary_ids(facts.tokens, facts.special_ids))
    else:
        assert view.top_k is not None
        measure = top(view.top_k, view.temperature)
    kept = sweep(
        loaded, rows.input_ids, rows.row_starts, rows.unit >= 0, measure=measure,
        max_tokens=work.runtime.signal_batch_tokens, progress=work.progress,
    )  # fmt: skip
    save_file(kept, work.folder / DISTRIBUTIONS)
    mass = 1.0 - np.exp(kept[TOP_LOGPS].astype(np.float64)).sum(axis=1) if TOP_LOGPS in kept else np.zeros(1)
    summary = {"dropped_mass": float(mass.mean().clip(min=0.0)), "dropped_mass_max": float(mass.max().clip(min=0.0))}
    (work.folder / DROPPED).write_text(json.dumps(summary))


def distilled(
    work: Work, prepared: PreparedPairs, objective: DistillationObjective, rows: Mapping[str, ScoredRows], *,
    student: LocatedModel, teachers: Sequence[ModelRef], precision: str, seed: int,
) -> tuple[dict[str, Rows], ForwardPass, dict[str, float]]:  # fmt: skip
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
    partner = partners(prepared, view, facts=(ours, theirs))
    made: dict[str, Rows] = {
        split: DistillRows(
            student=mine,
            teacher=scored_rows(prepared, role="teacher", layout=objective.layout, sides=objective.sides, split=split),
            partner=partner,
            stored=tuple(stored),
        )
        for split, mine in rows.items()
    }
    in_memory: list[nn.Module] = [] if stored else [_loaded(work, where, precision) for where in located]
    for model in in_memory:
        model.requires_grad_(False)
    constants = {}
    if view.top_k is not None:
        constants["teacher/dropped_mass"] = json.loads((work.inputs["stored0"] / DROPPED).read_text())["dropped_mass"]
    return made, DistillPass(objective, in_memory), constants


def refuse_other_tokenizer(student: ModelFacts, teacher: ModelFacts) -> None:
    """Refuse two vocabularies where an objective compares them token by token."""
    if tuple(student.tokens) != tuple(teacher.tokens):
        raise UserError(
            "the method compares distributions token by token, and teacher and student have different tokenizers",
            fix="Use a method that works across tokenizers (CTPD, ULD, ALM, GOLD, DSKD with cross-model attention, "
            "Multi-Level OT, MinED), or a student that shares the teacher's tokenizer",
        )


def partners(prepared: PreparedPairs, view: TeacherView, *, facts: tuple[ModelFacts, ModelFacts]) -> NDArray[np.int32]:
    """For each token of the student the place of its partner among the scored ones of the teacher's row, or -1."""
    student, teacher = prepared.student, prepared.teacher
    result = np.full(len(student.input_ids), -1, dtype=np.int32)
    if view.pairing == "none":
        return result
    for row in range(len(student.row_starts) - 1):
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


def _scored(rows: TokenRows, row: int) -> NDArray[np.int64]:
    start, end = rows.row_starts[row], rows.row_starts[row + 1]
    return np.asarray(np.flatnonzero(rows.unit[start:end] >= 0) + start, dtype=np.int64)


def facts_of(located: LocatedModel) -> ModelFacts:
    """Vocabulary and sizes of a model, from its configuration and tokenizer alone."""
    tokenizer: Any = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
    vocab_size, hidden_size = model_sizes(located.folder, revision=located.revision)
    spelled = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return ModelFacts(
        tokens=tuple("" if token is None else token for token in spelled),
        special_ids=frozenset(tokenizer.all_special_ids),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


def generate(
    work: Work, *, prepared: PreparedPairs, originals: Mapping[str, Sequence[Pair]], model: ModelRef,
    generation: Generation, data: DataSpec, precision: str,
) -> None:  # fmt: skip
    """The pairs with one side rewritten by a model: greedy, until its end of turn.

    Left out and counted: responses that do not end within `max_tokens`, empty ones, and those equal to the other side.
    """
    located = model.located("model", work.inputs)
    loaded = _loaded(work, located, precision)
    tokenizer: Any = load_tokenizer(located.tokenizer, revision=located.tokenizer_revision)
    rows = token_rows(prepared, model.role)
    prompts = [rows.input_ids[rows.row_starts[2 * i] : _scored(rows, 2 * i)[0]] for i in range(len(prepared.pair_ids))]
    end_token = int(rows.input_ids[rows.row_starts[1:][prepared.has_end] - 1][0])
    written = _greedy(loaded, prompts, end_token=end_token, max_tokens=data.max_tokens, work=work)
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
    for split, of_split in lines.items():
        (work.folder / GENERATED.format(split=split)).write_text("\n".join([*of_split, ""]), encoding="utf-8")
    (work.folder / DROPPED).write_text(json.dumps(dict(counts)))


@torch.no_grad()
def _greedy(
    model: Any, prompts: Sequence[NDArray[np.int32]], *, end_token: int, max_tokens: int, work: Work, batch: int = 32
) -> list[list[int] | None]:
    """The likeliest continuation of each prompt without its end token; None if it did not end."""
    device = next(model.parameters()).device
    result: list[list[int] | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), end_token, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(chosen):
            ids[place, width - len(prompts[i]) :] = torch.from_numpy(prompts[i].astype(np.int64))
            mask[place, width - len(prompts[i]) :] = 1
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None,
            max_new_tokens=max_tokens - min(len(prompts[i]) for i in chosen), eos_token_id=end_token, pad_token_id=end_token,
        )[:, width:].tolist()  # fmt: skip
        for i, tokens in zip(chosen, out, strict=True):
            own = tokens[: max_tokens - len(prompts[i])]
            result[i] = own[: own.index(end_token)] if end_token in own else None
        work.progress(start + len(chosen), len(order))
    return result


def _loaded(work: Work, located: LocatedModel, precision: str) -> nn.Module:
    model = load_model(
        located.folder, adapters=located.adapters, precision=precision, device=work.runtime.torch_device(),
        revision=located.revision,
    )  # fmt: skip
    probe_scorer(model)
    return model
