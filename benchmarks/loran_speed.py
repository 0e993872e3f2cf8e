"""How long does LoRAN's step take beside LoRA's, and beside a separate branch x f(B A)^T, which forms the update alone?

    python -m benchmarks.loran_speed [--rounds 9] [--threads 2]

ViT-S/16 at 128 px with random weights, 65 tokens an image, float32, r = 8 on all linear layers of the blocks: 31
images (2,015 tokens) and 4 (260). LoRAN forms W0 + s f(B A) for the call, and once more in backward; the branch leaves
all of it to autograd. Memory is that of steps in a process of its own, less what it held before them: the peak of what
is resident in three, and of what tensors take in two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import allocated_mib, alone, alternate, other_load, ratios, resident_of, spread, training_step
from lit_adapters.methods.loran import LoRANAdapter

TARGETS = ["qkv", "attn.proj", "fc1", "fc2"]


def branch(adapter: LoRANAdapter, x: Tensor) -> Tensor:
    """The layer and its update, each multiplied by x; autograd keeps what it wants."""
    y: Tensor = adapter.base(x)
    return y + F.linear(x, adapter.update.value(adapter.lora_B @ adapter.lora_A, adapter.frequency))


def step_of(arm: str, images: int) -> Callable[[], None]:
    """A closure that takes one training step."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=128, num_classes=10).train()
    la.attach(model, la.LoRA(rank=8, targets=TARGETS) if arm == "lora" else la.LoRAN(rank=8, targets=TARGETS))
    if arm == "branch":
        for _, adapter in la.adapters(model):
            adapter.forward = branch.__get__(adapter)
    batch, labels = torch.randn(images, 3, 128, 128), torch.arange(images) % 10
    return training_step(model, lambda: F.cross_entropy(model(batch), labels))


def allocated_of(arm: str, images: int) -> float:
    """The most that tensors take at a time, in MiB."""
    return allocated_mib(step_of(arm, images))


def main() -> None:
    """Measure and append to results/loran_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for images in (31, 4):
        steps = {arm: step_of(arm, images) for arm in ("lora", "loran", "branch")}
        _, times = alternate(steps, args.rounds)
        for arm, seconds in times.items():
            record = {
                "arm": arm,
                "tokens": 65 * images,
                "seconds": spread(seconds),
                "memory_mib": resident_of(step_of, arm, images).needed,
                "allocated_mib": alone(allocated_of, arm, images),
                "over_lora": ratios(times, arm, "lora"),
                "over_branch": ratios(times, arm, "branch"),
                "rounds": args.rounds,
                "system_load": other_load(),
                "environment": environment(),
            }
            append(RESULTS / "loran_speed.json", record)
            lora = record["over_lora"]["median"]
            other = record["over_branch"]["median"]
            memory = f"{record['allocated_mib']:.0f} MiB allocated, {record['memory_mib']} resident"
            print(f"{65 * images} tokens {arm:<7} time / LoRA's {lora:.2f}, / the branch's {other:.2f}, {memory}")


if __name__ == "__main__":
    main()
