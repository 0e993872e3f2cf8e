"""How does the cost of a training step grow with batch, sequence length, rank, groups and depth?

    python -m benchmarks.growth [--rounds 5] [--threads 2]

An encoder of ViT-S's width. One quantity varies, the others stay at batch 8, 64 patches, rank 8, 8 groups and 4 blocks;
float32, random weights. Methods take turns in one process for every size. docs/performance.md fits seconds = c size^k
to the medians: k = 1 is a cost in proportion, k = 0 a cost that does not depend on the quantity.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

import lit_adapters as la
from benchmarks.arms import ARMS, methods
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate, other_load, spread, training_step

START = {"batch": 8, "patches": 64, "rank": 8, "groups": 8, "blocks": 4}
SIZES = {
    "batch": (2, 4, 8, 16, 32),
    "patches": (16, 64, 144, 256),
    "rank": (2, 8, 32, 128),
    "groups": (1, 4, 16, 64),
    "blocks": (1, 2, 4, 8),
}


def compared(rank: int, groups: int) -> dict[str, la.Method | None]:
    """Methods by their names; None is full fine-tuning. NoRA++ is left out: its parts are there."""
    found: dict[str, la.Method | None] = {ARMS["full"].name: None}
    for key, method in methods().items():
        if method is not la.NoRAPlusPlus:
            size = {"groups": groups} if method is la.NoRA else {"rank": rank}
            found[ARMS[key].name] = method(**size)
    return found


def step_of(method: la.Method | None, batch: int, patches: int, blocks: int) -> Callable[[], None]:
    """A closure that takes one training step."""
    torch.manual_seed(0)
    side = 16 * round(patches**0.5)
    model = timm.create_model("vit_small_patch16_224", img_size=side, num_classes=10, depth=blocks).train()
    la.attach(model, method, train=[] if method is not None else ".*")
    if method is not None:
        la.set_progress(model, 0.1)  # AFA-LoRA between its sigma and linear
    images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % 10
    return training_step(model, lambda: F.cross_entropy(model(images), labels))


def main() -> None:
    """Measure and append to results/growth.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for quantity, sizes in SIZES.items():
        seconds: dict[str, list[float]] = {}
        for size in sizes:
            now = {**START, quantity: size}
            shape = (now["batch"], now["patches"], now["blocks"])
            steps = {name: step_of(m, *shape) for name, m in compared(now["rank"], now["groups"]).items()}
            _, times = alternate(steps, args.rounds)
            for name, values in times.items():
                seconds.setdefault(name, []).append(spread(values)["median"])
        for name, medians in seconds.items():
            record = {"quantity": quantity, "method": name, "sizes": list(sizes), "medians": medians}
            record |= {"rounds": args.rounds, "system_load": other_load(), "environment": environment()}
            append(RESULTS / "growth.json", record)
            print(
                f"{quantity:<8} {name:<18} " + ", ".join(f"{s}: {m:.3f} s" for s, m in zip(sizes, medians, strict=True))
            )


if __name__ == "__main__":
    main()
