"""CIFAR-10 and CIFAR-100, or any folder of class folders, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lit_adapters.assets.package_index import resolve
from lit_adapters.errors import AdapterError, DataError, shown
from lit_adapters.files.meaning import check_same
from lit_adapters.lightning.resume.loader import ResumableLoader
from lit_adapters.lightning.resume.sampler import EpochSampler
from vision import sources
from vision.backbones import MAX_IMAGE_SIZE
from vision.images import ImageDataset, decode, keep_batch
from vision.sampling import balanced_subset, hold_out
from vision.sources import DatasetName, Split, SplitName

DEFAULT_ROOT = "data"
DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
}
MAX_WORKERS = 1024


def check_preprocessing(settings: Mapping[str, Any]) -> None:
    """Check how images are to be prepared.

    Args:
        settings: `image_size`, `mean`, `std` and `interpolation`.

    Raises:
        DataError: A value is out of range; a mean or standard deviation of values up to 255 is one.
    """
    size, mean, std = settings["image_size"], settings["mean"], settings["std"]
    if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
        raise DataError(f"image_size={shown(size)} must be at least 1 and at most {MAX_IMAGE_SIZE} pixels")
    for name, values, least in (("mean", mean, 0.0), ("std", std, 1e-4)):
        numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != 3 or not all(least <= value <= 1 for value in values):
            raise DataError(
                f"{name}={shown(values)} must be three numbers from {least:g} to 1, for pixels between 0 and 1"
            )
    try:
        str_to_pil_interp(settings["interpolation"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"interpolation={shown(settings['interpolation'])} is unknown: use nearest, bilinear, bicubic, box, "
            "hamming or lanczos"
        ) from error


class CIFARDataModule(lightning.LightningDataModule):
    """Images and labels for classification: batches `(images float32 [B, 3, S, S], labels int64 [B])`.

    The validation split is held out of the training images; test images are read by `test` and `predict` only.
    Images are resized whole, normalised, and mirrored at random in training. The order of an epoch and its flips are
    pure functions of (order_seed, epoch, sample index): equal for any `num_workers` and unaffected by the global
    random state. Under distributed training each process takes its share of the same order.

    Args:
        root: Folder of the data, or a `package://` address. With source=package and the default root, the known
            CIFAR-10 test images of BIG-bench (358 MB download, once).
        dataset: Which CIFAR: what torchvision downloads, and which label column parquet files have.
        source: Torchvision downloads into root. folder reads root/train/<class>/* and root/test/<class>/*, or
            root/train.tar.gz and root/test.tar.gz. parquet reads Hugging Face's train-*.parquet and test-*.parquet.
            package reads 10,000 CIFAR-10 test images split 8,000/2,000, whose accuracies are not comparable with
            published ones. random makes 200 training and 100 test images of noise, for smoke tests; root is not used.
        image_size: Side S of the square images, pixels. By default, as also for the next three, what the model was
            trained with, if it or the trainer's checkpoint says so; else 224.
        mean: Per-channel mean for normalisation, in [0, 1] units. A pretrained timm model says it; without one
            ImageNet's.
        std: Per-channel standard deviation for normalisation, in [0, 1] units; as for mean.
        interpolation: Nearest, bilinear, bicubic, box, hamming or lanczos; as for mean, without a model bicubic.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader; 0 loads in the training process.
        val_fraction: Share of each class held out of the training images for validation.
        train_subset: Number of training images to use, equally many per class; default all.
        few_shot: Training images per class; instead of train_subset.
        val_subset: Number of validation images to use, equally many per class; default all.
        test_subset: Number of test images to use, equally many per class; default all.
        hflip: Mirror training images with probability one half.
        seed: Seeds the validation split and the subsets.
        order_seed: Seeds data order and flips; default seed.
        subset_index: Which subset of few_shot or train_subset to train on. Subsets with different indices have no image
            in common; the validation images are the same for all.

    Raises:
        DataError: A setting is out of range, or data are missing, damaged or badly formed; the message names what it is
            and the fix.
        AdapterError: A setting contradicts what the model was trained with.
    """

    def __init__(
        self,
        root: str = DEFAULT_ROOT,
        dataset: DatasetName = "cifar10",
        source: Literal["torchvision", "folder", "parquet", "package", "random"] = "torchvision",
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        interpolation: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        train_subset: int | None = None,
        few_shot: int | None = None,
        val_subset: int | None = None,
        test_subset: int | None = None,
        hflip: bool = True,
        seed: int = 0,
        order_seed: int | None = None,
        subset_index: int = 0,
    ) -> None:
        super().__init__()
        self.root = sources.PACKAGE_ADDRESS if source == "package" and root == DEFAULT_ROOT else root
        self.dataset: DatasetName = dataset
        self.source = source
        given = {"image_size": image_size, "mean": mean, "std": std, "interpolation": interpolation}
        self._given = {name: value for name, value in given.items() if value is not None}
        self._settings: dict[str, Any] = DEFAULTS | self._given
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.train_subset = train_subset
        self.few_shot = few_shot
        self.val_subset = val_subset
        self.test_subset = test_subset
        self.hflip = hflip
        self.seed = seed
        self.order_seed = seed if order_seed is None else order_seed
        self.subset_index = subset_index
        self._check_settings()
        self._classes: list[str] | None = None
        self._train: ImageDataset | None = None
        self._val: ImageDataset | None = None
        self._test: ImageDataset | None = None

    def _check_settings(self) -> None:
        for name in ("batch_size", "train_subset", "few_shot", "val_subset", "test_subset"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name}={value} must be at least 1")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise DataError(f"num_workers={self.num_workers} must be at least 0 and at most {MAX_WORKERS}")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} must lie strictly between 0 and 1")
        for name in ("seed", "order_seed"):
            if not -(2**63) <= getattr(self, name) < 2**64:
                raise DataError(f"{name}={getattr(self, name)} must be a number of 64 bits")
        if self.few_shot is not None and self.train_subset is not None:
            raise DataError(
                f"few_shot={self.few_shot} (per class) and train_subset={self.train_subset} (in all) exclude each "
                "other: set one"
            )
        if self.subset_index < 0:
            raise DataError(f"subset_index={self.subset_index} must be at least 0")
        if self.subset_index and self.few_shot is None and self.train_subset is None:
            raise DataError(f"subset_index={self.subset_index} needs few_shot or train_subset, the size of the subset")
        if not self.root:
            raise DataError("root='' is empty: set it to the folder of the data, '.' for the working directory")
        if self.source == "package" and self.dataset != "cifar10":
            raise DataError(f"source=package holds CIFAR-10 images only, not dataset={self.dataset}")
        check_preprocessing(self._settings)
        self._settings |= {name: tuple(self._settings[name]) for name in ("mean", "std")}

    @property
    def image_size(self) -> int:
        """Side of the square images, pixels."""
        return int(self._settings["image_size"])

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per-channel mean, in [0, 1] units."""
        red, green, blue = self._settings["mean"]
        return (red, green, blue)

    @property
    def std(self) -> tuple[float, float, float]:
        """Per-channel standard deviation, in [0, 1] units."""
        red, green, blue = self._settings["std"]
        return (red, green, blue)

    @property
    def interpolation(self) -> str:
        """How images are resized."""
        return str(self._settings["interpolation"])

    def meaning(self) -> dict[str, Any]:
        """What the model's inputs and outputs mean: how images are prepared, and after `setup` the names of classes.

        Data without names of classes have numbers in their place, which are left out.
        """
        found = {**self._settings, "mean": list(self.mean), "std": list(self.std)}
        if self._classes is not None and self._classes != [str(i) for i in range(len(self._classes))]:
            found["classes"] = self._classes
        return found

    @property
    def class_names(self) -> list[str]:
        """Class names in label order; known after `setup`."""
        if self._classes is None:
            raise DataError("class names are known after setup(): let the Trainer call it, or call it first")
        return self._classes

    @property
    def num_classes(self) -> int:
        """Number of classes; known after `setup`."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Fetch what has to be fetched; Lightning calls it on one process only."""
        if self.source == "random":
            return
        root = self._resolved_root()
        if self.source == "torchvision":
            sources.download_torchvision(root, self.dataset)

    def setup(self, stage: str | None = None) -> None:
        """Read and decode what the stage uses: fit and validate never touch the test split."""
        trained = getattr(self.trainer and self.trainer.lightning_module, "trained_meaning", None)
        if stage in ("fit", "validate", None) and (self._val is None or (self._train is None and stage != "validate")):
            self._setup_train(decode_train=stage != "validate")
        if stage in ("test", "predict", None) and self._test is None:
            self._setup_test()
        if trained is not None:
            self.adopt(*trained())

    def adopt(self, meaning: Mapping[str, Any], origin: str, binding: bool = True) -> None:
        """Prepare images as those that the model was trained on, unless the user says how.

        Args:
            meaning: What the model was trained with; see `meaning`.
            origin: Where that is written, for messages.
            binding: Whether what the user says must be the same.

        Raises:
            AdapterError: What the user says is something else, or after `setup` the classes are.
            DataError: A value of `meaning` is out of range.
        """
        adopted = {name: meaning[name] for name in DEFAULTS if name in meaning}
        if binding:
            check_same(adopted, self._given, origin)
            check_same({k: v for k, v in meaning.items() if k == "classes"}, self.meaning(), origin)
        settings: dict[str, Any] = DEFAULTS | adopted | self._given
        try:
            check_preprocessing(settings)
        except DataError as error:
            raise DataError(f"{origin} says how images are prepared, and is wrong: {error}") from error
        self._settings = settings | {name: tuple(settings[name]) for name in ("mean", "std")}
        for dataset in (self._train, self._val, self._test):
            if dataset is not None:
                dataset.prepare(self.image_size, self.mean, self.std, self.interpolation)

    def _setup_train(self, decode_train: bool) -> None:
        split = self._read("train")
        self._set_classes(train=split.classes, test=self._classes)
        kept, held = hold_out(split.labels, self.val_fraction, split.classes, "val", self.seed)
        held = self._balanced(split, held, self.val_subset, f"val_subset={self.val_subset}", "val")
        self._val = self._dataset(split, held, "val")
        if not decode_train:
            return
        size: int | None
        if self.few_shot is not None:
            size, argument = self.few_shot * len(split.classes), f"few_shot={self.few_shot}"
        else:
            size, argument = self.train_subset, f"train_subset={self.train_subset}"
        kept = self._balanced(split, kept, size, argument, "train", self.subset_index)
        self._train = self._dataset(split, kept, "train")

    def _setup_test(self) -> None:
        split = self._read("test")
        if self.source == "folder" and self._classes is None:
            sources.check_folder_classes(self._resolved_root(), split.classes)
        self._set_classes(train=self._classes, test=split.classes)
        everything = torch.arange(len(split.labels))
        chosen = self._balanced(split, everything, self.test_subset, f"test_subset={self.test_subset}", "test")
        self._test = self._dataset(split, chosen, "test")

    def _set_classes(self, train: list[str] | None, test: list[str] | None) -> None:
        if train and test:
            sources.check_same_classes(train, test, self.root)
        self._classes = train or test

    def _balanced(
        self, split: Split, indices: Tensor, size: int | None, argument: str, key: str, index: int = 0
    ) -> Tensor:
        if size is None:
            return indices
        labels = split.labels[indices]
        return indices[balanced_subset(labels, size, split.classes, argument, key, self.seed, index=index)]

    def _dataset(self, split: Split, indices: Tensor, name: str) -> ImageDataset:
        images = split.subset(indices)
        if isinstance(images, list):
            images = decode(images, f"decoding {name} images")
        return ImageDataset(
            images,
            split.labels[indices],
            self.image_size,
            self.mean,
            self.std,
            self.interpolation,
            flip_seed=self.order_seed if name == "train" and self.hflip else None,
        )

    def _resolved_root(self) -> Path:
        try:
            root = Path(resolve(self.root)).expanduser()
            root.exists()
        except AdapterError:
            raise
        except (OSError, RuntimeError) as error:  # a name too long, or the home folder of nobody
            raise DataError(f"root {shown(self.root)} cannot be read: {error}") from error
        return root

    def _read(self, split: SplitName) -> Split:
        if self.source == "random":
            return sources.make_random(self.dataset, split)
        root = self._resolved_root()
        if not root.exists():
            raise DataError(f"root {self.root} does not exist: set it to the data, or {sources.ALTERNATIVES}")
        if self.source == "torchvision":
            return sources.read_torchvision(root, self.dataset, split)
        if self.source == "folder":
            return sources.read_folder(root, split)
        if self.source == "parquet":
            return sources.read_parquet(root, self.dataset, split)
        rank_zero_info(
            "Data: CIFAR-10's 10,000 test images from a package, split 8,000 for training and 2,000 for testing. "
            "Accuracies are NOT comparable with published CIFAR-10 numbers."
        )
        return sources.read_package(root, split)

    def train_dataloader(self) -> DataLoader:
        """Training batches, in a new order each epoch; the last one may be smaller."""
        # The sampler shares an epoch among processes itself, because Lightning's own wrapper would lose the epoch.
        replicas = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        dataset = self._ready(self._train, "fit")
        return self._loader(dataset, EpochSampler(dataset, self.order_seed, **replicas))

    def val_dataloader(self) -> DataLoader:
        """Validation batches, in a fixed order."""
        return self._loader(self._ready(self._val, "validate"))

    def test_dataloader(self) -> DataLoader:
        """Test batches, in a fixed order."""
        return self._loader(self._ready(self._test, "test"))

    def predict_dataloader(self) -> DataLoader:
        """The test batches."""
        return self._loader(self._ready(self._test, "predict"))

    def _ready(self, dataset: ImageDataset | None, stage: str) -> ImageDataset:
        if dataset is None:
            raise DataError(f"setup({stage!r}) has not run: let the Trainer call it, or call it first")
        return dataset

    def _loader(self, dataset: ImageDataset, sampler: Sampler | None = None) -> DataLoader:
        return (DataLoader if sampler is None else ResumableLoader)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=keep_batch,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: otherwise every new iterator draws from the global random state.
            generator=torch.Generator().manual_seed(self.order_seed),
        )
