"""What do ten adapters in one model cost, and a batch in which each row has its own?

    python -m benchmarks.several_adapters [--rounds 9] [--threads 2]

A LLaMA of SmolLM2-135M's shape with random weights, 10 rows of 64 tokens, float32, without gradients. The ways take
turns in one process. peft computes the same with `adapter_names`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from benchmarks.inside_peft import SHAPE
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate, other_load, ratios, spread

COUNT = 10
METHODS: dict[str, la.Method] = {
    "LoRA": la.LoRA(rank=8),
    "NoRA++": la.NoRAPlusPlus(nora=la.NoRA(groups=8, base="anchored"), lora=la.LoRA(rank=8)),
}
NAMES = [str(i) for i in range(COUNT)]


def move(model: nn.Module) -> None:
    """Give the adapters in use values off their start."""
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.02 * torch.randn_like(parameter))


def ours(base: nn.Module, method: la.Method) -> nn.Module:
    """The model with ten adapters."""
    model = copy.deepcopy(base)
    for name in NAMES:
        la.attach(model, method, name=name)
        move(model)
    return model


def in_peft(base: nn.Module) -> nn.Module:
    """peft's model with ten LoRAs."""
    model: Any = None
    for name in NAMES:
        config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)  # type: ignore[arg-type]
        else:
            model.add_adapter(name, config)
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def measure(base: nn.Module, name: str, ids: Tensor, rounds: int) -> dict[str, Any]:
    """Times of one batch in several ways, of `use`, and the memory of an adapter."""
    method = METHODS[name]
    one = copy.deepcopy(base)
    la.attach(one, method)
    model = ours(base, method)

    def run(network: nn.Module, rows: Tensor = ids, **more: Any) -> Tensor:
        logits: Tensor = network(input_ids=rows, use_cache=False, **more).logits
        return logits

    def separate() -> Tensor:
        outputs = []
        for i, adapter in enumerate(NAMES):
            la.use(model, adapter)
            outputs.append(run(model, ids[i : i + 1]))
        return torch.cat(outputs)

    def mixed() -> Tensor:
        with la.rows(model, NAMES):
            return run(model)

    difference = (mixed() - separate()).abs().max().item()
    la.use(model, NAMES[0])
    ways: dict[str, Callable[[], object]] = {
        "one attached": lambda: run(one),
        "ten attached": lambda: (la.use(model, NAMES[0]), run(model)),
        "rows": mixed,
        "separate": separate,
        "use": lambda: (la.use(model, NAMES[1]), la.use(model, NAMES[0])),
    }
    if name == "LoRA":
        rival = in_peft(base)
        ways["peft, rows"] = lambda: run(rival, adapter_names=NAMES)
    _, times = alternate(ways, rounds)
    adapter_bytes = sum(
        p.numel() * p.element_size() for _, a in la.adapters(model) for p in a.adapter_tensors().values()
    )
    return {
        "method": name,
        "adapter_mib": adapter_bytes / 2**20,
        "model_mib": sum(p.numel() * p.element_size() for p in base.parameters()) / 2**20,
        "seconds": {way: spread(seconds) for way, seconds in times.items()},
        "ten_over_one": ratios(times, "ten attached", "one attached"),
        "rows_over_one": ratios(times, "rows", "one attached"),
        "rows_over_separate": ratios(times, "rows", "separate"),
        "peft_rows_over_one": ratios(times, "peft, rows", "one attached") if name == "LoRA" else None,
        "difference": difference,
        "rounds": rounds,
        "system_load": other_load(),
        "environment": environment(),
    }


def main() -> None:
    """Measure and append to results/several_adapters.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(SHAPE["vocab_size"], (COUNT, 64))
    for name in METHODS:
        record = measure(base, name, ids, args.rounds)
        append(RESULTS / "several_adapters.json", record)
        print(record, flush=True)


if __name__ == "__main__":
    main()
