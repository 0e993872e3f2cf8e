"""From encoded images to normalised batches: decoding, the in-memory store, and the data set.

timm.data and torchvision's transforms draw from the global random state. Here a flip is a pure function of (seed,
epoch, index), so that any number of workers and a resumed run give the same batches; damaged images are named.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lit_adapters.errors import DataError
from vision.sampling import flips

# Images of one size are kept decoded up to this many bytes; CIFAR's 50,000 take 150 MB.
MAX_DECODED_BYTES = 1 << 30
# Not all that Pillow knows: its EPS reader starts Ghostscript.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class EncodedImage(NamedTuple):
    """An image as stored.

    Attributes:
        name: The file's path, or where the bytes came from; named in messages.
        data: The encoded bytes, or None when they are to be read from the file `name`.
    """

    name: str
    data: bytes | None = None


def open_image(image: EncodedImage) -> Image.Image:
    """Decode to RGB, as a viewer shows the image: the first frame, turned as its EXIF data say, over white.

    Grey values of 16 bits keep their order: the whole range becomes 0 to 255. Floating-point values must lie between 0
    and 1.

    Raises:
        DataError: The image is missing, corrupt, no regular file, larger than Pillow's bound of 179 million pixels, or
            has values whose range is not known.
    """
    return _read(image)[0]


def _read(image: EncodedImage, check_only: bool = False) -> tuple[Image.Image, bool]:
    """The decoded image, and whether it has further frames.

    With `check_only` a JPEG is decoded at an eighth of its size. This reads all its bytes and takes half the time.
    """
    try:
        if image.data is None:
            _check_regular(image.name)
        with open(image.name, "rb") if image.data is None else io.BytesIO(image.data) as file:
            opened = Image.open(file, formats=FORMATS)
            if check_only:
                opened.draft("RGB", (1, 1))
            frames = bool(getattr(opened, "is_animated", False)) and opened.format != "MPO"  # a photo with previews
            return _to_rgb(opened), frames
    except DataError:
        raise
    except Exception as error:  # Pillow reports damage with nearly every kind of exception
        raise DataError(f"cannot decode image {image.name}: {error}; replace or remove it") from error


def _check_regular(name: str) -> None:
    """Refuse a pipe or a device, which might never end."""
    if not stat.S_ISREG(Path(name).stat().st_mode):
        raise DataError(f"image {name} is no regular file (a folder, a pipe or a device): remove it")


def _to_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey_values(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_values(image: Image.Image) -> np.ndarray:
    """Grey values of 16 bits, or floating-point ones in [0, 1], as uint8.

    Pillow's own `convert` cuts them off at 255.

    Raises:
        ValueError: The range of the values is not known.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF: 258 is the number of bits, 262 is 0 where white is 0
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"its floating-point values go from {values.min():g} to {values.max():g}, and must lie in [0, 1]"
            )
        grey = np.rint(values * 255)
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        largest = 4095 if tags.get(258) == (12,) else 65535
        grey = np.rint(np.clip(values, 0, largest) * (255 / largest))
    else:
        raise ValueError(
            "it has integers of 32 bits or with a sign, whose range is not known: save it with 8 or 16 bits"
        )
    return (255 - grey if tags.get(262) == 0 else grey).astype(np.uint8)


def decode(images: Sequence[EncodedImage], description: str) -> np.ndarray | list[EncodedImage]:
    """Decode all images once, so that a bad one is found before training, and keep them if they have one size.

    Args:
        images: The images, at least one.
        description: Label of the progress bar, shown when decoding takes more than a second.

    Returns:
        uint8 array (n, height, width, 3) if all images have the same size and fit in `MAX_DECODED_BYTES`, else the
        images as they came, to be decoded when used.

    Raises:
        DataError: An image is corrupt.
    """
    width, height = open_image(images[0]).size
    pixels: np.ndarray | None = None
    if len(images) * height * width * 3 <= MAX_DECODED_BYTES:
        pixels = np.empty((len(images), height, width, 3), dtype=np.uint8)
    with_frames = []
    checked = 0
    for image in tqdm(images if pixels is not None else (), desc=description, unit="image", delay=1.0):
        decoded, frames = _read(image)
        if decoded.size != (width, height):
            pixels = None
            break
        assert pixels is not None
        pixels[checked] = np.asarray(decoded)
        checked += 1
        with_frames += [image.name] if frames else []
    if checked < len(images):
        with_frames += _check(images[checked:], f"{description} once, to check them")
    if with_frames:
        rank_zero_warn(
            f"{len(with_frames)} images have several frames or pages, of which the first is used: "
            f"{', '.join(with_frames[:3])}{', ...' if len(with_frames) > 3 else ''}"
        )
    return list(images) if pixels is None else pixels


def _check(images: Sequence[EncodedImage], description: str) -> list[str]:
    """Decode images in threads, without keeping them; return the names of those with several frames."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            found = threads.map(lambda image: _read(image, check_only=True)[1], images)
            progress = tqdm(found, desc=description, total=len(images), unit="image", delay=1.0)
            return [image.name for image, frames in zip(images, progress, strict=True) if frames]
        finally:
            threads.shutdown(cancel_futures=True)  # the first bad image ends it


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
        self.prepare(image_size, mean, std, interpolation)
        self.flip_seed = flip_seed

    def prepare(
        self, image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float], interpolation: str
    ) -> None:
        """Set how images are resized and normalised from now on; the arguments are those of the class."""
        self.size = (image_size, image_size)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.resample = str_to_pil_interp(interpolation)

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
