"""ViT on CIFAR with adapters: `python -m vision fit --config configs/vision/...`."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision.data import CIFARDataModule
    from vision.module import ViTClassifier

__all__ = ["CIFARDataModule", "ViTClassifier"]

_MODULES = {"CIFARDataModule": "vision.data", "ViTClassifier": "vision.module"}


def __getattr__(name: str) -> Any:
    """Import a public class at its first use: Lightning and timm take seconds."""
    if name in _MODULES:
        return pkgutil.resolve_name(f"{_MODULES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
