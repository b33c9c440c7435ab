"""The vocabularies of teacher and student: facts that distillation objectives need, and aligned tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ctpd.core.errors import UserError
from ctpd.models import model_sizes
from ctpd.objectives.base import TeacherView
from ctpd.objectives.distillation import DistillationObjective, ModelFacts
from ctpd.pipeline.references import LocatedModel
from ctpd.pipeline.rows import scored_positions, scored_rows
from ctpd.text.blocks import TokenRows
from ctpd.text.edit_distance import edit_distance_pairing
from ctpd.text.prepare import PreparedPairs
from ctpd.train.collator import ScoredRows
from ctpd.train.distillation import DistillRows
from ctpd.train.scoring import TOP_LOGPS


class BothFacts(NamedTuple):
    """The facts of both models."""

    student: ModelFacts
    teacher: ModelFacts


def model_facts(located: LocatedModel) -> ModelFacts:
    """Vocabulary and sizes of a model, from its configuration and tokenizer alone."""
    tokenizer: Any = located.load_tokenizer()
    vocab_size, hidden_size = model_sizes(located.folder, revision=located.revision)
    # A tokenizer may have more ids than the model has logits: tokens without a logit are not part of its vocabulary.
    tokens = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), vocab_size)))
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ModelFacts(
        tokens=tuple("" if token is None else token for token in tokens),
        special_ids=frozenset(i for i in {*tokenizer.all_special_ids, *added} if i < vocab_size),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


def bind_objective(
    objective: DistillationObjective[Any], *, student: LocatedModel, teacher: LocatedModel, seed: int
) -> BothFacts:
    """Read the facts of both models and bind the objective to them: it builds token maps and parameters.

    Raises:
        UserError: the objective compares token by token, and the models have two tokenizers.
    """
    facts = BothFacts(model_facts(student), model_facts(teacher))
    assert objective.teacher is not None
    if objective.teacher.same_tokenizer:
        refuse_other_tokenizer(facts.student, facts.teacher)
    torch.manual_seed(seed)  # the initial values of an objective's parameters
    objective.bind(facts.student, facts.teacher)
    return facts


def refuse_other_tokenizer(student: ModelFacts, teacher: ModelFacts) -> None:
    """Refuse two vocabularies where an objective compares them token by token."""
    if tuple(student.tokens) != tuple(teacher.tokens):
        raise UserError(
            "the method compares distributions token by token, and teacher and student have different tokenizers",
            fix="Use a method that works across tokenizers (CTPD, sequence KD, ULD, ALM, GOLD, X-Token, DSKD with "
            "cross-model attention, Multi-Level OT, MinED), or a student that shares the teacher's tokenizer",
        )


def distill_rows(
    prepared: PreparedPairs,
    objective: DistillationObjective[Any],
    student: Mapping[str, ScoredRows],
    *,
    facts: BothFacts,
    stored: Sequence[Mapping[str, NDArray[np.generic]]],
) -> dict[str, DistillRows]:
    """The rows of both models by split.

    Args:
        student: the student's rows by split.
        stored: the arrays of each teacher that is not in memory.
    """
    assert objective.teacher is not None
    used = np.unique(np.concatenate([rows.items.reshape(-1) for rows in student.values()]))
    aligned = aligned_tokens(prepared, objective.teacher, facts=facts, rows=used)
    return {
        split: DistillRows(
            student=rows,
            teacher=scored_rows(prepared, role="teacher", layout=objective.layout, sides=objective.sides, split=split),
            aligned=aligned,
            stored=tuple(stored),
        )
        for split, rows in student.items()
    }


def aligned_tokens(
    prepared: PreparedPairs, view: TeacherView, *, facts: BothFacts, rows: NDArray[np.int64]
) -> NDArray[np.int32]:
    """For each token of the student the index of its aligned token among the scored ones of the teacher's row, or -1.

    Args:
        rows: the rows that are trained or evaluated on; tokens of other rows get -1.
    """
    student, teacher = prepared.student, prepared.teacher
    result = np.full(len(student.input_ids), -1, dtype=np.int32)
    if view.pairing == "none":
        return result
    for row in rows.tolist():
        ours, theirs = scored_positions(student, row), scored_positions(teacher, row)
        if view.pairing == "position":
            index = np.arange(len(ours))
            found = np.where(index < len(theirs), index, -1)
        else:
            # The strings that are compared are those at the predicting positions (docs/method.md#mined).
            found = np.array(
                edit_distance_pairing(
                    [facts.student.tokens[i] for i in student.input_ids[ours - 1]],
                    [facts.teacher.tokens[i] for i in teacher.input_ids[theirs - 1]],
                )
            )
        if view.skip_last and len(found):
            found[-1] = -1
        result[ours] = found
    return result


def dropped_mass(teacher: TokenRows, stored: Mapping[str, NDArray[np.generic]], items: NDArray[np.int64]) -> float:
    """Mean probability mass of the tokens that were not stored, over the scored tokens of the trained rows."""
    row = np.repeat(np.arange(len(teacher.row_starts) - 1), np.diff(teacher.row_starts))[teacher.unit >= 0]
    kept = np.exp(stored[TOP_LOGPS][np.isin(row, items)].astype(np.float64)).sum(axis=1)
    return float(np.clip(1.0 - kept, 0.0, None).mean())
