"""Checkpoints without frozen parameters under Lightning's ModelParallelStrategy, which loads each key by itself."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_adapters.errors import AdapterError
from lit_adapters.training.attached import redundant_keys


def expect_missing_keys(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let the strategy pass over keys that a checkpoint lacks; `check_keys` sees to it that they are frozen ones.

    Raises:
        AdapterError: checkpoints would be folders of shards, which cannot be loaded with keys missing.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    if trainer.strategy._save_distributed_checkpoint and trainer.checkpoint_callbacks:
        raise AdapterError(
            "ModelParallelStrategy(save_distributed_checkpoint=True) could not load a checkpoint of adapters alone; "
            "set save_distributed_checkpoint=False, which writes one file, or AdapterCallback(save_adapters_only=False)"
        )
    pl_module.strict_loading = False


def check_keys(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise if the checkpoint that is being loaded lacks a key that is no frozen parameter's.

    Raises:
        AdapterError: it does.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy) or trainer.ckpt_path is None:
        return
    saved = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    missing = sorted(pl_module.state_dict().keys() - saved.keys() - redundant_keys(pl_module))
    if missing:
        raise AdapterError(
            f"{trainer.ckpt_path} lacks {missing[0]!r} ({len(missing)} keys in all): it was written with other "
            "adapters or another `train`; give the settings it was trained with"
        )
