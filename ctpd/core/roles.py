"""The two models of an experiment, and the phases of their training that are read as frozen models."""

from typing import Literal

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")

Phase = Literal["reference", "positive", "negative"]
"""After supervised fine-tuning, or one of the contrastive pair."""
