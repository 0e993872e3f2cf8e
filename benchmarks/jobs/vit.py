"""Fine-tuning a ViT: `python -m vision fit` beside a plain timm + peft loop, and beside transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.jobs.job import Data, Job, SizeName, Training, fit_side, script_side
from vision.folders import members_by_class
from vision.sampling import hold_out

_CLASSES = 10
_HELD_OUT = 1e-6  # share of the images for validation, which is left out: one of each class is the least
TRAINING = {
    "tiny": Training(
        batch_size=10,
        rank=2,
        more={"backbone": "vit_tiny_patch16_224", "image_size": 32, "images": 40, "epochs": 1},
    ),
    "real": Training(
        batch_size=64,
        rank=8,
        lr=1e-3,
        more={"backbone": "vit_small_patch14_dinov2", "image_size": 56, "images": 2000, "epochs": 2},
    ),
}


def loop(size: SizeName, data: Data, work: Path) -> Job:
    """Beside a loop as one writes it with timm, torchvision and peft."""
    return _job("vit", "timm + peft", "peer_vit_loop", size, data, work)


def trainer(size: SizeName, data: Data, work: Path) -> Job:
    """Beside the same model and data in transformers' Trainer."""
    return _job("vit_trainer", "Trainer + peft", "peer_vit_trainer", size, data, work)


def _job(name: str, peer: str, script: str, size: SizeName, data: Data, work: Path) -> Job:
    training = TRAINING[size]
    model = {"targets": ["qkv", "attn.proj", "fc1", "fc2"], "classes": _CLASSES}
    settings = training.as_settings() | model | {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    ours, theirs = work / "images", work / "peer_images"
    if not ours.exists():
        _write_images(ours / "train", settings["images"], size, data)
        _link_trained(ours, theirs)
    options = [
        f"--model.backbone={settings['backbone']}",
        "--model.pretrained=false",
        f"--model.num_classes={_CLASSES}",
        "--data.source=folder",
        f"--data.root={ours}",
        f"--data.image_size={settings['image_size']}",
        f"--data.val_fraction={_HELD_OUT}",
        "--lr_scale={}",
        f"--trainer.max_epochs={settings['epochs']}",
    ]
    return Job(
        name,
        peer,
        "images",
        settings,
        fit_side("vision", "vision/offline/lora", training, work / f"{name}_ours", options),
        script_side(script, settings | {"images": str(theirs)}, work / f"{name}_peer"),
    )


def _write_images(folder: Path, count: int, size: SizeName, data: Data) -> None:
    """Write `count` images to train on and one of each class to hold out, as files that both sides read."""
    each = count // _CLASSES + 1
    if size == "tiny":
        noise = np.random.default_rng(0).integers(0, 256, (_CLASSES, each, 32, 32, 3), dtype=np.uint8)
        for label in range(_CLASSES):
            (folder / f"class{label}").mkdir(parents=True)
            for number in range(each):
                Image.fromarray(noise[label, number]).save(folder / f"class{label}" / f"{number:04}.png")
        return
    if data.images is None:
        raise SystemExit("error: this job needs --images, a folder with train/<class>/* or train.tar.gz")
    members = members_by_class(data.images, "train", warn=False)
    if len(members) != _CLASSES or min(map(len, members.values())) < each:
        raise SystemExit(f"error: {data.images} has no {_CLASSES} classes with {each} images each")
    for label, images in members.items():
        (folder / label).mkdir(parents=True)
        for number, image in enumerate(images[:each]):
            content = Path(image.name).read_bytes() if image.data is None else image.data
            (folder / label / f"{number:04}{Path(image.name).suffix}").write_bytes(content)


def _link_trained(ours: Path, theirs: Path) -> None:
    """Give the peer the images that our data module trains on, and not those that it holds out."""
    members = members_by_class(ours, "train")
    names = [image.name for images in members.values() for image in images]
    labels = torch.tensor([label for label, images in enumerate(members.values()) for _ in images])
    kept, _ = hold_out(labels, _HELD_OUT, list(members), "val", 0)
    for index in kept.tolist():
        file = theirs / Path(names[index]).relative_to(ours / "train")
        file.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(names[index], file)
