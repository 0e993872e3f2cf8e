"""From encoded images to normalised batches: decoding, the in-memory store, and the data set.

timm.data and torchvision's transforms draw from the global random state. Here a flip is a pure function of (seed,
epoch, index), so that any number of workers and a resumed run give the same batches; damaged images are named.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lit_adapters.errors import DataError
from vision.sampling import flips

# Images of one size are kept decoded up to this many bytes; CIFAR's 50,000 take 150 MB.
MAX_DECODED_BYTES = 1 << 30


class EncodedImage(NamedTuple):
    """An image as stored.

    Attributes:
        name: The file's path, or where the bytes came from; named in messages.
        data: The encoded bytes, or None when they are to be read from the file `name`.
    """

    name: str
    data: bytes | None = None


def open_image(image: EncodedImage) -> Image.Image:
    """Decode to RGB.

    Raises:
        DataError: The image is missing or corrupt.
    """
    try:
        data = Path(image.name).read_bytes() if image.data is None else image.data
        return Image.open(io.BytesIO(data)).convert("RGB")
    # Pillow reports damaged files with all of these.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode image {image.name}: {error}; replace or remove it") from error


def decode(images: Sequence[EncodedImage], description: str) -> np.ndarray | list[EncodedImage]:
    """Decode all images of one size into memory; leave others encoded, to be decoded when used.

    Args:
        images: The images, at least one.
        description: Label of the progress bar, shown when decoding takes more than a second.

    Returns:
        uint8 array (n, height, width, 3) if all images have the same size and fit in `MAX_DECODED_BYTES`, else the
        images as they came, after a check of every header.

    Raises:
        DataError: An image is corrupt.
    """
    width, height = open_image(images[0]).size
    if len(images) * height * width * 3 > MAX_DECODED_BYTES:
        return _check_headers(images, description)
    pixels = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for i, image in enumerate(tqdm(images, desc=description, unit="image", delay=1.0)):
        decoded = open_image(image)
        if decoded.size != (width, height):
            return _check_headers(images, description)
        pixels[i] = np.asarray(decoded)
    return pixels


def _check_headers(images: Sequence[EncodedImage], description: str) -> list[EncodedImage]:
    for image in tqdm(images, desc=f"{description} (headers)", unit="image", delay=1.0):
        try:
            Image.open(image.name if image.data is None else io.BytesIO(image.data)).close()
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot decode image {image.name}: {error}; replace or remove it") from error
    return list(images)


class ImageDataset(Dataset):
    """Images with labels, as normalised tensors.

    An image becomes what `timm.data.create_transform(image_size, crop_pct=1.0, crop_mode="squash", ...)` makes of it,
    bit for bit: the whole image resized to a square, scaled to [0, 1], normalised per channel. A whole batch is
    normalised at once, which is about three times as fast as image by image.

    Samples are addressed by index, or by (epoch, index) pairs from an `EpochSampler`; the latter are mirrored at
    random when `flip_seed` is given.

    Args:
        images: A uint8 array (n, height, width, 3), or n encoded images.
        labels: Class indices, int64, shape (n,).
        image_size: Side S of the square output, pixels.
        mean: Per-channel mean, in [0, 1] units.
        std: Per-channel standard deviation, in [0, 1] units.
        interpolation: A timm interpolation name.
        flip_seed: Seeds the random flips; None for no flips.
    """

    def __init__(
        self,
        images: np.ndarray | Sequence[EncodedImage],
        labels: Tensor,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        interpolation: str,
        flip_seed: int | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.size = (image_size, image_size)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.resample = str_to_pil_interp(interpolation)
        self.flip_seed = flip_seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One sample: image (3, S, S) float32 and label, int64 scalar."""
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """A batch, already collated: images (B, 3, S, S) float32 and labels (B,) int64."""
        pixels = np.empty((len(keys), *self.size, 3), dtype=np.uint8)
        indices = []
        for row, key in enumerate(keys):
            # A bare index comes from Lightning's `overfit_batches`, which asks for batches that never change.
            epoch, index = key if isinstance(key, tuple) else (None, key)
            image = np.asarray(self._pil(index).resize(self.size, self.resample))
            mirror = self.flip_seed is not None and epoch is not None and flips(self.flip_seed, epoch, index)
            pixels[row] = image[:, ::-1] if mirror else image
            indices.append(index)
        batch = torch.empty(len(keys), 3, *self.size).copy_(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        return batch.div_(255).sub_(self.mean).div_(self.std), self.labels[indices]

    def _pil(self, index: int) -> Image.Image:
        image = self.images[index]
        return open_image(image) if isinstance(image, EncodedImage) else Image.fromarray(image)


def keep_batch(batch: Any) -> Any:
    """Collate function for `ImageDataset`, whose batches come collated."""
    return batch
