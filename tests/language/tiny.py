"""Small runs of the tuner: rows, batches and trainers for tests, and the real command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_adapters as la
from language.__main__ import main
from language.cli import LanguageCLI
from language.data.module import InstructionDataModule
from language.module import CausalLMTuner
from lit_adapters.lightning import build_optimizers

CONFIGS = Path(__file__).parents[2] / "configs" / "language"
ROWS = CONFIGS / "smoke" / "alpaca.jsonl"
QUIET = ["--trainer.enable_progress_bar=false"]

Tuner = TypeVar("Tuner", bound=CausalLMTuner)

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.0}}


def tuner(kind: type[Tuner] = CausalLMTuner, **changes: Any) -> Tuner:  # type: ignore[assignment]
    """The tiny LLaMA with LoRA, ready for a Trainer."""
    module = kind(**{"model": "tiny_llama", "adapters": la.LoRA(rank=2)} | changes)
    module.configure_optimizers = lambda: build_optimizers(module, ADAMW)
    return module


def built(kind: type[Tuner] = CausalLMTuner, **changes: Any) -> Tuner:  # type: ignore[assignment]
    """The same with its model."""
    module = tuner(kind, **changes)
    module.configure_model()
    return module


def moved(module: CausalLMTuner) -> CausalLMTuner:
    """All that trains off its start, as training would."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def data(**changes: Any) -> InstructionDataModule:
    """The rows of the smoke recipes in short frames."""
    settings = {"path": str(ROWS), "tokenizer": "tiny_llama", "batch_size": 4, "max_length": 96}
    return InstructionDataModule(
        **settings | {"prompt_template": "{instruction} {input} =", "val_fraction": 0.25} | changes
    )


def trainer(folder: Path, **changes: Any) -> Trainer:
    """A silent trainer of one epoch that keeps a checkpoint, `last.ckpt`."""
    settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "default_root_dir": folder, "log_every_n_steps": 1}
    return Trainer(
        **settings | {"callbacks": [la.AdapterCallback(), ModelCheckpoint(folder, filename="last")]} | changes
    )


def batch(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows, padded on the right; the first third of each is its prompt."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(256, (len(lengths), longest), generator=generator)
    place = torch.arange(longest)
    sizes = torch.tensor(lengths)[:, None]
    mask = (place < sizes).long()
    labels = ids.where((place < sizes) & (place >= sizes // 3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def quick_main(arguments: list[str], entry: Callable[..., Any] = main, **settings: Any) -> Any:
    """`main`, or another `entry`, without the parsers of other subcommands, which take much of a tiny run's time."""
    used = {name: skip for name, skip in LanguageCLI.subcommands().items() if name == arguments[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageCLI, "subcommands", staticmethod(lambda: used))
        return entry(arguments, **settings)


def command(subcommand: str, config: str, root: Path, *overrides: str) -> LanguageCLI:
    """`python -m language SUBCOMMAND --config configs/language/CONFIG.yaml` on the smoke rows, writing under `root`."""
    save = [f"--trainer.logger.init_args.save_dir={root}", f"--data.path={ROWS}"]
    return quick_main([subcommand, f"--config={CONFIGS / config}.yaml", *save, *QUIET, *overrides])


def log_dir(cli: LanguageCLI) -> Path:
    return Path(cli.trainer.logger.log_dir)


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard reads of a run."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
