"""The applications on a few batches, with what each process read and learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_adapters as la
from language.data.module import InstructionDataModule
from language.dpo.data import PreferenceDataModule
from language.dpo.module import DPOTuner
from language.draft.module import DraftTuner
from language.grpo.data import QuestionDataModule
from language.grpo.module import GRPOTuner
from language.module import CausalLMTuner
from lit_adapters.lightning import build_optimizers
from lit_adapters.model.sharding import whole
from tests.scale.tasks import trainer
from vision.data import CIFARDataModule
from vision.module import ViTClassifier

SMOKE = Path(__file__).parents[2] / "configs" / "language" / "smoke"
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}


class Recorder(Callback):
    """Keeps the batches and the losses; of reinforcement, what was sampled first, and what was learned from it."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.sampled: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        if batch_idx == 0 and isinstance(pl_module, GRPOTuner):
            self.sampled = {"rollout": pl_module.rollout, "state": learned(pl_module)}


def learned(model: LightningModule) -> dict[str, Any]:
    """Copies of what is trained."""
    return {n: whole(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}


def vision(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """ViT with NoRA++ on noise, batches of 16 in all."""
    model = ViTClassifier("test_vit", 10, False, la.NoRAPlusPlus(nora=la.NoRA(groups=4)), image_size=32, init_seed=0)
    return model, CIFARDataModule(source="random", image_size=32, batch_size=16 // devices)


def instructions(devices: int) -> LightningDataModule:
    """Answers of all lengths, batches of 4 in all."""
    return InstructionDataModule(
        path=str(SMOKE / "alpaca.jsonl"),
        tokenizer="tiny_llama",
        batch_size=4 // devices,
        max_length=96,
        val_fraction=0.25,
        prompt_template="{instruction} {input} =",
    )


def language(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """LLaMA with LoRA."""
    return CausalLMTuner("tiny_llama", la.LoRA(rank=2), init_seed=0), instructions(devices)


def draft(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """A layer of that LLaMA with LoRA, which follows the whole of it."""
    return DraftTuner(model="tiny_llama", keep_layers=[1], adapters=la.LoRA(rank=2), init_seed=0), instructions(devices)


def dpo(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """Pairs of answers, batches of 4 in all."""
    data = PreferenceDataModule(
        str(SMOKE / "pairs.jsonl"), "tiny_llama", max_length=96, batch_size=4 // devices, val_fraction=0.3, val_subset=6
    )
    return DPOTuner(model="tiny_llama", adapters=la.LoRA(rank=2), init_seed=0), data


def grpo(devices: int) -> tuple[LightningModule, LightningDataModule]:
    """Groups of 4 completions of 4 questions in all, two steps on each, with a KL term; each process draws its own."""
    data = QuestionDataModule(
        str(SMOKE / "questions.jsonl"),
        "tiny_llama",
        max_length=128,
        batch_size=4 // devices,
        val_fraction=0.25,
        iterations=2,
    )
    rewards = [{"function": "tests.language.grpo.rewarding.letters", "weight": 1.0}]
    settings: dict[str, Any] = {"group_size": 4, "max_new_tokens": 6, "kl_weight": 0.1, "iterations": 2, "init_seed": 1}
    return GRPOTuner(model="tiny_llama", adapters=la.LoRA(rank=2), rewards=rewards, **settings), data


APPLICATIONS = {"vision": vision, "language": language, "dpo": dpo, "draft": draft, "grpo": grpo}
SHARDED = ("vision", "language", "dpo")  # the others refuse


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
    return {
        "batches": seen.batches,
        "losses": seen.losses,
        "metrics": metrics,
        "state": learned(model),
        "sampled": seen.sampled,
    }
