"""Small runs of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

import lit_adapters as la
from lit_adapters.huggingface import AdapterTrainerCallback
from tests.matrix import build

QUIET = {"statistics": (), "figures": False}


class Rows(torch.utils.data.Dataset):
    """Random rows of tokens with themselves as labels."""

    def __init__(self, count: int = 16) -> None:
        self.ids = torch.randint(1, 40, (count, 12), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(folder: Path, model: torch.nn.Module, **settings: Any) -> Trainer:
    """A silent Trainer of 8 steps that saves after 4 and 8, without the callback; `optimizers` is the Trainer's own."""
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "log_level": "error",
    }
    rows = Rows()
    given = {name: settings.pop(name) for name in ("optimizers",) if name in settings}
    return Trainer(model, TrainingArguments(**arguments | settings), train_dataset=rows, eval_dataset=rows, **given)


def adapted(method: Any, train: Any = ()) -> torch.nn.Module:
    """The tiny LLaMA with a method, the same each time."""
    set_seed(0)
    model = build("llama")
    la.attach(model, method, train=train)
    return model


def train(folder: Path, model: torch.nn.Module, callback: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    """Train with the callback; `resume` names the checkpoint to go on from."""
    resume = settings.pop("resume", None)
    made = trainer(folder, model, **settings)
    made.add_callback(AdapterTrainerCallback(made, **QUIET | (callback or {})))
    made.train(resume_from_checkpoint=resume)
    return made


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changed or could have changed."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
