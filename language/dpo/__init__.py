"""Direct preference optimisation."""

from __future__ import annotations

from language.dpo.data import PreferenceDataModule
from language.dpo.module import DPOTuner, preference_loss

__all__ = ["DPOTuner", "PreferenceDataModule", "preference_loss"]
