"""What one process and two train alike: every method on a tiny transformer, and runs that have to stop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lit_adapters as la
from lit_adapters.lightning import build_optimizers
from lit_adapters.model.sharding import shard
from tests.matrix import ALL, MODELS, build

STEPS, BATCH = 3, 4  # optimiser steps, and rows of a batch of all processes together
ADAPTIVE = la.AFALoRA(rank=2, activation="silu", schedule=la.schedules.Adaptive(duration=0.5, end=1.0, window=5))
CALIBRATED = la.NoRA(groups=4, fit_range="calibrate")
LORAN = la.LoRAN(rank=2, function="sine", frequency="calibrate", start_size=0.01)
APART = la.DenseLoRA(rank=2, dropout=0.0, share="none")
# Each step gives up directions; the third is the last.
ADALORA = la.Peft({"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "target_modules": ["qkv", "fc1"]})
PRUNED = la.LoRA2(width=3, rank=4, target_rank=2, alpha=400.0, prune_every=1)
# Optimisers of pairs, by the name of a case.
OPTIMIZERS = {"lora-plus": "LoRAPlus", "lora-rite": "LoRARITE", "lora-loft": "LoFT"}
METHODS: dict[str, la.Method] = ALL | {
    "adaptive": ADAPTIVE,
    "calibrated": CALIBRATED,
    "loran-calibrated": LORAN,
    "dense_lora-apart": APART,
    "adalora": ADALORA,
    "lora-ga": la.LoRA(rank=2, start="lora_ga"),
    "lora2-pruned": PRUNED,
    **{name: la.LoRA(rank=2) for name in OPTIMIZERS},
}
MEASURED = ("calibrated", "lora-ga")  # which depend on the first batches of the first process
# Encoder for all methods and variants, decoder for one of each.
CASES = [("vit", name) for name in METHODS] + [
    ("llama", name) for name in ("lora", "dora", "vera", "lora2-pruned", "loran", "afa", "nora++")
]


def rows(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one epoch."""
    generator, n = torch.Generator().manual_seed(3), STEPS * BATCH
    model = MODELS[name]
    if model.vocabulary:
        x = torch.randint(model.vocabulary, (n, *model.shape[1:]), generator=generator)
        return x, x
    return torch.randn(n, *model.shape[1:], generator=generator), torch.arange(n) % 5


class Task(LightningModule):
    """A user's module: a tiny network, a method, an optimiser, the loss logged as the mean over all processes."""

    def __init__(self, name: str, method: la.Method, optimizer: str | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.name = name
        self.method = method
        self.net: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build() if self.device_mesh is None else shard(self.build, self.device_mesh)

    def build(self) -> nn.Module:
        net = build(self.name)
        torch.manual_seed(5)
        la.attach(net, self.method, train=[MODELS[self.name].head])
        return net

    def forward(self, batch: Any) -> Tensor:
        output = self.net(batch[0], **MODELS[self.name].arguments)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self(batch), batch[1]
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.trainer.callback_metrics["train/loss"].item())

    def configure_optimizers(self) -> Any:
        if self.optimizer:
            section = {"class_path": f"lit_adapters.optimizers.{self.optimizer}", "init_args": {"lr": 1e-3}}
            return build_optimizers(self, section)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.03, momentum=0.9)


def trainer(folder: Path, devices: int, **changes: Any) -> Trainer:
    """A Trainer of `devices` processes that logs to TensorBoard in `folder`."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "max_epochs": 1,
        "logger": TensorBoardLogger(folder, name="", version="run"),
        "log_every_n_steps": 1,
        "callbacks": [la.AdapterCallback(log_every_n_steps=1, figures=False, calibration_batches=2)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**settings | changes)


def loader(name: str, devices: int) -> DataLoader:
    """Without shuffling; shared out in turns, so that the processes' batches make up the one process's."""
    dataset = TensorDataset(*rows(name))
    rank = int(os.environ.get("RANK", 0))  # as torchrun tells it
    sampler = DistributedSampler(dataset, num_replicas=devices, rank=rank, shuffle=False)
    return DataLoader(dataset, batch_size=BATCH // devices, sampler=sampler)


def fit(folder: Path, name: str, method: str, devices: int, **changes: Any) -> dict[str, Any]:
    """Train, and say what came out in this process."""
    seed_everything(0, verbose=False)
    task = Task(name, METHODS[method], OPTIMIZERS.get(method))
    trainer(folder / name / method, devices, **changes).fit(task, loader(name, devices))
    return {"state": task.state_dict(), "losses": task.losses}
