"""How far, and in how many directions, a training moved the features of a backbone.

f0(x) are the features that the head of the pretrained model reads for an image x, and f(x) those of the model now. All
means are over N images of the split that is evaluated:

    feature_change     rms |f(x) - f0(x)| / rms |f0(x) - mean f0|   size of the change, relative to the spread of f0
    feature_shift      |mean (f(x) - f0(x))| / rms |f(x) - f0(x)|    share of the change that all images have in common
    feature_cosine     mean cos(f(x), f0(x))                         direction
    feature_rank       effective rank of the change around its mean (exponential of the entropy of squared singular
                       values): in how many directions it differs from image to image
    feature_alignment  share of the change around its mean in the `rank(f0)` leading directions of the pretrained
                       features, with rank(f0) their effective rank: does it use what was there?
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.model.modes import evaluating
from lit_adapters.model.sharding import is_sharded
from lit_adapters.ops.statistics import effective_rank
from vision.module import ViTClassifier


class FeatureChange(Callback):
    """Logs at the end of each validation and test how the features changed against the pretrained backbone.

    With several processes, the images are those that the first process evaluates.

    Args:
        images: N; the first N images of the split are used.

    Raises:
        AdapterError: `images` is below 2, or the module has no timm backbone.
    """

    def __init__(self, images: int = 1000) -> None:
        if images < 2:
            raise AdapterError(f"images {images} must be at least 2")
        self.images = images
        self._inputs: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module, and forget the images of an earlier evaluation."""
        if not hasattr(getattr(pl_module, "model", None), "forward_head") or not isinstance(pl_module, ViTClassifier):
            raise AdapterError("FeatureChange needs a timm backbone: use it with vision.module.ViTClassifier")
        if is_sharded(pl_module):
            raise AdapterError("FeatureChange needs whole weights, and these are sharded: leave it out, or use ddp")
        self._inputs = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images."""
        missing = self.images - sum(map(len, self._inputs))
        if missing > 0:
            self._inputs.append(batch[0][:missing])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the features, and log."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, ViTClassifier)
        model = pl_module.model
        assert isinstance(model, nn.Module)
        pretrained = trainer.precision_plugin.convert_module(pl_module.create_pretrained())
        pretrained.to(self._inputs[0].device)
        with trainer.precision_plugin.forward_context():
            after, before = _features(model, self._inputs), _features(pretrained, self._inputs)
        self._inputs = []
        for name, value in compare_features(before, after).items():
            pl_module.log(f"{'test' if trainer.testing else 'val'}/{name}", value, rank_zero_only=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


@torch.no_grad()
def _features(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """What the head reads, (N, D) in float64."""
    with evaluating(model):
        parts = [model.forward_head(model.forward_features(batch), pre_logits=True) for batch in inputs]  # type: ignore[operator]
    return torch.cat(parts).double().cpu()


def compare_features(before: Tensor, after: Tensor) -> dict[str, float]:
    """Compute the values that the head of this file defines; shares and rank are 0 if no feature changed.

    Args:
        before: Features of N images before the training, (N, D).
        after: Those after the training, (N, D).

    Raises:
        AdapterError: N is below 2.
    """
    if len(before) < 2:
        raise AdapterError(f"FeatureChange saw {len(before)} validation images and needs 2 or more; add some")
    difference = after - before
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    size = difference.square().sum(1).mean().sqrt()
    shared = difference.mean(0)
    centred = difference - shared
    _, singular, directions = torch.linalg.svd(before - before.mean(0), full_matrices=False)
    leading = directions[: max(1, round(effective_rank(singular)))]
    energy = centred.square().sum()
    moved = bool(energy > 0)
    return {
        "feature_change": float(size / spread),
        "feature_shift": float(shared.norm() / size) if size > 0 else 0.0,
        "feature_cosine": float(torch.cosine_similarity(before, after, dim=1).mean()),
        "feature_rank": effective_rank(torch.linalg.svdvals(centred)) if moved else 0.0,
        "feature_alignment": float((centred @ leading.T).square().sum() / energy) if moved else 0.0,
    }
