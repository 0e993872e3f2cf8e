"""Small folders of noise images, and data modules that read them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vision.data import CIFARDataModule

CLASSES = ["bee", "cat", "dog"]


def noise(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A distinct image per seed, without mirror symmetry."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def contents(split: str, per_class: int) -> dict[str, bytes]:
    """Encoded images by ``class/file`` name; distinct over both splits."""
    start = {"train": 0, "test": 5000}[split]
    return {
        f"{name}/{i:04d}.png": png(noise(start + 100 * label + i))
        for label, name in enumerate(CLASSES)
        for i in range(per_class)
    }


def write_folder(root: Path, train: int = 20, test: int = 4) -> Path:
    for split, per_class in (("train", train), ("test", test)):
        for name, data in contents(split, per_class).items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def module(root: Path, **changes) -> CIFARDataModule:
    return CIFARDataModule(**{"root": str(root), "source": "folder", "image_size": 16, "batch_size": 8} | changes)


def fitted(root: Path, **changes) -> CIFARDataModule:
    data = module(root, **changes)
    data.setup("fit")
    return data


def batches(loader) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a loader, in order."""
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def pixels(loader) -> list[bytes]:
    """What identifies each stored image of a loader's data set."""
    return [image.tobytes() for image in loader.dataset.images]
