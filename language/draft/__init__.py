"""Drafts for speculative decoding."""

from __future__ import annotations

from language.draft.module import DraftTuner, merged_draft

__all__ = ["DraftTuner", "merged_draft"]
