"""A timm model with peft's LoRA and its images, as the peers' scripts use them."""

from __future__ import annotations

from typing import Any

import timm
from peft import LoraConfig, get_peft_model
from torchvision import transforms
from torchvision.datasets import ImageFolder


def adapted_model(job: dict[str, Any]) -> Any:
    """The model; the head trains too."""
    model = timm.create_model(job["backbone"], img_size=job["image_size"], num_classes=job["classes"])
    return get_peft_model(
        model,
        LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=job["targets"], modules_to_save=["head"]),
    )


def training_images(job: dict[str, Any]) -> ImageFolder:
    """The images, resized whole and mirrored at random."""
    size = (job["image_size"], job["image_size"])
    steps = [
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(job["mean"], job["std"]),
    ]
    return ImageFolder(job["images"], transforms.Compose(steps))
