"""Train adapters in a plain PyTorch loop: attach, train, validate, save, and load into a fresh model.

    python -m examples.plain_pytorch [--out DIR]

Needs `pip install -e ".[vision]"`, no network and no GPU, and takes seconds on a CPU. The network has random weights
and the images are generated, so that the example needs no download; use `pretrained=True` and your own data instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_adapters as la
from lit_adapters.optimizers import parameter_groups

EPOCHS = 5


def build() -> nn.Module:
    """A small vision transformer; the same frozen weights at each call."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, num_classes=2, depth=4
    )


def images(count: int, seed: int) -> TensorDataset:
    """Noise images (count, 3, 32, 32): the first channel is brighter in class 1 and darker in class 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    pixels[:, 0] += 0.1 * (2 * labels - 1)[:, None, None]
    return TensorDataset(pixels, labels)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> float:
    """The share of right labels, in eval mode."""
    model.eval()
    right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> None:
    """AdamW with one learning rate for each part of the model: the adapters and the head."""
    steps = EPOCHS * len(loader)
    groups = parameter_groups(model, lr=5e-3, weight_decay=0.01, lr_scale={"nora": 2.0})
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            # AFA-LoRA would also need la.set_progress(model, step / steps) here.
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")


def main() -> None:
    """Train, save, and check that a fresh model with the saved adapters gives the same accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the adapters")
    out = parser.parse_args().out
    training = DataLoader(images(512, seed=1), batch_size=32, shuffle=True)
    validation = DataLoader(images(256, seed=2), batch_size=64)

    model = build()
    method = la.NoRA(groups=8, rank=3, base="anchored", fit_range="calibrate")
    print(la.attach(model, method, train=["head"]))
    la.calibrate(model, [x for x, _ in training][:4])  # measures the inputs of each activation
    la.verify(model, next(iter(validation))[0])  # raises if an adapter did not run
    train(model, training)
    trained = accuracy(model, validation)
    la.save_adapters(model, out)

    fresh = build()
    la.load_adapters(fresh, out)
    loaded = accuracy(fresh, validation)
    print(f"accuracy {trained:.3f} after training, {loaded:.3f} after loading {out} into a fresh model")


if __name__ == "__main__":
    main()
