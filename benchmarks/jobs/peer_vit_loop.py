"""A ViT in a plain loop of timm, torchvision and peft: python -m benchmarks.jobs.peer_vit_loop SETTINGS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.jobs.report import Report
from benchmarks.jobs.vit_model import adapted_model, training_images


def main() -> None:
    """Train and save the adapter."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    torch.manual_seed(0)
    model = adapted_model(job).train()
    report.count_trained(model)
    report.stage("model")
    loader = DataLoader(training_images(job), job["batch_size"], shuffle=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=job["weight_decay"])
    report.stage("data")
    for _ in range(job["epochs"]):
        for images, labels in loader:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            report.step()
            report.count(images=len(images))
    model.save_pretrained(job["out"])
    report.write()


if __name__ == "__main__":
    main()
