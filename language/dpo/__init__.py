"""Direct preference optimisation."""

from language.dpo.data import PreferenceDataModule
from language.dpo.module import DPOTuner, PreferenceMetrics, preference_loss

__all__ = ["DPOTuner", "PreferenceDataModule", "PreferenceMetrics", "preference_loss"]
