"""What do our methods cost inside peft, against `attach`? Seconds to put them in, and of a training step.

    python -m benchmarks.inside_peft [--rounds 9] [--threads 2]

A LLaMA of SmolLM2-135M's shape with random weights, 4 rows of 64 tokens, float32. Both ways take turns in one process.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate, other_load, ratios, spread, training_step
from lit_adapters.huggingface import peft_tuners

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, Any] = {
    "NoRA": peft_tuners.NoRAConfig(groups=8, base="anchored"),
    "LoRAN": peft_tuners.LoRANConfig(rank=8),
    "AFA-LoRA": peft_tuners.AFALoRAConfig(rank=8),
}


def attached(base: nn.Module, config: Any) -> nn.Module:
    """The model with the method attached."""
    la.attach(base, config.method())
    return base


def inside(base: nn.Module, config: Any) -> nn.Module:
    """The model in peft."""
    model: nn.Module = peft.get_peft_model(base, copy.deepcopy(config))  # type: ignore[arg-type]
    return model


WAYS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {"attach": attached, "peft": inside}


def main() -> None:
    """Measure and append to results/inside_peft.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    ids = torch.randint(SHAPE["vocab_size"], (4, 64))
    for name, config in CONFIGS.items():
        # Each puts its adapters into a copy of its own; copying is not counted.
        copies = {way: [copy.deepcopy(base) for _ in range(4)] for way in WAYS}
        begin = {way: partial(_begin, make, copies[way], config) for way, make in WAYS.items()}
        _, beginnings = alternate(begin, 2)
        models = {way: make(copy.deepcopy(base), config) for way, make in WAYS.items()}
        steps = {way: training_step(m, partial(_loss, m, ids)) for way, m in models.items()}
        _, times = alternate(steps, args.rounds)
        record = {
            "method": name,
            "begin": {way: spread(seconds) for way, seconds in beginnings.items()},
            "seconds": {way: spread(seconds) for way, seconds in times.items()},
            "step_over_attach": ratios(times, "peft", "attach"),
            "rounds": args.rounds,
            "system_load": other_load(),
            "environment": environment(),
        }
        append(RESULTS / "inside_peft.json", record)
        print(f"{name}: a step takes {record['step_over_attach']['median']:.3f} of the time with attach", flush=True)


def _begin(make: Callable[[nn.Module, Any], nn.Module], copies: list[nn.Module], config: Any) -> None:
    make(copies.pop(), config)


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


if __name__ == "__main__":
    main()
