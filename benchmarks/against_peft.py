"""How long does a training step take, ours over peft's? Same model, weights, batch, targets and rank, in turns.

    python -m benchmarks.against_peft [--rounds 9] [--threads 2]

ViT-S/16 with random weights, 16 patches, batch 64, rank 8 on qkv, proj, fc1 and fc2, fp32. A step is forward, loss,
backward and AdamW. Ratios are medians over rounds of ours / peft's in the same round, whose order alternates.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from tqdm import tqdm

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment

TARGETS = ["qkv", "proj", "fc1", "fc2"]
# The first "proj" is the convolution that embeds patches.
METHODS: dict[str, la.Method] = {
    "lora": la.LoRA(rank=8, targets=TARGETS, exclude=["patch_embed"]),
    "dora": la.DoRA(rank=8, targets=TARGETS, exclude=["patch_embed"]),
}


def stepper(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> float:
        start = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def measure(method: str, rounds: int) -> dict[str, object]:
    """Both models in turns."""
    torch.manual_seed(0)
    base = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    la.attach(ours, METHODS[method])
    places = [n for n, m in base.named_modules() if n.startswith("blocks") and n.rsplit(".", 1)[-1] in TARGETS]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=places, use_dora=method == "dora")
    theirs = inject_adapter_in_model(config, theirs)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trained[0] == trained[1], trained
    images, labels = torch.randn(64, 3, 64, 64), torch.arange(64) % 10
    steps = [stepper(m.train(), images, labels) for m in (ours, theirs)]
    for step in steps * 2:
        step()
    pairs = []
    for number in tqdm(range(rounds), desc=method):
        first, second = (0, 1) if number % 2 == 0 else (1, 0)
        seconds = {first: steps[first](), second: steps[second]()}
        pairs.append((seconds[0], seconds[1]))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "method": method,
        "trained": trained[0],
        "seconds": statistics.median(a for a, _ in pairs),
        "seconds_peft": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "environment": environment(),
    }


def main() -> None:
    """Measure all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for method in METHODS:
        record = measure(method, arguments.rounds)
        append(RESULTS / "against_peft.json", record)
        print({k: v for k, v in record.items() if k != "environment"}, flush=True)


if __name__ == "__main__":
    main()
