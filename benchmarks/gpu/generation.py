"""How many tokens a second does the adapted LLaMA generate, merged and not, beside peft's and the base?

Greedy continuation of one prompt with KV cache; weights are bfloat16, adapters float32 and not zero, no autocast. All
take turns in one process; those that are not merged share the base's weights. "merged" NoRA++ has its LoRA merged and
its functions left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import lit_adapters as la
from benchmarks.against_peft import TARGETS
from benchmarks.gpu.models import RANK, llama, sharing, with_arm
from benchmarks.gpu.setting import Record, Setting, attempt
from benchmarks.timing import ratios, spread
from lit_adapters.ops import set_rational_backend

OURS = ("lora", "dora", "nora_plus_plus")
PEFT = ("lora", "dora")
_BASE = ("base", "none", False)  # arm, library and whether it is merged


def generation(setting: Setting) -> Iterator[Record]:
    """One record for each model, or its error."""
    set_rational_backend("triton")
    length, new = setting.choose((32, 32), (3, 3))
    prompt = torch.arange(3, 3 + length, device=setting.device)[None]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    base = llama(setting).requires_grad_(False).eval()

    @torch.inference_mode()
    def run(model: Any) -> None:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    models: dict[tuple[str, str, bool], nn.Module] = {
        _BASE: base,
        ("base again", "none", False): sharing(base),
    }

    def add(arm: str, library: str, merged: bool) -> Record:
        model = adapted(copy.deepcopy(base) if merged else sharing(base), arm, library, merged).eval()
        run(model)
        models[arm, library, merged] = model
        return {}

    for library, arms in (("ours", OURS), ("peft", PEFT)):
        for arm in arms:
            for merged in (False, True):
                key = {"arm": arm, "library": library, "merged": merged}
                found = attempt(key, partial(add, **key))
                if "error" in found:
                    yield found
    rounds = setting.choose(7, 2)
    times = setting.in_turns({name: partial(run, model) for name, model in models.items()}, rounds)
    for (arm, library, merged), seconds in times.items():
        yield {
            "arm": arm,
            "library": library,
            "merged": merged,
            "seconds": spread(seconds),
            "over_base": ratios(times, (arm, library, merged), _BASE),
            "tokens_a_second": new / spread(seconds)["median"],
            "prompt_tokens": length,
            "new_tokens": new,
            "rounds": rounds,
        }


def adapted(model: Any, arm: str, library: str, merged: bool) -> Any:
    """The model with adapters that are not zero, or with them merged into its weights."""
    if library == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, target_modules=TARGETS["llama"], use_dora=arm == "dora", init_lora_weights=False)
        model = get_peft_model(model, config)
        return model.merge_and_unload() if merged else model
    with_arm(model, "llama", arm)
    la.set_progress(model, 1.0)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.01 * torch.randn_like(parameter))
    if merged:
        la.merge(model)
    return model
