"""Floating-point operations of training and of scoring passes (docs/scale.md#operations).

A matrix of n weights takes 2 n operations a token in a forward pass and 4 n in a backward one: gradients of what went in, and of
the weights (Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 6 N a token). Attention takes 4 L H Q T a token in a forward
pass over T tokens, for scores and for sums of values, and twice that in a backward one (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B: 6 N + 12 L H Q T a token).
"""

from typing import NamedTuple


class Work(NamedTuple):
    """The tokens that a model reads.

    Attributes:
        tokens: of all rows.
        squares: the sum of the squares of the rows' lengths.
    """

    tokens: float
    squares: float

    def times(self, factor: float) -> "Work":
        """So many times the same."""
        return Work(self.tokens * factor, self.squares * factor)


class Multiplied(NamedTuple):
    """What of a model is multiplied with every token.

    Attributes:
        weights: N, all but the input embeddings; of experts those that a token is sent to.
        adapters: weights of LoRA adapters, beside them.
        attention: L H Q, the channels of all heads of all layers whose tokens attend to each other.
    """

    weights: float
    attention: float
    adapters: float = 0


def forward(model: Multiplied, work: Work) -> float:
    """Operations of a pass without gradient."""
    return 2 * (model.weights + model.adapters) * work.tokens + 4 * model.attention * work.squares


def training(model: Multiplied, work: Work, *, checkpointing: bool) -> float:
    """Operations of forward and backward passes.

    Frozen weights, where there are adapters, need no gradient of their own: 4 N a token, not 6 N. Activation checkpointing is a
    second forward pass.

    Args:
        model: the model.
        work: what it reads.
        checkpointing: whether activations are computed twice.
    """
    of_weights = 2 * (model.weights * (1 if model.adapters else 2) + 2 * model.adapters) * work.tokens
    backward = of_weights + 8 * model.attention * work.squares
    return forward(model, work) * (2 if checkpointing else 1) + backward
