"""A ViT in transformers' Trainer with peft: python -m benchmarks.jobs.peer_vit_trainer SETTINGS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from benchmarks.jobs.report import Report
from benchmarks.jobs.trainers import plain_arguments, reporting
from benchmarks.jobs.vit_model import adapted_model, training_images


class WithLoss(nn.Module):
    """A classifier as Trainer calls it."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        logits = self.classifier(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch by the names of the model's arguments."""
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def main() -> None:
    """Train and save the adapter."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    torch.manual_seed(0)
    model = adapted_model(job)
    report.stage("model")
    trainer = reporting(Trainer, report)(
        model=WithLoss(model),
        args=TrainingArguments(**plain_arguments(job) | {"train_sampling_strategy": "random"}),
        train_dataset=training_images(job),
        data_collator=collate,
    )
    report.stage("data")
    trainer.train()
    model.save_pretrained(job["out"])
    report.write()


if __name__ == "__main__":
    main()
