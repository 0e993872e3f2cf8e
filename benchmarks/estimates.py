"""How close does `lit-adapters estimate` come to what a step takes?

    python -m benchmarks.estimates [--threads 2] [--rounds 5]

Recipes of ViT-S/14 at 56 px and of SmolLM2-135M, with random weights and made-up batches. Memory is the most that
tensors take in two steps, as the allocator counts it. Seconds are the median of steps after the first two; they are
predicted from this machine's speed at matrix products, at copying and at a step of two transformer blocks, measured
just before.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.timing import allocated_mib, alone, timed
from lit_adapters.lightning.recipe_cost import read_recipe
from lit_adapters.training.hardware import DEVICES, this_machine
from lit_adapters.training.step_cost import TRAINED, WEIGHTS, Example, StepCost, step_cost

VISION = "configs/vision/offline/{}.yaml"
LANGUAGE = "configs/language/smollm2/{}.yaml"
BF16 = "trainer.precision=bf16-mixed"
METHODS = ("lora", "dora", "loran", "afa", "nora", "nora_plus_plus", "full")
CASES: list[tuple[str, list[str]]] = [
    *((VISION.format(method), []) for method in ("head", *METHODS)),
    (VISION.format("lora"), ["data.batch_size=16"]),
    (VISION.format("lora"), ["data.batch_size=256"]),
    (VISION.format("lora"), ["data.image_size=112"]),
    (VISION.format("lora"), ["model.adapters.init_args.rank=64"]),
    (VISION.format("lora"), [BF16]),
    (VISION.format("nora"), [BF16]),
    *((LANGUAGE.format(method), ["data.batch_size=4"]) for method in METHODS),
    (LANGUAGE.format("lora"), ["data.batch_size=1"]),
    (LANGUAGE.format("lora"), ["data.batch_size=2", "data.max_length=512"]),
    (LANGUAGE.format("lora"), ["data.batch_size=4", "model.adapters.init_args.rank=64"]),
    (LANGUAGE.format("lora"), ["data.batch_size=4", "model.gradient_checkpointing=true"]),
    (LANGUAGE.format("lora"), ["data.batch_size=4", BF16]),
    (LANGUAGE.format("nora"), ["data.batch_size=4", BF16]),
    (LANGUAGE.format("dpo"), ["data.batch_size=2"]),
    (LANGUAGE.format("grpo"), ["data.batch_size=2"]),
    (LANGUAGE.format("draft"), ["data.batch_size=4"]),
]


def measured(file: str, settings: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """What steps take, in a process of its own."""
    torch.set_num_threads(threads)
    recipe = read_recipe(Path(file), settings)
    model = recipe.example.build()
    optimizer = recipe.optimizer(model)
    for module in model.modules():
        if getattr(module, "awaits_calibration", False):
            module.assume_calibrated()  # type: ignore[operator]

    def step() -> None:
        with nullcontext() if recipe.autocast is None else torch.autocast("cpu", recipe.autocast):
            loss = recipe.example.loss(model)
        optimizer.zero_grad()  # as Lightning does
        loss.backward()
        optimizer.step()

    allocated = allocated_mib(step)
    device = this_machine()
    cost = recipe.cost()
    return {
        "allocated_mib": allocated,
        "seconds": statistics.median(timed(step) for _ in range(rounds)),
        "estimated_mib": (cost.peak - cost.parts.get(WEIGHTS, 0) - cost.parts.get(TRAINED, 0)) / 2**20,
        "estimated_seconds": device.seconds([*cost.operations, *cost.update]),
        "gflops": [device.floats / 1e9, device.halves / 1e9],
        "bandwidth_gb": device.bandwidth / 1e9,
    }


# Of method_comparison/MetaMathQA in peft's repository, read in 2026: GiB, and seconds of 5,000 steps on an L40S.
PUBLISHED = {"LoRA": (20.8, 942), "DoRA": (None, 1191), "full fine-tuning": (36.2, 2147)}
METHOD = {
    "LoRA": la.LoRA(rank=32, targets=["q_proj", "v_proj"]),
    "DoRA": la.DoRA(rank=32, targets=["q_proj", "v_proj"]),
}
LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
VOCABULARY = 128256


def published(name: str, tokens: int, rows: int = 4) -> StepCost:
    """What a step of the comparison takes, with rows of so many tokens."""

    def build() -> nn.Module:
        sizes = LlamaConfig(**LLAMA_3B, num_key_value_heads=8, vocab_size=VOCABULARY, tie_word_embeddings=True)
        model = LlamaForCausalLM(sizes).to(torch.bfloat16).train()
        if name in METHOD:
            la.attach(model, METHOD[name])
        return model

    def loss(model: nn.Module) -> torch.Tensor:
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        found: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    return step_cost(Example(build, loss, rows, rows * tokens, "tokens", VOCABULARY), optimizer, foreach=True)


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    path = RESULTS / "estimates_published.json"
    if not load(path):
        for name, (memory, seconds) in PUBLISHED.items():
            cost = published(name, 300)
            bound = DEVICES["l40s"].seconds([*cost.operations, *cost.update]) * 5000
            estimated = {"estimated_gib": published(name, 768).peak / 2**30, "estimated_seconds": bound}
            given = {"method": name, "gib": memory, "seconds": seconds}
            append(path, {**given, **estimated, "environment": environment()})
    path = RESULTS / "estimates.json"
    for file, settings in tqdm(CASES, desc="cases"):
        if any(r["recipe"] == file and r["settings"] == settings for r in load(path)):
            continue
        record = alone(measured, file, settings, args.rounds, args.threads)
        append(path, {"recipe": file, "settings": settings, **record, "environment": environment()})
        memory = record["estimated_mib"] / record["allocated_mib"]
        seconds = record["estimated_seconds"] / record["seconds"]
        tqdm.write(f"{file} {settings}: memory {memory:.3f}, time {seconds:.2f} of what was measured")


if __name__ == "__main__":
    main()
