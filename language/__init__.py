"""Instruction tuning of causal language models: data, module and evaluation."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

import lit_adapters.renamed  # noqa: F401  so that old names of our modules can be imported

if TYPE_CHECKING:
    from language.data.module import InstructionDataModule
    from language.module import CausalLMTuner

__all__ = ["CausalLMTuner", "InstructionDataModule"]

_MODULES = {"CausalLMTuner": "language.module", "InstructionDataModule": "language.data.module"}


def __getattr__(name: str) -> Any:
    """Import a public class at its first use: Lightning and transformers take seconds."""
    if name in _MODULES:
        return pkgutil.resolve_name(f"{_MODULES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
