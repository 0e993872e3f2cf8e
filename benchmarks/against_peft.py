"""How long does a training step take, ours over peft's? Same weights, batch, targets and rank.

    python -m benchmarks.against_peft [--models vit llama layer] [--methods lora dora] [--ranks 8] [--precisions fp32]
                                      [--checkpointing] [--rounds 9] [--threads 2]

`vit`: ViT-S/16 at 128 px, 64 patches, batch 16; `llama`: the shape of SmolLM2-135M, 4 rows of 128 tokens; `layer`: one
linear layer of a LLaMA of 1B, 2048 to 8192, 512 tokens. Random weights; r = 8 on all linear layers but the head. A step
is forward, loss, backward and AdamW. The two take turns in one process with the step that no adapter can do without:
the frozen model, gradients carried down to the first layer's input. Resident memory is the peak of steps in a process
of its own, less what it held before them; what tensors take, `peft_memory` counts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, measurable
from benchmarks.timing import alternate, other_load, ratios, resident_of, spread, training_step

TARGETS = {
    "vit": ["qkv", "attn.proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layer": ["0"],
}
METHODS: dict[str, type[la.Method]] = {"lora": la.LoRA, "dora": la.DoRA}


def create(name: str, checkpointing: bool) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model with random weights, and its loss on one batch."""
    torch.manual_seed(0)
    if name == "vit":
        model = timm.create_model("vit_small_patch16_224", img_size=128, num_classes=10)
        model.set_grad_checkpointing(checkpointing)
        images, labels = torch.randn(16, 3, 128, 128), torch.arange(16) % 10
        return model, lambda m: F.cross_entropy(m(images), labels)
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=8192))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.randint(0, 8192, (4, 128))
        return model, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss
    x = torch.randn(512, 2048, requires_grad=True)
    return nn.Sequential(nn.Linear(2048, 8192)), lambda m: m(x).square().mean()


def adapted(model: nn.Module, name: str, library: str, method: str, rank: int) -> nn.Module:
    """The model with adapters, which alone are trained, B not zero; or "frozen", with gradients to its first layer."""
    if library == "frozen":
        model.requires_grad_(False)
        model.nothing = nn.Parameter(torch.zeros(()))  # an optimiser wants something
        first = {"vit": "patch_embed", "llama": "model.embed_tokens"}.get(name)
        if first is not None:
            model.get_submodule(first).register_forward_hook(lambda module, args, output: output.requires_grad_())
        return model.train()
    if library == "ours":
        la.attach(model, METHODS[method](rank=rank, targets=TARGETS[name]))  # type: ignore[call-arg]
    else:
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS[name], use_dora=method == "dora")
        model = inject_adapter_in_model(config, model)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.01)
    return model.train()


def model_and_loss(
    name: str, library: str, method: str, rank: int, precision: str, checkpointing: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """An adapted model, and its loss on one batch."""
    base, loss_of = create(name, checkpointing)
    model = adapted(base, name, library, method, rank)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            return loss_of(model)

    return model, loss


def step_of(name: str, library: str, method: str, rank: int, precision: str, checkpointing: bool) -> Callable[[], None]:
    """A closure that takes a training step."""
    return training_step(*model_and_loss(name, library, method, rank, precision, checkpointing))


def measure(name: str, method: str, rank: int, precision: str, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """Both libraries and the frozen model in turns, then each library alone for its memory."""
    rest = (method, rank, precision, checkpointing)
    steps = {library: step_of(name, library, *rest) for library in ("ours", "peft", "frozen")}
    _, times = alternate(steps, rounds)
    del steps
    return {
        "model": name,
        "method": method,
        "rank": rank,
        "precision": precision,
        "checkpointing": checkpointing,
        "seconds": spread(times["ours"]),
        "seconds_peft": spread(times["peft"]),
        "ratio": ratios(times, "ours", "peft"),
        "over_frozen": ratios(times, "ours", "frozen"),
        "peft_over_frozen": ratios(times, "peft", "frozen"),
        "memory_mib": resident_of(step_of, name, "ours", *rest).needed,
        "memory_mib_peft": resident_of(step_of, name, "peft", *rest).needed,
        "rounds": rounds,
        "system_load": other_load(),
        "environment": environment(),
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that choose combinations."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def combinations(args: argparse.Namespace) -> list[tuple[str, str, int, str, bool]]:
    """Model, method, rank, precision and checkpointing of each that was chosen."""
    return list(itertools.product(args.models, args.methods, args.ranks, args.precisions, [args.checkpointing]))


def main() -> None:
    """Measure every combination asked for."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.precisions = measurable(args.precisions)
    for combination in combinations(args):
        record = measure(*combination, args.rounds)
        append(RESULTS / "against_peft.json", record)
        over = [record[name]["median"] for name in ("ratio", "over_frozen", "peft_over_frozen")]
        print(
            f"{combination}: {over[0]:.2f} of peft's time, {over[1]:.2f} and peft's {over[2]:.2f} of the frozen step's,"
            f" {record['memory_mib']} and peft's {record['memory_mib_peft']} MiB resident",
            flush=True,
        )


if __name__ == "__main__":
    main()
