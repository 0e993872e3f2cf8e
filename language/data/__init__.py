"""Rows of text, rendered, tokenised, split and packed."""

from __future__ import annotations

from language.data.module import InstructionDataModule

__all__ = ["InstructionDataModule"]
