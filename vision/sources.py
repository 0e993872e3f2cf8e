"""Where images come from: torchvision, class folders or archives, Hugging Face parquet files, a package, or noise.

Each reader returns a `Split` whose images are still encoded (torchvision's are arrays), so that only chosen images
are decoded. torchvision's ImageFolder and datasets.load_dataset read the same files, but do not say which file, row or
member of an archive is bad. Here bad input raises one `DataError` that names it and the fix.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from lit_adapters.assets.archives import too_large, unpacked_limit
from lit_adapters.errors import DataError
from vision.folders import Unused, members_by_class
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
DOWNLOAD_TIMEOUT_S = 15.0
_PARQUET_NAME = re.compile(
    r"(?P<split>train|test)-(?P<number>\d{1,9})(-of-(?P<total>\d{1,9}))?(-[0-9a-f]{6,64})?\.parquet"
)
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
        for number, name in enumerate(self.classes):
            if name in self.classes[:number]:
                raise DataError(f"{self.origin} has two classes named {name!r}: rename one")
            if not name.isprintable():  # such as what stands for bytes that are no UTF-8
                raise DataError(f"{self.origin} has a class named {name!r}, which cannot be shown: rename it")
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
    by_class = members_by_class(root, split)
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
        check_same_classes(sorted(members_by_class(root, "train", warn=False)), classes, root)


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


def read_parquet(root: Path, dataset: DatasetName, split: SplitName) -> Split:
    """Read `split-00000-of-00002.parquet` and so on in `root` or one of its subfolders, as published on Hugging Face.

    Raises:
        DataError: No folder or several hold such files, a part is missing or stands twice, a file is damaged, lacks a
            column, or is larger than `unpacked_limit` allows, two files have different names of classes, or a row lacks
            its image or label.
    """
    files = _parquet_files(root, split)
    label_column = "label" if dataset == "cifar10" else "fine_label"
    images: list[EncodedImage] = []
    labels: list[int] = []
    names: list[str] | None = None
    for number, file in enumerate(files):
        try:
            opened = pyarrow.parquet.ParquetFile(file)
            schema = opened.schema_arrow
            image_column = next((c for c in ("img", "image") if c in schema.names), None)
            if image_column is None or label_column not in schema.names:
                raise DataError(
                    f"{file} has columns {schema.names}; {dataset} needs `img` or `image`, and `{label_column}`: "
                    "check root and dataset"
                )
            found = _label_names(file, schema.metadata, label_column)
            if number and found != names:
                raise DataError(f"{file} and {files[0]} have different names of classes: they belong to two data sets")
            names = found
            _read_rows(file, opened.iter_batches(64, columns=[image_column, label_column]), images, labels)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{file} is truncated or not parquet ({error}): copy or download it again") from error
    default = CIFAR10_CLASSES if dataset == "cifar10" else [str(i) for i in range(100)]
    return Split(images, torch.tensor(labels, dtype=torch.int64), names or default, f"{root} ({split})")


def _parquet_files(root: Path, split: SplitName) -> list[Path]:
    """The files of a split, in the order of their numbers; others are named.

    Raises:
        DataError: There are none, they are in several folders, or a part is missing or stands twice.
    """
    present = sorted(file for file in root.rglob("*.parquet") if file.is_file())
    numbered = {file: _PARQUET_NAME.fullmatch(file.name) for file in present}
    parts = {file: match for file, match in numbered.items() if match and match["split"] == split}
    folders = {file.parent for file in parts}
    if len(folders) != 1:
        found = f"in several folders ({', '.join(sorted(map(str, folders)))})" if folders else "nowhere"
        others = "" if folders or not present else f". There is {', '.join(file.name for file in present[:5])}"
        raise DataError(
            f"{split}-*.parquet, numbered such as {split}-00000-of-00001.parquet, found {found} under {root}: set root "
            f"to the folder that holds one data set{others}"
        )
    ordered = sorted(parts, key=lambda file: int(parts[file]["number"]))
    numbers = [int(parts[file]["number"]) for file in ordered]
    totals = {int(match["total"] or len(parts)) for match in parts.values()}
    if numbers != list(range(max(totals))) or len(totals) > 1:
        raise DataError(
            f"{folders.pop()} has parts {numbers} of {max(totals)} of {split}: each must be there once; copy them again"
        )
    unused = Unused(root)
    unused.add("not named train-NUMBER or test-NUMBER", *(file.name for file, match in numbered.items() if not match))
    unused.warn()
    return ordered


def _read_rows(file: Path, batches: Iterator[Any], images: list[EncodedImage], labels: list[int]) -> None:
    """Append the rows of a file.

    Raises:
        DataError: A row lacks its image or label, or the images take more than `unpacked_limit` allows.
    """
    size, limit, row = 0, unpacked_limit(file.stat().st_size), 0
    for batch in batches:
        for image, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            content = image.get("bytes") if isinstance(image, dict) else None
            if not content or type(label) is not int or not -(2**63) <= label < 2**63:
                raise DataError(f"{file} row {row}: image bytes or integer label missing; remove the row")
            size += len(content)
            if size > limit:
                raise DataError(str(too_large(file, size, limit)))
            images.append(EncodedImage(f"{file} row {row}", content))
            labels.append(label)
            row += 1


def _label_names(file: Path, metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The class names that Hugging Face's writer puts into the schema; None if another program wrote the file.

    Raises:
        DataError: The entry is malformed.
    """
    text = (metadata or {}).get(b"huggingface", b"{}")
    try:
        found = json.loads(text)
        for key in ("info", "features", column, "names"):
            found = found.get(key, {})
        names = found or None
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError("names is no list of texts")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file}: its entry `huggingface` does not describe the column {column!r} ({error}): write the file again"
        ) from error
    return names


def read_package(file: Path, split: SplitName) -> Split:
    """Read BIG-bench's CIFAR-10 task: the 10,000 test images of CIFAR-10, lossless, sorted by class.

    A fixed seed, class by class, makes 2,000 of them the test split and the other 8,000 the training split.

    Raises:
        DataError: The file is not such a task, or an example lacks its image or class.
    """
    if not file.is_file():
        raise DataError(f"{file} is no file: set root to a BIG-bench task file, or leave it out")
    try:
        examples: list[dict[str, Any]] = json.loads(file.read_bytes())["examples"]
        classes = sorted(examples[0]["target_scores"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
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
