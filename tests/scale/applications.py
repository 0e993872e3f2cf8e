"""Both applications on a few batches, with what each process read and learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_adapters as la
from language.data import InstructionDataModule
from language.module import CausalLMTuner
from lit_adapters.callback import build_optimizers
from lit_adapters.sharding import whole
from tests.scale.tasks import trainer
from vision.data import CIFARDataModule
from vision.module import ViTClassifier

ALPACA = Path(__file__).parents[2] / "configs" / "language" / "smoke" / "alpaca.jsonl"
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}


class Recorder(Callback):
    """Keeps the batches and the losses."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def vision(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """ViT with NoRA++ on noise, batches of 16 in all."""
    model = ViTClassifier("test_vit", 10, False, la.NoRAPlusPlus(nora=la.NoRA(groups=4)), image_size=32, init_seed=0)
    return model, CIFARDataModule(source="random", image_size=32, batch_size=16 // devices)


def language(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """LLaMA with LoRA on answers of all lengths, batches of 4 in all."""
    model = CausalLMTuner("tiny_llama", la.LoRA(rank=2), init_seed=0)
    data = InstructionDataModule(
        path=str(ALPACA),
        tokenizer="tiny_llama",
        batch_size=4 // devices,
        max_length=96,
        val_fraction=0.25,
        prompt_template="{instruction} {input} =",
    )
    return model, data


APPLICATIONS = {"vision": vision, "language": language}


def fit(folder: Path, name: str, devices: int, ckpt: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Train on three batches and validate; what this process has seen. Keeps `last.ckpt`."""
    seed_everything(0, verbose=False)
    model, data = APPLICATIONS[name](devices)
    model.configure_optimizers = lambda: build_optimizers(model, SGD)  # type: ignore[method-assign]
    seen = Recorder()
    callbacks = [la.AdapterCallback(figures=False), seen, ModelCheckpoint(folder / name, filename="last")]
    limits = {"limit_train_batches": 3, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    running = trainer(folder / name, devices, callbacks=callbacks, enable_checkpointing=True, **limits | changes)
    running.fit(model, data, ckpt_path=ckpt)
    metrics = {key: value.item() for key, value in running.callback_metrics.items()}
    trained = {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    return {"batches": seen.batches, "losses": seen.losses, "metrics": metrics, "state": trained}
