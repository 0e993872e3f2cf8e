"""The part of AdapterCallback that leaves frozen parameters out of checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.resume.checkpoint_io import SafeCheckpointIO
from lit_adapters.training.checkpoint import redundant_keys
from lit_adapters.training.left_out import leave_out_copies


class AdaptersOnly(Callback):
    """Keeps in a checkpoint what changed: adapters, modules of `train`, and persistent buffers.

    Copies of frozen parameters that other callbacks add, such as averages of weights, are left out as well; see
    `lit_adapters.training.left_out`.

    Strict loading forgives the missing keys. `ModelParallelStrategy` loads each key by itself and asks nobody: there
    missing keys are allowed for all, and checked here.

    Raises:
        AdapterError: A ModelCheckpoint has `save_weights_only`, which bypasses callbacks; checkpoints would be folders
            of shards, which cannot be loaded with keys missing; or a checkpoint lacks more than frozen parameters.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be saved or loaded without frozen parameters."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise AdapterError(
                    "ModelCheckpoint(save_weights_only=True) bypasses callbacks and would hold the whole base model; "
                    "use save_weights_only=False, or AdapterCallback(save_adapters_only=False)"
                )
        if isinstance(trainer.strategy.checkpoint_io, SafeCheckpointIO):
            trainer.strategy.checkpoint_io.reduce = partial(leave_out_copies, module=pl_module)
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        if trainer.strategy._save_distributed_checkpoint and trainer.checkpoint_callbacks:
            raise AdapterError(
                "ModelParallelStrategy(save_distributed_checkpoint=True) could not load a checkpoint of adapters "
                "alone; set save_distributed_checkpoint=False, which writes one file, or "
                "AdapterCallback(save_adapters_only=False)"
            )
        pl_module.strict_loading = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the keys where the strategy does not."""
        if not isinstance(trainer.strategy, ModelParallelStrategy) or trainer.ckpt_path is None:
            return
        saved = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        missing = sorted(pl_module.state_dict().keys() - saved.keys() - redundant_keys(pl_module))
        if missing:
            raise AdapterError(
                f"{trainer.ckpt_path} lacks {missing[0]!r} ({len(missing)} keys in all): it was written with other "
                "adapters or another `train`; give the settings it was trained with"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen parameters out."""
        redundant = redundant_keys(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in redundant}
