"""What a whole job is: our command beside a peer's, with the same settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.jobs.process import Side

SizeName = Literal["tiny", "real"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all of a LLaMA but the head
CHECKPOINT = "*.ckpt"
PEFT_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Data:
    """Where the data of real sizes are; jobs of tiny size make their own.

    Attributes:
        rows: Alpaca rows in jsonl.
        images: Folder with train/<class>/* or train.tar.gz.
        mmlu: Folder with the dev and test files.
    """

    rows: Path | None = None
    images: Path | None = None
    mmlu: Path | None = None


@dataclass(frozen=True)
class Job:
    """A comparison.

    Attributes:
        name: Of the job.
        peer: What ours stands beside.
        unit: What is counted by the second: "tokens" or "images".
        settings: What both sides share.
        ours: Our command.
        theirs: The peer's.
        same_first_batch: Whether weights and first batch are the same, and so the first loss.
    """

    name: str
    peer: str
    unit: str
    settings: dict[str, Any]
    ours: Side
    theirs: Side
    same_first_batch: bool = False


@dataclass(frozen=True)
class Training:
    """What a training is given on both sides.

    Attributes:
        batch_size: Rows, pairs, questions or images of a batch.
        rank: Of LoRA, on all linear layers but the head.
        alpha: LoRA's update is scaled by alpha / rank.
        lr: Rate of AdamW, constant.
        weight_decay: Of AdamW.
        more: Other settings of the job.
    """

    batch_size: int
    rank: int
    alpha: float = 16.0
    lr: float = 2e-4
    weight_decay: float = 0.01
    more: dict[str, Any] = field(default_factory=dict)

    def as_settings(self) -> dict[str, Any]:
        """All of it by name."""
        own = {name: getattr(self, name) for name in ("batch_size", "rank", "alpha", "lr", "weight_decay")}
        return own | self.more


def fit_side(module: str, recipe: str, training: Training, folder: Path, options: Sequence[str]) -> Side:
    """Our command line for a training.

    It logs and draws what the recipe says. It does not validate, and its rate is constant, as with the peer.

    Args:
        module: Such as "language", or "language.dpo".
        recipe: The recipe, below configs/.
        training: The settings.
        folder: Where it writes.
        options: Further options.
    """
    side = Side(module, [], folder, CHECKPOINT)
    arguments = [
        "fit",
        f"--config=configs/{recipe}.yaml",
        "--model.adapters=lit_adapters.LoRA",
        f"--model.adapters.init_args.rank={training.rank}",
        f"--model.adapters.init_args.alpha={training.alpha}",
        f"--data.batch_size={training.batch_size}",
        f"--optimizer.init_args.lr={training.lr}",
        f"--optimizer.init_args.weight_decay={training.weight_decay}",
        "--lr_scheduler=null",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.gradient_clip_val=null",
        "--trainer.limit_val_batches=0",
        f"--trainer.logger.init_args.save_dir={side.out}",
        "--trainer.callbacks+=benchmarks.jobs.clock.StepClock",
        f"--trainer.callbacks.report={side.report}",
        *options,
    ]
    return replace(side, arguments=arguments)


def script_side(script: str, settings: dict[str, Any], folder: Path, saves: str | None = PEFT_ADAPTER) -> Side:
    """A script of `benchmarks.jobs` that is run with a file of settings.

    Args:
        script: Its name.
        settings: What it reads; `out` and `report` are added.
        folder: Where it writes.
        saves: The pattern of the files with adapters.
    """
    file = folder.with_suffix(".json")
    side = Side(f"benchmarks.jobs.{script}", [str(file)], folder, saves)
    file.write_text(json.dumps(settings | {"out": str(side.out), "report": str(side.report)}, indent=1))
    return side
