"""Cross-tokenizer preference distillation: the trainer, its baselines and the benchmark.

The public names are imported on first use; importing `ctpd` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AlignedSpans": "ctpd.text.align",
    "DistillationObjective": "ctpd.objectives.distillation",
    "Objective": "ctpd.objectives.base",
    "PairObjective": "ctpd.objectives.base",
    "RowObjective": "ctpd.objectives.distillation",
    "PreferenceTrainer": "ctpd.train.trainer",
    "UserError": "ctpd.core.errors",
    "align_spans": "ctpd.text.align",
    "load_recipe": "ctpd.recipe",
    "plan": "ctpd.app",
    "run": "ctpd.app",
    "score": "ctpd.models",
    "span_weights": "ctpd.ops.weights",
}

__all__ = [
    *_PUBLIC,
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ctpd' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
