"""What does an adapted model cost in use? Forward passes of ViT-S and tokens a second of a LLaMA, merged and not.

    python -m benchmarks.inference [--rounds 9] [--threads 2]

`vit`: ViT-S/16 at 128 px, batch 16, random weights, without gradients; `llama`: SmolLM2-135M, greedy continuation of a
prompt of 32 tokens by 32, with KV cache. float32, updates that are not zero. Ratios are seconds over those of the
untouched base in the same round; those of a second copy of it show what chance does. NoRA's functions cannot be merged:
"merged" NoRA++ has its LoRA merged and its functions left.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import lit_adapters as la
from benchmarks.against_peft import TARGETS
from benchmarks.arms import methods
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate, other_load, ratios, spread
from language.models import SMOLLM2, create_model

NEW_TOKENS = 32


def create(name: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """A base, and what is done with it."""
    torch.manual_seed(0)
    if name == "vit":
        images = torch.randn(16, 3, 128, 128)
        return timm.create_model("vit_small_patch16_224", img_size=128, num_classes=10).eval(), lambda m: m(images)
    model: Any = create_model(SMOLLM2).eval()
    prompt = torch.arange(32)[None]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
    return model, lambda m: m.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)


def variants(name: str, base: nn.Module) -> dict[str, nn.Module]:
    """A copy of the base for itself, twice, for every method, adapted and merged, and for peft's LoRA and DoRA."""
    models = {"base": copy.deepcopy(base), "base, again": copy.deepcopy(base)}
    for arm in ("lora", "dora"):
        config = LoraConfig(r=8, target_modules=TARGETS[name], use_dora=arm == "dora", init_lora_weights=False)
        models[f"{arm}, peft"] = inject_adapter_in_model(config, copy.deepcopy(base)).eval()
    for arm, method in methods().items():
        model = copy.deepcopy(base)
        la.attach(model, method())
        la.set_progress(model, 1.0)
        with torch.no_grad():
            for _, adapter in la.adapters(model):
                for parameter in adapter.adapter_parameters().values():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        models[arm] = model.eval()
        if arm != "nora":
            models[f"{arm}, merged"] = copy.deepcopy(model)
            la.merge(models[f"{arm}, merged"])
    return models


def main() -> None:
    """Measure and append to results/inference.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in ("vit", "llama"):
        base, use = create(name)
        models = variants(name, base)
        rounds = args.rounds * (4 if name == "vit" else 1)  # whose calls are short
        with torch.inference_mode():
            _, times = alternate({v: partial(use, m) for v, m in models.items()}, rounds)
        for variant, seconds in times.items():
            record = {
                "model": name,
                "variant": variant,
                "seconds": spread(seconds),
                "over_base": ratios(times, variant, "base"),
                "rounds": rounds,
                "system_load": other_load(),
                "environment": environment(),
            }
            if name == "llama":
                record["tokens_per_second"] = NEW_TOKENS / record["seconds"]["median"]
            append(RESULTS / "inference.json", record)
            print(f"{name} {variant:<24} {record['over_base']['median']:.3f} of the base's time", flush=True)


if __name__ == "__main__":
    main()
