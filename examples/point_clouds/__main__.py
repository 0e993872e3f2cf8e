"""Adapt a transformer of point clouds with PointLoRA, beside LoRA and the head alone.

    python -m examples.point_clouds [--seeds 3] [--short]

Needs `pip install -e ".[vision]"`, no network and no GPU, and takes a few minutes on one CPU core. README.md beside
this file says what the example is, and what it is not.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lit_adapters as la
from examples.point_clouds.model import PointTransformer
from examples.point_clouds.shapes import ADAPTATION, PRETRAINING, clouds
from lit_adapters.optimizers import parameter_groups

SELECTION_WEIGHT = 0.004  # of the loss of the token selection, as published
# What PointLoRA trains besides the adapters.
PARTS = ["encoder.first", "position", "cls_token", "cls_position", "head"]
LAYERS = ["attn.qkv", "attn.proj"]


@dataclass(frozen=True)
class Sizes:
    """How much is generated and trained.

    Attributes:
        points: Points of a cloud.
        pretraining: Clouds of each shape to pretrain on.
        pretraining_epochs: Epochs of pretraining.
        training: Clouds of each new shape to adapt to.
        epochs: Epochs of adapting.
        test: Clouds of each new shape to test on.
    """

    points: int = 256
    pretraining: int = 200
    pretraining_epochs: int = 15
    training: int = 16
    epochs: int = 30
    test: int = 100


SHORT = Sizes(points=128, pretraining=64, pretraining_epochs=5, training=8, epochs=3, test=16)


class Classifier(LightningModule):
    """Cross-entropy, with the loss of the token selection where there is one.

    Args:
        model: Gives logits and that loss.
        lr: The learning rate, which falls to 0 along a cosine.
        adapting: Whether the model is pretrained. Its patch encoder then normalises by the statistics of pretraining.
    """

    def __init__(self, model: PointTransformer, lr: float, adapting: bool) -> None:
        super().__init__()
        self.model, self.lr, self.adapting = model, lr, adapting

    def on_train_epoch_start(self) -> None:
        """Keep the statistics of the patch encoder, as one running mean for patches of two scales would fit neither."""
        if self.adapting:
            self.model.encoder.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        logits, selection = self.model(batch[0])
        return F.cross_entropy(logits, batch[1]) + SELECTION_WEIGHT * selection

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy."""
        logits, _ = self.model(batch[0])
        self.log("accuracy", (logits.argmax(dim=1) == batch[1]).float().mean(), batch_size=len(logits))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with weight decay 0.05, as published."""
        optimizer = torch.optim.AdamW(parameter_groups(self.model, lr=self.lr, weight_decay=0.05))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    model: PointTransformer, data: TensorDataset, lr: float, epochs: int, test: TensorDataset, adapting: bool
) -> float:
    """Train a model in place; the accuracy on `test`."""
    attached = any(True for _ in la.adapters(model))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=10.0,
        callbacks=[la.AdapterCallback(figures=False)] if attached else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(model, lr, adapting)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True, drop_last=True))
    (result,) = trainer.test(module, DataLoader(test, batch_size=100), verbose=False)
    return result["accuracy"]


def pretrain(sizes: Sizes, seed: int) -> PointTransformer:
    """A transformer that tells upright shapes without noise apart; its accuracy is printed."""
    seed_everything(seed, verbose=False)
    shapes = list(PRETRAINING.values())
    model = PointTransformer(len(shapes))
    data, test = (clouds(shapes, n, sizes.points, s) for n, s in ((sizes.pretraining, 1000 + seed), (20, 2000 + seed)))
    accuracy = fit(model, data, 1e-3, sizes.pretraining_epochs, test, adapting=False)
    print(f"seed {seed}: pretrained on {', '.join(PRETRAINING)}: accuracy {accuracy:.3f}", flush=True)
    return model


def head_alone(model: PointTransformer) -> la.AdapterReport:
    """Only a new head trains."""
    return la.attach(model, [], train=["head"])


def lora(model: PointTransformer) -> la.AdapterReport:
    """LoRA in the layers of attention, and the head."""
    return la.attach(model, la.LoRA(rank=8, alpha=8.0, targets=LAYERS), train=["head"])


def lora_and_parts(model: PointTransformer) -> la.AdapterReport:
    """LoRA, and every part of the model that PointLoRA trains."""
    return la.attach(model, la.LoRA(rank=8, alpha=8.0, targets=LAYERS), train=PARTS)


def point_lora(model: PointTransformer) -> la.AdapterReport:
    """The whole of PointLoRA, with the published rank and width of the prompts."""
    return la.attach(model, la.PointLoRA(selected=model.select_tokens()), train=["selector", *PARTS])


ARMS: dict[str, Callable[[PointTransformer], la.AdapterReport]] = {
    "head alone": head_alone,
    "LoRA": lora,
    "LoRA and the parts that PointLoRA trains": lora_and_parts,
    "PointLoRA": point_lora,
}


def adapt(pretrained: PointTransformer, sizes: Sizes, seed: int, lr: float) -> dict[str, tuple[int, float]]:
    """Adapt copies of a pretrained model to other shapes, rotated and noisy.

    Returns:
        Trained parameters and accuracy, by arm.
    """
    shapes = list(ADAPTATION.values())
    make = [(sizes.training, 3000 + seed), (sizes.test, 4000 + seed)]
    data, test = (clouds(shapes, n, sizes.points, s, noise=0.03, rotated=True) for n, s in make)
    results = {}
    for name, prepare in ARMS.items():
        seed_everything(seed, verbose=False)
        model = copy.deepcopy(pretrained)
        model.reset_classifier(len(shapes))
        prepare(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        results[name] = trained, fit(model, data, lr, sizes.epochs, test, adapting=True)
        print(f"seed {seed}: {name}: accuracy {results[name][1]:.3f}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, adapt, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="pretrainings, data and adaptations to average over")
    parser.add_argument("--lr", type=float, default=2e-3, help="of adapting, the same for every arm; not searched")
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes; nothing is learned well")
    options = parser.parse_args(arguments)
    sizes = SHORT if options.short else Sizes()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    runs = [adapt(pretrain(sizes, seed), sizes, seed, options.lr) for seed in range(options.seeds)]
    print(f"\n{', '.join(ADAPTATION)}, rotated and noisy, {sizes.training} clouds each; {options.seeds} seed(s)")
    print(f"{'':42}{'trained':>10}{'accuracy':>10}{'std':>8}")
    for name in ARMS:
        accuracies = [run[name][1] for run in runs]
        spread = f"{statistics.stdev(accuracies):.3f}" if len(runs) > 1 else "-"
        print(f"{name:42}{runs[0][name][0]:>10,}{statistics.mean(accuracies):>10.3f}{spread:>8}")


if __name__ == "__main__":
    main()
