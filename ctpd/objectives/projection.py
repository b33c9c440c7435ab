"""A sparse matrix from one vocabulary to another, computed from the spellings of their tokens.

NeMo-RL's tools build theirs from tokenizers, embeddings and a Sinkhorn normalisation; the rules here are those of its
multi-token step, with a greedy segmentation instead of the teacher's tokenizer.

Shape legend: V the student's vocabulary, K pieces of a token at most, C shared tokens.
"""

from difflib import SequenceMatcher

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctpd.objectives.distillation import ModelFacts

_MAX_PIECES = 4  # NeMo's runtime top_k
_DECAY = 0.1  # weight of a piece relative to the one before
_LEAST_SIMILARITY = 0.4  # of special tokens
_RELAXED = 0.6  # least weight of a shared token in the relaxed form


def projection(student: ModelFacts, teacher: ModelFacts) -> tuple[Int[Tensor, "V K"], Float[Tensor, "V K"]]:
    """The teacher's ids that spell each of the student's tokens, first piece first, and their weights; -1 for none.

    A token of equal spelling is the only piece. Other tokens are cut into the longest pieces from the left, each with a
    tenth of the weight of the one before; a token that cannot be cut so has none. A special token without its equal
    goes to the special token of the most similar name: the ends of turn of two families have different names.
    """
    ids = {_plain(token): index for index, token in reversed(list(enumerate(teacher.tokens))) if token}
    specials = {teacher.tokens[index]: index for index in sorted(teacher.special_ids) if teacher.tokens[index]}
    pieces = torch.full((len(student.tokens), _MAX_PIECES), -1, dtype=torch.long)
    weights = torch.zeros(pieces.shape)
    for index, token in enumerate(student.tokens):
        if not token:
            continue
        found = _similar(token, specials) if index in student.special_ids else _pieces(_plain(token), ids)
        pieces[index, : len(found)] = torch.tensor(found, dtype=torch.long)
        if found:
            decay = torch.tensor([_DECAY**index for index in range(len(found))])
            weights[index, : len(found)] = decay / decay.sum()
    return pieces, weights


def shared_tokens(
    pieces_VK: Int[Tensor, "V K"], weights_VK: Float[Tensor, "V K"], *, relaxed: bool
) -> Int[Tensor, "2 C"]:
    """Ids of tokens that are taken for one: the student's, in order, and the teacher's; each at most once.

    Args:
        pieces_VK: the teacher's ids of each of the student's tokens, -1 for none.
        weights_VK: their weights.
        relaxed: the heaviest piece will do if its weight is at least 0.6; else it must be the only one. Of several
            tokens with the same piece, the one with the largest weight is taken, then the first.
    """
    best_V = weights_VK.argmax(1, keepdim=True)
    weight_V, target_V = weights_VK.gather(1, best_V)[:, 0], pieces_VK.gather(1, best_V)[:, 0]
    fits_V = weight_V >= _RELAXED if relaxed else (weight_V == 1.0) & (pieces_VK[:, 1] == -1)
    taken: dict[int, int] = {}
    candidates = (fits_V & (target_V >= 0)).nonzero()[:, 0]
    order = candidates[weight_V[candidates].argsort(descending=True, stable=True)]
    for source, target in zip(order.tolist(), target_V[order].tolist(), strict=True):
        taken.setdefault(target, source)
    pairs = sorted((source, target) for target, source in taken.items())
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T


def _plain(token: str) -> str:
    """One spelling of space and newline for byte-level and SentencePiece tokenizers."""
    return token.replace("▁", "Ġ").replace("<0x0A>", "Ċ").replace("\n", "Ċ")


def _pieces(token: str, ids: dict[str, int]) -> list[int]:
    found: list[int] = []
    start = 0
    while start < len(token):
        stop = next((stop for stop in range(len(token), start, -1) if token[start:stop] in ids), None)
        if stop is None:
            return []
        found.append(ids[token[start:stop]])
        start = stop
    return found[:_MAX_PIECES]


def _similar(token: str, specials: dict[str, int]) -> list[int]:
    if token in specials:
        return [specials[token]]
    scores = {index: SequenceMatcher(None, token, other).ratio() for other, index in specials.items()}
    best = max(scores, key=scores.__getitem__, default=None)
    return [best] if best is not None and scores[best] >= _LEAST_SIMILARITY else []
