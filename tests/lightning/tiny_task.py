"""A user's own LightningModule, as small as it can be, and what runs and reads it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_adapters as la


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    """Two MLP blocks and a head; the same values every time, as pretrained weights are."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def nora(**changes: Any) -> la.NoRA:
    return la.NoRA(**{"groups": 4, "rank": 2} | changes)


def both() -> list[la.Method]:
    return [nora(), la.LoRA(rank=2, alpha=4.0)]


class Task(LightningModule):
    """Attaches in `__init__`, without predict_step, configure_model or anything of `vision`."""

    def __init__(self, methods: Any = None, train: Any = ("head",), lr: float = 1e-2) -> None:
        super().__init__()
        self.net = Net()
        self.lr = lr
        if methods is not False:
            la.attach(self.net, both() if methods is None else methods, train=train)

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def loader(n: int = 24, batch_size: int = 4, **changes: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(n) % 3), batch_size=batch_size, **changes)


def trainer(root: Path, *callbacks: Any, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "callbacks": list(callbacks),
        "log_every_n_steps": 1,
    }
    return Trainer(**settings | changes)


def fit(
    root: Path, task: LightningModule, *callbacks: Any, data: Any = None, ckpt: Any = None, **changes: Any
) -> Trainer:
    """Fit on the CPU; seeded, so that equal calls give equal weights."""
    seed_everything(0, verbose=False)
    running = trainer(root, *(callbacks or (la.AdapterCallback(),)), **changes)
    running.fit(task, loader() if data is None else data, loader(8), ckpt_path=ckpt)
    return running


def events(folder: str | Path) -> EventAccumulator:
    """What TensorBoard reads."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def state(task: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in task.state_dict().items()}


def assert_equal_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k], second[k])]
    assert not different


def tensorboard(folder: Path, task: LightningModule, *callbacks: Any, **changes: Any) -> EventAccumulator:
    """Fit with a TensorBoard logger, by default without figures; what it wrote."""
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    fit(folder, task, *(callbacks or [la.AdapterCallback(figures=False)]), logger=logger, **changes)
    return events(folder)
