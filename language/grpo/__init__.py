"""Group-relative policy optimisation with rewards that can be checked."""

from __future__ import annotations

from language.grpo.data import QuestionDataModule
from language.grpo.module import GRPOTuner, clipped_objective

__all__ = ["GRPOTuner", "QuestionDataModule", "clipped_objective"]
