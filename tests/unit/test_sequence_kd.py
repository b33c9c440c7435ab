"""Sequence-level distillation is fine-tuning on responses that the teacher generated."""

import torch

from baselines.sequence_kd import SequenceKD, SequenceKDParams
from baselines.sft import SFT, SFTParams
from ctpd.objectives.base import Generation, Units
from tests.fixtures.distillation import VECTORS

CE_SUM = 11.817973300857895  # golden ce.dskd: same logits and labels as the divergences


def golden_units():
    inputs = VECTORS["divergence.forward_kl.dskd"]["inputs"]
    labels = torch.tensor(inputs["label"])
    logps = torch.tensor(inputs["student_logits"], dtype=torch.float64).log_softmax(-1)
    return Units(policy=logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0], mask=labels >= 0)


def test_the_loss_equals_the_public_cross_entropy_and_that_of_sft():
    sums, sft = (objective(golden_units()) for objective in (SequenceKD(SequenceKDParams()), SFT(SFTParams())))
    torch.testing.assert_close(sums.loss, torch.tensor(CE_SUM, dtype=torch.float64), atol=1e-9, rtol=0)
    assert int(sums.count) == 4
    assert float(sums.loss) == float(sft.loss)


def test_it_asks_for_the_teachers_answers():
    objective = SequenceKD(SequenceKDParams())
    assert objective.generation == Generation(role="teacher", side="chosen")
