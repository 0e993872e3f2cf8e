"""Rows of text, rendered, tokenised, split and packed."""

from language.data.module import InstructionDataModule

__all__ = ["InstructionDataModule"]
