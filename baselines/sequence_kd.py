"""Sequence-level distillation: fine-tuning on the teacher's own answers (Kim & Rush, EMNLP 2016; docs/method.md#sequence-level-distillation).

The pipeline generates the teacher's answer to each prompt, which replaces the chosen response (`generation`); the
student's tokenizer tokenizes the text again, so the two models need not share one.
"""

from typing import final

from baselines.sft import cross_entropy
from ctpd.core.config import Config
from ctpd.objectives.base import Generation, Layout, PairObjective, Sums, Units


class SequenceKDParams(Config):
    """There is nothing to choose: how the teacher answers is the generation's affair."""


@final
class SequenceKD(PairObjective):
    """Cross-entropy of the teacher's answer and its end token: `baselines.sft` on other texts."""

    params_type = SequenceKDParams
    counts = "tokens"
    sides = ("chosen",)
    generation = Generation(role="teacher", side="chosen")

    def __init__(self, params: SequenceKDParams) -> None:
        super().__init__()
        self.params = params
        self.layout = Layout(granularity="tokens")

    def forward(self, units: Units) -> Sums:
        return cross_entropy(units)
