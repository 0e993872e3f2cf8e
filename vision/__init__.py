"""ViT on CIFAR with adapters: `python -m vision fit --config configs/vision/...`."""

from vision.data import CIFARDataModule
from vision.module import ViTClassifier

__all__ = ["CIFARDataModule", "ViTClassifier"]
